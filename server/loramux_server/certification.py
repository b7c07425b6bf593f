"""Certificates replayed through the engine: what an adapter's training computed, computed again as any request is.

Torch-free; knows no file but the certificate's bytes, and no wire format.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramux_adapters.certificate.document import Certificate, parse, refused
from loramux_adapters.certificate.replay import ASKED, Replay, check_identity, compare
from loramux_adapters.errors import AdapterError
from loramux_adapters.spec import AdapterSpec
from loramux_server.engine.client import EngineClient
from loramux_server.errors import RequestFailed, Unavailable
from loramux_server.requests import Route, SamplingParams, StopConditions, Submission, TokenLogprob

_SAMPLING = SamplingParams(temperature=0.0, prompt_logprobs=ASKED)
_SECONDS = 120.0
"""After which a replay that waits in a full queue is given up: other uploads wait behind it."""


@dataclass(frozen=True)
class ServedBase:
    """What a certificate is judged against: `chat_template` is its sha256, `dtype` what the server computes in,
    `context` the base's own length and `served` as much of it as requests may have.
    """

    fingerprint: str
    chat_template: str
    dtype: str
    vocabulary: int
    context: int
    served: int


class Certifier:
    """One per server. Its methods belong to the engine client's event loop."""

    def __init__(self, engine: EngineClient, base: ServedBase) -> None:
        self._engine, self._base = engine, base

    async def concerns(self, content: bytes) -> bool:
        """Whether a stored certificate is one of this version and base; one of another base says nothing here."""
        try:
            return (await asyncio.to_thread(parse, content)).base == self._base.fingerprint
        except AdapterError:
            return False

    async def replay(self, tenant: str, spec: AdapterSpec, content: bytes, route: Route = "gathered") -> Replay:
        """What the certificate in `content` comes to for an adapter that the engine can load by its digest.

        Raises CertificateRefused where it is not of this adapter and base, AdapterInvalid where it is no JSON, and what
        a request is refused with. Whether the replay holds is the caller's to judge.
        """
        # Not on the event loop: a megabyte from a stranger is read for a while.
        certificate = await asyncio.to_thread(parse, content)
        base = self._base
        if spec.invocation:
            raise refused("cannot be replayed: the adapter acts only behind tokens of its own")
        check_identity(
            certificate,
            adapter=spec.digest,
            base=base.fingerprint,
            chat_template=base.chat_template,
            vocabulary=base.vocabulary,
            context=base.context - spec.virtual_tokens - 1,
            room=base.served - spec.virtual_tokens - 1,
        )
        served = await self._served(tenant, spec, certificate, route)
        return await asyncio.to_thread(compare, certificate, served, base.dtype)

    async def _served(
        self, tenant: str, spec: AdapterSpec, certificate: Certificate, route: Route
    ) -> Sequence[Sequence[Mapping[int, float]]]:
        if route == "merged":  # a step uses the merged weights of one adapter
            return [await self._ask(tenant, spec, probe.tokens, route) for probe in certificate.probes]
        return await asyncio.gather(*(self._ask(tenant, spec, probe.tokens, route) for probe in certificate.probes))

    async def _ask(
        self, tenant: str, spec: AdapterSpec, tokens: tuple[int, ...], route: Route
    ) -> Sequence[Mapping[int, float]]:
        """After each token but the last: the most likely next ones and the one that follows."""
        own = f"replay-{uuid.uuid4().hex}"
        submission = Submission(
            own,
            tenant,
            spec.digest,
            tokens,
            _SAMPLING,
            StopConditions(ignore_eos=True),
            max_tokens=1,
            cache_salt=own,  # computed, not found
            deadline=time.monotonic() + _SECONDS,
            virtual_tokens=spec.virtual_tokens,
            route=route,
        )
        told: tuple[TokenLogprob | None, ...] = ()
        async with self._engine.submit(submission) as stream:
            async for event in stream:
                if event.failure is not None:
                    raise RequestFailed(event.failure)
                told = event.prompt_logprobs or told
        found = [dict((*each.top, (each.token, each.logprob))) for each in told if each is not None]
        if len(found) != len(tokens) - 1:  # aborted, as by a server that ends: nothing was compared yet
            raise Unavailable("the server ended the replay of the certificate before it was complete")
        return found
