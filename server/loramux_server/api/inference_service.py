"""InferenceService over gRPC: requests to calls, generations to messages.

A translator: what a generation takes is in `generate`, what fields may be in `validate`.
"""

# ruff: noqa: N802 -- methods are named by the contract

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from grpc import aio

from loramux_protos.v1 import inference_pb2, inference_pb2_grpc
from loramux_server.api import validate
from loramux_server.api.convert import read_generate, write_model
from loramux_server.api.convert_answers import ResponseWriter
from loramux_server.api.gate import Gate
from loramux_server.api.generate import GenerateUseCase
from loramux_server.api.generation import Generation
from loramux_server.api.ports import Tokenizer
from loramux_server.api.read_chat import read_chat, read_tools
from loramux_server.api.server_limits import ServerLimits
from loramux_server.api.tokenizer_pool import TokenizerPool
from loramux_server.errors import InvalidRequest
from loramux_server.observe.logs import note

Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """One per server. `tenant_of` says on whose behalf a call is made."""

    gate: Gate
    tenant_of: Callable[[Context], str]
    generate: GenerateUseCase
    tokenizers: TokenizerPool

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """One response when all choices have ended."""
        async with self._open(request, context) as generation:
            writer = ResponseWriter(generation)
            async for deltas in generation:
                writer.add(deltas)
            return writer.whole()

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        """Tokens as they are made; several in one message when the caller is slower than the engine."""
        async with self._open(request, context) as generation:
            writer = ResponseWriter(generation)
            async for deltas in generation:
                for message in writer.messages(deltas):
                    yield message

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Token ids as Generate would make them of the same input."""
        async with self._texts(request.adapter, context) as (tokenizer, limits):
            match request.WhichOneof("input"):
                case "text":
                    ids = await self.tokenizers.encode_text("text", tokenizer, limits, request.text)
                case "chat":
                    turns = read_chat("chat.messages", request.chat)
                    validate.check(validate.chat("chat.messages", turns))
                    tools = read_tools("chat.tools_json", request.chat)
                    ids = await self.tokenizers.encode_chat(tokenizer, limits, turns, tools)
                case _:
                    raise InvalidRequest("input", "exactly one of text and chat must be set")
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        async with self._texts(request.adapter, context) as (tokenizer, limits):
            validate.check_token_ids("token_ids", request.token_ids, limits.vocabulary)
            text = await self.tokenizers.decode(tokenizer, list(request.token_ids))
        return inference_pb2.DetokenizeResponse(text=text)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """The base and the limits of this server."""
        services = self.gate.look()
        return write_model(services.model, services.tokenizer.template_digest)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Context) -> inference_pb2.AbortResponse:
        """End one of the caller's own requests."""
        note(request_id=request.request_id)
        validate.check(validate.request_id("request_id", request.request_id))
        aborted = self.gate.look().engine.abort(self.tenant_of(context), request.request_id)
        return inference_pb2.AbortResponse(aborted=aborted)

    @asynccontextmanager
    async def _texts(self, adapter: str, context: Context) -> AsyncIterator[tuple[Tokenizer, ServerLimits]]:
        """By what texts become token ids, and back, for an adapter or the base."""
        services = self.gate.look()
        limits = services.model.limits
        if not adapter:
            yield services.tokenizer, limits
            return
        validate.check(validate.reference("adapter", adapter))
        with services.registry.resolve(self.tenant_of(context), adapter, counts=False) as resolved:
            yield await services.tokenizer_for(resolved), limits.of(resolved.spec)

    def _open(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AbstractAsyncContextManager[Generation]:
        note(request_id=request.request_id, adapter=request.adapter)
        return self.generate.open(read_generate(request), self.tenant_of(context), _deadline(context))


def _deadline(context: Any) -> float | None:
    """The call's deadline on the monotonic clock. grpc gives None without one, which its types do not say."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
