"""InferenceService: one call from its fields to its last message.

Validate, resolve and pin the adapter, tokenize, submit, then tell what the engine tells.
Knows the order of these; each of them is another module's matter.
"""

# ruff: noqa: N802 -- methods are named by the contract

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from grpc import aio

from loramux_protos.v1 import inference_pb2, inference_pb2_grpc
from loramux_server.api import validate
from loramux_server.api.calls import GenerateCall, Limits
from loramux_server.api.convert import build_submission, read_generate, write_model
from loramux_server.api.convert_answers import Answering
from loramux_server.api.gate import Gate
from loramux_server.api.generation import Generation
from loramux_server.api.ports import Codec
from loramux_server.api.read_chat import read_chat, read_tools
from loramux_server.api.stop_tokens import resolve_stop_tokens
from loramux_server.api.tokenizer_pool import TokenizerPool
from loramux_server.errors import InvalidRequest
from loramux_server.observe.logs import CALL_ID, DIGITS, note
from loramux_server.registry import Registry, Resolved

Context = aio.ServicerContext[Any, Any]


class NameObserver(Protocol):
    """Who tells names of adapters in use."""

    def named(self, digest: str, name: str) -> None: ...


@dataclass(frozen=True)
class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """One per server. `tenant_of` says on whose behalf a call is made."""

    gate: Gate
    tenant_of: Callable[[Context], str]
    observer: NameObserver
    encoder: TokenizerPool = field(default_factory=TokenizerPool)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """One answer when all choices have ended."""
        async with self._generation(request, context) as (generation, answering):
            async for deltas in generation:
                answering.add(deltas)
            return answering.whole()

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        """Tokens as they are made; several in one message when the caller is slower than the engine."""
        async with self._generation(request, context) as (generation, answering):
            async for deltas in generation:
                for message in answering.messages(deltas):
                    yield message

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Token ids as Generate would make them of the same input."""
        parts = self.gate.look()
        codec, limits = parts.codec, parts.model.limits
        match request.WhichOneof("input"):
            case "text":
                ids = await self.encoder.encode_text("text", codec, limits, request.text)
            case "chat":
                turns = read_chat("chat.messages", request.chat)
                validate.check(validate.chat("chat.messages", turns))
                tools = read_tools("chat.tools_json", request.chat)
                ids = await self.encoder.encode_chat(codec, limits, turns, tools)
            case _:
                raise InvalidRequest("input", "exactly one of text and chat must be set")
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        parts = self.gate.look()
        validate.check_token_ids("token_ids", request.token_ids, parts.model.limits.vocabulary)
        text = await self.encoder.decode(parts.codec, list(request.token_ids))
        return inference_pb2.DetokenizeResponse(text=text)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """The base and the limits of this server."""
        parts = self.gate.look()
        return write_model(parts.model, parts.codec.template_digest)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Context) -> inference_pb2.AbortResponse:
        """End one of the caller's own requests."""
        note(request_id=request.request_id)
        validate.check(validate.request_id("request_id", request.request_id))
        aborted = self.gate.look().engine.abort(self.tenant_of(context), request.request_id)
        return inference_pb2.AbortResponse(aborted=aborted)

    @asynccontextmanager
    async def _generation(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[tuple[Generation, Answering]]:
        """The accepted request; leaving aborts what still runs. The adapter's version stays pinned in between."""
        note(request_id=request.request_id, adapter=request.adapter)
        parts = self.gate.enter()
        deadline = _deadline(context)
        call = read_generate(request)
        validate.check_generate(call, parts.model.limits)
        special, vocabulary = parts.codec.special_tokens, parts.model.limits.vocabulary
        call = replace(call, stopping=resolve_stop_tokens(call.stopping, special, vocabulary))
        tenant = self.tenant_of(context)
        with self._resolve(parts.registry, tenant, call.adapter) as resolved:
            digest = None if resolved is None else resolved.digest
            prompt = await self._encode(parts.codec, call, parts.model.limits)
            note(digest=digest and digest[:DIGITS], prompt_tokens=len(prompt))
            max_tokens = validate.fit_tokens(len(prompt), call.stopping.max_tokens, parts.model.limits)
            seed = secrets.randbits(64) if call.sampling.seed is None else call.sampling.seed
            submission = build_submission(
                call,
                request_id=call.request_id or CALL_ID.get(),
                tenant=tenant,
                digest=digest,
                prompt=prompt,
                max_tokens=max_tokens,
                eos_token_ids=parts.codec.eos_token_ids,
                seed=seed,
                deadline=deadline,
            )
            validate.check_suppressed(submission.sampling.suppressed, parts.model.limits)
            async with parts.engine.submit(submission) as stream:
                generation = Generation(stream, parts.codec)
                try:
                    yield generation, Answering(call, submission, parts.codec)
                finally:
                    note(**generation.facts())

    async def _encode(self, codec: Codec, call: GenerateCall, limits: Limits) -> list[int]:
        if call.token_ids is not None:
            return list(call.token_ids)
        if call.chat is not None:
            return await self.encoder.encode_chat(codec, limits, call.chat, call.tools)
        return await self.encoder.encode_text("text", codec, limits, call.text or "")

    def _resolve(self, registry: Registry, tenant: str, reference: str) -> Resolved | nullcontext[None]:
        if not reference:
            return nullcontext()
        resolved = registry.resolve(tenant, reference)
        self.observer.named(resolved.digest, resolved.name)
        note(adapter=resolved.name)
        return resolved


def _deadline(context: Any) -> float | None:
    """The call's deadline on the monotonic clock. grpc gives None without one, which its types do not say."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
