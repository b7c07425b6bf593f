"""Between the client's plain values and protobuf messages, shared by the sync and the async client.

Knows no channel and decides nothing: ranges are the server's to judge, here only what cannot be
expressed in a message is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any, cast, get_args

from lorica import types
from lorica.errors import ErrorDetails, FieldViolation, InvalidArgument, TransferError
from lorica_protos.v1 import adapters_pb2, common_pb2, inference_pb2

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "n"
)  # fmt: skip
_STOPPING = ("max_tokens", "min_tokens", "include_stop", "ignore_eos")


def generate_request(
    text: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[types.Message] | None,
    adapter: str,
    options: types.GenerateOptions,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest from exactly one kind of input; unset options stay unset on the wire."""
    given = [name for name, v in (("text", text), ("token_ids", token_ids), ("messages", messages)) if v is not None]
    if len(given) != 1:
        raise _refusal("input", f"give exactly one of text, token_ids and messages, not {', '.join(given) or 'none'}")
    unknown = sorted(set(options) - set(types.GenerateOptions.__annotations__))
    if unknown:
        raise TypeError(f"unknown generate options: {', '.join(unknown)}")
    try:
        request = inference_pb2.GenerateRequest(adapter=adapter, request_id=options.get("request_id", ""))
        if text is not None:
            request.text = text
        elif token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(token_ids)
        else:
            request.chat.CopyFrom(_chat(messages or ()))
        _fill_options(request, options)
    except (TypeError, ValueError) as error:  # out of the field's integer range, or of another type
        raise _refusal("request", f"a value does not fit its field: {error}") from error
    return request


def _fill_options(request: inference_pb2.GenerateRequest, options: types.GenerateOptions) -> None:
    values = dict(options)
    for message, fields in ((request.sampling, _SAMPLING), (request.stopping, _STOPPING)):
        for name in fields:
            if values.get(name) is not None:
                setattr(message, name, values[name])
    for token, addend in (options.get("logit_bias") or {}).items():
        request.sampling.logit_bias[token] = addend
    stop = options.get("stop") or []
    request.stopping.stop_strings.extend([stop] if isinstance(stop, str) else stop)
    request.stopping.stop_token_ids.extend(options.get("stop_token_ids") or ())
    for name in ("logprobs", "prompt_logprobs", "echo"):
        if values.get(name) is not None:
            setattr(request.response, name, values[name])
    if options.get("return_token_ids") is not None:
        request.response.token_ids = options["return_token_ids"]
    if options.get("priority") is not None:
        request.priority = options["priority"]
    request.cache_salt = options.get("cache_salt") or ""


def _chat(messages: Sequence[types.Message]) -> inference_pb2.Chat:
    chat = inference_pb2.Chat()
    for index, message in enumerate(messages):
        try:
            chat.messages.add(role=message["role"], content=message["content"])
        except (KeyError, TypeError) as error:
            field = f"messages[{index}]"
            raise _refusal(field, "must be a mapping with the strings role and content") from error
    return chat


def tokenize_request(text: str | None, messages: Sequence[types.Message] | None) -> inference_pb2.TokenizeRequest:
    """A TokenizeRequest from exactly one of text and messages."""
    if text is not None and messages is None:
        return inference_pb2.TokenizeRequest(text=text)
    if messages is not None and text is None:
        return inference_pb2.TokenizeRequest(chat=_chat(messages))
    raise _refusal("input", "give exactly one of text and messages")


def update_request(name: str, changes: types.AdapterChanges) -> adapters_pb2.UpdateAdapterRequest:
    """An UpdateAdapterRequest; only what is set changes."""
    request = adapters_pb2.UpdateAdapterRequest(
        name=name,
        add_aliases=changes.add_aliases,
        remove_aliases=changes.remove_aliases,
        set_labels=changes.set_labels,
        remove_labels=changes.remove_labels,
    )
    if changes.pinned is not None:
        request.pinned = changes.pinned
    if changes.materialised is not None:
        request.materialised = changes.materialised
    return request


def generation(response: inference_pb2.GenerateResponse) -> types.Generation:
    """The typed answer of Generate."""
    if not response.choices:
        raise TransferError("the server's answer holds no choice")
    return types.Generation(
        prompt=_prompt(response.prompt),
        choices=tuple(
            types.Choice(c.index, c.text, tuple(c.token_ids), _logprobs(c.logprobs), _finish(c.finish))
            for c in response.choices
        ),
    )


def stream_part(response: inference_pb2.GenerateStreamResponse) -> types.StreamPart:
    """The typed form of one message of GenerateStream."""
    return types.StreamPart(
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=_logprobs(response.logprobs),
        prompt=_prompt(response.prompt) if response.HasField("prompt") else None,
        usage=_usage(response.usage) if response.HasField("usage") else None,
        finish=_finish(response.finish) if response.HasField("finish") else None,
    )


def _prompt(prompt: inference_pb2.PromptInfo) -> types.Prompt:
    return types.Prompt(
        prompt.request_id,
        prompt.adapter_digest or None,
        tuple(prompt.token_ids),
        _logprobs(prompt.logprobs),
        prompt.seed,
    )


def _logprobs(logprobs: Sequence[inference_pb2.TokenLogprob]) -> tuple[types.TokenLogprob, ...]:
    return tuple(
        types.TokenLogprob(
            entry.token_id,
            entry.logprob if entry.HasField("logprob") else None,
            entry.text,
            tuple(types.Alternative(a.token_id, a.logprob, a.text) for a in entry.alternatives),
        )
        for entry in logprobs
    )


def _usage(usage: common_pb2.Usage) -> types.Usage:
    return types.Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def _finish(finish: inference_pb2.Finish) -> types.Finish:
    reason = _word(inference_pb2.FinishReason, finish.reason, "FINISH_REASON_")
    if reason not in get_args(types.FinishReason):
        raise TransferError(f"the server ended a choice for a reason this client does not know: {reason!r}")
    detail = finish.WhichOneof("stop_detail")
    return types.Finish(
        cast(types.FinishReason, reason),
        _usage(finish.usage),
        stop_string=finish.stop_string if detail == "stop_string" else None,
        stop_token_id=finish.stop_token_id if detail == "stop_token_id" else None,
    )


def model_info(response: inference_pb2.GetModelResponse) -> types.ModelInfo:
    """The typed answer of GetModel."""
    names = types.Limits.__dataclass_fields__
    return types.ModelInfo(
        response.model_id,
        response.architecture,
        response.fingerprint,
        response.chat_template_digest or None,
        response.compute_dtype,
        response.device,
        response.deterministic,
        types.Limits(**{name: getattr(response.limits, name) for name in names}),
    )


def adapter(message: adapters_pb2.Adapter) -> types.Adapter:
    """The typed form of an Adapter message."""
    health = _word(adapters_pb2.AdapterHealth, message.health, "ADAPTER_HEALTH_")
    return types.Adapter(
        name=message.name,
        digest=message.digest,
        kind=message.kind,
        base_fingerprint=message.base_fingerprint or None,
        base_mismatch=message.base_mismatch,
        max_rank=message.max_rank,
        targets=tuple(message.targets),
        size_bytes=message.size_bytes,
        labels=dict(message.labels),
        aliases=tuple(message.aliases),
        pinned=message.pinned,
        created=message.created.ToDatetime(tzinfo=UTC),
        updated=message.updated.ToDatetime(tzinfo=UTC),
        health="corrupt" if health == "corrupt" else "ok",
        residency=_residency(message.residency),
        materialise=message.materialise,
        accepted_bases=tuple(message.accepted_bases),
    )


def _residency(message: adapters_pb2.Residency) -> types.Residency:
    tier = _word(adapters_pb2.Tier, message.tier, "TIER_")
    state = _word(adapters_pb2.MaterialisedState, message.materialised, "MATERIALISED_STATE_")
    return types.Residency(
        tier=cast(types.Tier, tier) if tier in get_args(types.Tier) else "registered",
        slot=message.slot if message.HasField("slot") else None,
        leases=message.leases,
        materialised=cast(types.MaterialisedState, state) if state in get_args(types.MaterialisedState) else "none",
        materialised_reason=message.materialised_reason,
    )


def file_progress(response: adapters_pb2.QueryUploadResponse) -> tuple[types.FileProgress, ...]:
    """The typed answer of QueryUpload."""
    return tuple(types.FileProgress(f.file, f.committed, f.size) for f in response.files)


def _word(enum: Any, value: int, prefix: str) -> str:
    """An enum's value as a word; one that only a newer server knows as its number."""
    return enum.Name(value).removeprefix(prefix).lower() if value in enum.values() else str(value)


def _refusal(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        description, ErrorDetails(reason="INVALID_REQUEST", violations=(FieldViolation(field, description),))
    )
