"""Protobuf messages of InferenceService to the server's own values, and GetModel's answer.

Says nothing about whether a value is acceptable, JSON within them aside: `validate` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from loramux_protos.v1 import inference_pb2
from loramux_server.api.calls import GenerateCall, ResponseOptions
from loramux_server.api.ports import ModelInfo
from loramux_server.api.read_chat import read_chat, read_tools
from loramux_server.api.server_limits import ServerLimits
from loramux_server.requests import SamplingParams, StopConditions

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def read_generate(request: inference_pb2.GenerateRequest) -> GenerateCall:
    """What the caller asked, unchecked. Fields left out have their defaults. Raises InvalidRequest for what is not
    JSON."""
    kind = request.WhichOneof("input")
    sampling, stopping, response = request.sampling, request.stopping, request.response
    return GenerateCall(
        request_id=request.request_id,
        adapter=request.adapter,
        adapters=tuple((each.adapter, each.weight if each.HasField("weight") else 1.0) for each in request.adapters),
        text=request.text if kind == "text" else None,
        token_ids=tuple(request.token_ids.ids) if kind == "token_ids" else None,
        chat=read_chat("chat.messages", request.chat) if kind == "chat" else None,
        tools=read_tools("chat.tools_json", request.chat),
        sampling=SamplingParams(
            logit_bias=dict(sampling.logit_bias),
            **_set_fields(sampling, _SAMPLING),
            **_set_fields(response, ("logprobs", "prompt_logprobs")),
        ),
        stop=StopConditions(
            stop_strings=tuple(stopping.stop_strings),
            stop_token_ids=tuple(stopping.stop_token_ids),
            include_stop_string=stopping.include_stop,
            **_set_fields(stopping, ("min_tokens", "ignore_eos")),
        ),
        response=ResponseOptions(**_set_fields(response, ("token_ids", "echo"))),
        priority=request.priority,
        cache_salt=request.cache_salt,
        **_set_fields(sampling, ("n", "seed")),
        **_set_fields(stopping, ("max_tokens",)),
    )


def write_model(info: ModelInfo, template_digest: str) -> inference_pb2.GetModelResponse:
    """The base and the limits of this server."""
    return inference_pb2.GetModelResponse(
        model_id=info.model_id,
        architecture=info.architecture,
        fingerprint=info.fingerprint,
        chat_template_digest=template_digest,
        compute_dtype=info.compute_dtype,
        device=info.device,
        deterministic=info.deterministic,
        limits=_write_limits(info.limits),
        weights=inference_pb2.WeightCounts(
            nf4=info.weights.nf4, unquantized=info.weights.unquantized, experts=info.weights.experts
        ),
    )


def _write_limits(limits: ServerLimits) -> inference_pb2.Limits:
    return inference_pb2.Limits(
        context_tokens=limits.context_tokens,
        max_batch_tokens=limits.max_batch_tokens,
        max_running_requests=limits.max_running,
        max_queued_requests=limits.max_queued,
        kv_cache_tokens=limits.kv_tokens,
        max_rank=limits.max_rank,
        max_adapter_bytes=limits.max_adapter_bytes,
        adapter_device_bytes=limits.adapter_device_bytes,
        vocabulary=limits.vocabulary,
        max_choices=limits.max_choices,
        max_logprobs=limits.max_logprobs,
        max_stop_strings=limits.max_stop_strings,
        original_context_tokens=limits.original_context_tokens or 0,
    )


def _set_fields(message: Message, names: Sequence[str]) -> dict[str, Any]:
    """The fields among `names` that the caller set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}
