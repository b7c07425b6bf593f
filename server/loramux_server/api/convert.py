"""Protobuf messages of InferenceService to neutral calls, and calls to submissions.

Says nothing about whether a value is acceptable, JSON within them aside: `validate` does, in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from loramux_protos.v1 import inference_pb2
from loramux_server.api.calls import GenerateCall, Limits, ResponseCall, SamplingCall, StoppingCall
from loramux_server.api.ports import ModelInfo
from loramux_server.api.read_chat import read_chat, read_tools
from loramux_server.requests import SamplingParams, StopConditions, Submission

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
)


def read_generate(request: inference_pb2.GenerateRequest) -> GenerateCall:
    """What the caller asked, unjudged. Fields left out are None. Raises InvalidRequest for what is not JSON."""
    kind = request.WhichOneof("input")
    sampling, stopping, response = request.sampling, request.stopping, request.response
    return GenerateCall(
        request_id=request.request_id,
        adapter=request.adapter,
        text=request.text if kind == "text" else None,
        token_ids=tuple(request.token_ids.ids) if kind == "token_ids" else None,
        chat=read_chat("chat.messages", request.chat) if kind == "chat" else None,
        tools=read_tools("chat.tools_json", request.chat),
        sampling=SamplingCall(logit_bias=dict(sampling.logit_bias), **_set_fields(sampling, _SAMPLING)),
        stopping=StoppingCall(
            stop_strings=tuple(stopping.stop_strings),
            stop_token_ids=tuple(stopping.stop_token_ids),
            **_set_fields(stopping, ("max_tokens", "min_tokens", "include_stop", "ignore_eos")),
        ),
        response=ResponseCall(**_set_fields(response, ("logprobs", "prompt_logprobs", "token_ids", "echo"))),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def build_submission(
    call: GenerateCall,
    *,
    request_id: str,
    tenant: str,
    digest: str | None,
    prompt: Sequence[int],
    max_tokens: int,
    eos_token_ids: frozenset[int],
    seed: int,
    deadline: float | None,
) -> Submission:
    """A valid call with everything resolved. Defaults of fields left out are applied here and nowhere else.

    While the output is shorter than `min_tokens`, whatever would end it is forbidden to be drawn.
    """
    sampling, stopping = call.sampling, call.stopping
    neutral = SamplingParams()
    stop_ids = frozenset(stopping.stop_token_ids)
    min_tokens = min(stopping.min_tokens or 0, max_tokens)
    ending = stop_ids if stopping.ignore_eos else stop_ids | eos_token_ids
    return Submission(
        request_id=request_id,
        tenant=tenant,
        digest=digest,
        prompt=tuple(prompt),
        sampling=SamplingParams(
            temperature=_or(sampling.temperature, neutral.temperature),
            top_p=_or(sampling.top_p, neutral.top_p),
            top_k=sampling.top_k or neutral.top_k,
            min_p=_or(sampling.min_p, neutral.min_p),
            repetition_penalty=_or(sampling.repetition_penalty, neutral.repetition_penalty),
            presence_penalty=_or(sampling.presence_penalty, neutral.presence_penalty),
            frequency_penalty=_or(sampling.frequency_penalty, neutral.frequency_penalty),
            logit_bias=sampling.logit_bias,
            seed=seed,
            suppressed=tuple(sorted(ending)) if min_tokens else (),
            min_tokens=min_tokens,
            logprobs=call.response.logprobs,
            prompt_logprobs=call.response.prompt_logprobs,
        ),
        stop=StopConditions(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_strings=stopping.stop_strings,
            include_stop_string=stopping.include_stop,
            stop_token_ids=stop_ids,
            eos_token_ids=eos_token_ids,
            ignore_eos=stopping.ignore_eos,
        ),
        n=sampling.n or 1,
        priority=call.priority,
        cache_salt=call.cache_salt,
        deadline=deadline,
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


def _write_limits(limits: Limits) -> inference_pb2.Limits:
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


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
