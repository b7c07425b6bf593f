"""The use case of generation: an accepted call from its fields to a running request.

Validate, resolve the adapter, tokenize, fit, seed, submit: in this order, for every transport. Knows no wire format;
servicers and gateways read requests into a GenerateCall and write what the Generation gives.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

from loramux_server.api import validate
from loramux_server.api.activation import place_adapter
from loramux_server.api.calls import GenerateCall
from loramux_server.api.gate import Gate, Services
from loramux_server.api.generation import Generation
from loramux_server.api.ports import AdapterObserver, Tokenizer
from loramux_server.api.server_limits import ServerLimits
from loramux_server.api.stop_tokens import resolve_stop_tokens
from loramux_server.api.tokenizer_pool import TokenizerPool
from loramux_server.held import Held
from loramux_server.observe.logs import CALL_ID, DIGITS, note
from loramux_server.requests import Submission


@dataclass(frozen=True)
class GenerateUseCase:
    """One per server."""

    gate: Gate
    observer: AdapterObserver
    tokenizers: TokenizerPool

    @asynccontextmanager
    async def open(self, call: GenerateCall, tenant: str, deadline: float | None) -> AsyncIterator[Generation]:
        """The running request; leaving aborts what still runs. The adapter's version is held in between.

        `deadline` is on the monotonic clock, in seconds. Raises WarmingUp, Draining, InvalidRequest with every field at
        fault, what `Registry.resolve` and `EngineClient.submit` raise, Overloaded when many texts wait to be tokenized.
        """
        services = self.gate.enter()
        limits = services.model.limits
        validate.check_generate(call, limits)
        with self._resolve(services, tenant, call) as resolved:
            digest = None if resolved is None else resolved.digest
            spec = None if resolved is None else resolved.spec
            limits = limits.of(spec)
            validate.check_vocabulary(call, limits.vocabulary)
            tokenizer = await services.tokenizer_for(resolved)
            stop = resolve_stop_tokens(call.stop, tokenizer.special_tokens, limits.vocabulary)
            call = replace(call, stop=replace(stop, eos_token_ids=tokenizer.eos_token_ids))
            prompt = await self._tokenize(call, tokenizer, limits)
            note(digest=digest and digest[:DIGITS], prompt_tokens=len(prompt))
            positions = len(prompt) + (0 if spec is None else spec.virtual_tokens)
            max_tokens = limits.fit_tokens(positions, call.max_tokens)
            submission = place_adapter(_build_submission(call, tenant, digest, prompt, max_tokens, deadline), spec)
            validate.check_suppressed(submission.sampling.suppressed, limits)
            async with services.engine.submit(submission) as stream:
                # After all that may refuse, before the caller receives anything.
                confirm = None if resolved is None else resolved.confirm
                if resolved is not None and not resolved.judged_at_load:
                    await resolved.confirm()
                generation = Generation(stream, call, tokenizer, confirm)
                try:
                    yield generation
                finally:
                    note(**generation.facts())
                    await generation.confirm()  # who left before its begin has had it run

    async def _tokenize(self, call: GenerateCall, tokenizer: Tokenizer, limits: ServerLimits) -> list[int]:
        if call.token_ids is not None:
            return list(call.token_ids)
        if call.chat is not None:
            return await self.tokenizers.encode_chat(tokenizer, limits, call.chat, call.tools)
        return await self.tokenizers.encode_text("text", tokenizer, limits, call.text or "")

    def _resolve(self, services: Services, tenant: str, call: GenerateCall) -> Held | nullcontext[None]:
        references = call.adapters or (((call.adapter, 1.0),) if call.adapter else ())
        if not references:
            return nullcontext()
        resolved = services.registry.resolve_all(tenant, references)
        self.observer.named(resolved.digest, resolved.name)
        note(adapter=resolved.name)
        return resolved


def _build_submission(
    call: GenerateCall,
    tenant: str,
    digest: str | None,
    prompt: list[int],
    max_tokens: int,
    deadline: float | None,
) -> Submission:
    """A checked call with what the server decides: id, seed, length, and the tokens that may not be drawn.

    While the output is shorter than `min_tokens`, whatever would end it is forbidden to be drawn.
    """
    stop_token_ids = frozenset(call.stop.stop_token_ids)
    ending = stop_token_ids if call.stop.ignore_eos else stop_token_ids | call.stop.eos_token_ids
    min_tokens = min(call.stop.min_tokens, max_tokens)
    return Submission(
        request_id=call.request_id or CALL_ID.get(),
        tenant=tenant,
        digest=digest,
        prompt=tuple(prompt),
        sampling=replace(
            call.sampling,
            seed=secrets.randbits(64) if call.seed is None else call.seed,
            suppressed=tuple(sorted(ending)) if min_tokens else (),
            min_tokens=min_tokens,
        ),
        stop=replace(call.stop, stop_token_ids=stop_token_ids, min_tokens=min_tokens),
        max_tokens=max_tokens,
        n=call.n,
        priority=call.priority,
        cache_salt=call.cache_salt,
        deadline=deadline,
    )
