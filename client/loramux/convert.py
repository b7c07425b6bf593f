"""Between the client's plain values and protobuf messages, shared by the sync and the async client.

Knows no channel and decides nothing: what cannot be sent, or would be refused by every server, is refused in
`fields`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, cast, get_args

from loramux import fields, types
from loramux.chat import fill_chat
from loramux.errors import ErrorDetails, FailedPrecondition, TransferError
from loramux_protos.v1 import adapters_pb2, common_pb2, inference_pb2

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "n"
)  # fmt: skip
_STOPPING = ("max_tokens", "min_tokens", "include_stop", "ignore_eos")
_RESPONSE = {
    "logprobs": "logprobs",
    "prompt_logprobs": "prompt_logprobs",
    "echo": "echo",
    "return_token_ids": "token_ids",
}
_WHOLE_REQUEST = ("request_id", "cache_salt", "priority")


def generate_request(
    text: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, object]] | None,
    adapter: str | Mapping[str, float],
    options: types.GenerateOptions,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest from exactly one kind of input; unset options stay unset on the wire."""
    unknown = sorted(set(options) - set(types.GenerateOptions.__annotations__))
    if unknown:
        raise TypeError(f"unknown generate options: {', '.join(unknown)}")
    request = inference_pb2.GenerateRequest()
    given = [name for name, v in (("text", text), ("token_ids", token_ids), ("messages", messages)) if v is not None]
    with fields.refusing() as refusals:
        if isinstance(adapter, Mapping):
            for name, weight in refusals.take("adapter", adapter, fields.adapters) or ():
                request.adapters.add(adapter=name, weight=weight)
        else:
            request.adapter = refusals.take("adapter", adapter, fields.adapter) or ""
        if len(given) != 1:
            refusals.add("input", f"give exactly one of text, token_ids and messages, not {', '.join(given) or 'none'}")
        elif text is not None:
            request.text = refusals.take("text", text, fields.text) or ""
        elif token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(refusals.take("token_ids", token_ids, fields.token_ids) or ())
        elif messages is not None:
            request.chat.SetInParent()
            fill_chat(request.chat, messages, options.get("tools"), refusals)
        if options.get("tools") and messages is None:
            refusals.add("tools", "go with messages: only a chat template takes tools")
        _fill_options(request, options, refusals)
    return request


def _fill_options(
    request: inference_pb2.GenerateRequest, options: types.GenerateOptions, refusals: fields.Refusals
) -> None:
    values = {name: value for name, value in dict(options).items() if value is not None}
    for message, names in (
        (request.sampling, {name: name for name in _SAMPLING}),
        (request.stopping, {name: name for name in _STOPPING}),
        (request.response, _RESPONSE),
        (request, {name: name for name in _WHOLE_REQUEST}),
    ):
        for name, field in names.items():
            if name in values:
                value = refusals.take(name, values[name], fields.read_option(name))
                if value is not None:
                    setattr(message, field, value)
    least, most = request.stopping.min_tokens, request.stopping.max_tokens
    if most and least > most:
        refusals.add("min_tokens", f"{least} is out of range: must be from 0 to {most}, which is max_tokens")
    request.stopping.stop_strings.extend(refusals.take("stop", values.get("stop", ()), fields.stop_strings) or ())
    stop_ids = refusals.take("stop_token_ids", values.get("stop_token_ids", ()), fields.stop_token_ids)
    request.stopping.stop_token_ids.extend(stop_ids or ())
    for token, addend in (refusals.take("logit_bias", values.get("logit_bias", {}), fields.biases) or {}).items():
        request.sampling.logit_bias[token] = addend


def tokenize_request(
    text: str | None,
    messages: Sequence[Mapping[str, object]] | None,
    tools: Sequence[Mapping[str, object]] | None = None,
    adapter: str = "",
) -> inference_pb2.TokenizeRequest:
    """A TokenizeRequest from exactly one of text and messages."""
    request = inference_pb2.TokenizeRequest()
    with fields.refusing() as refusals:
        request.adapter = refusals.take("adapter", adapter, fields.text) or ""
        if (text is None) == (messages is None):
            refusals.add("input", "give exactly one of text and messages")
        elif text is not None:
            request.text = refusals.take("text", text, fields.text) or ""
        elif messages is not None:
            request.chat.SetInParent()
            fill_chat(request.chat, messages, tools, refusals)
        if tools and messages is None:
            refusals.add("tools", "go with messages: only a chat template takes tools")
    return request


def detokenize_request(token_ids: Sequence[int], adapter: str = "") -> inference_pb2.DetokenizeRequest:
    """A DetokenizeRequest."""
    with fields.refusing() as refusals:
        return inference_pb2.DetokenizeRequest(
            token_ids=refusals.take("token_ids", token_ids, fields.token_ids),
            adapter=refusals.take("adapter", adapter, fields.text) or "",
        )


def update_request(name: str, changes: types.AdapterChanges) -> adapters_pb2.UpdateAdapterRequest:
    """An UpdateAdapterRequest; only what is set changes."""
    request = adapters_pb2.UpdateAdapterRequest(
        name=name,
        add_aliases=changes.add_aliases,
        remove_aliases=changes.remove_aliases,
        set_labels=changes.set_labels,
        remove_labels=changes.remove_labels,
        version=changes.version,
        if_version=changes.if_version,
    )
    if changes.pinned is not None:
        request.pinned = changes.pinned
    if changes.merge is not None:
        request.merge = changes.merge
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
    names = types.ServerLimits.__dataclass_fields__
    return types.ModelInfo(
        response.model_id,
        response.architecture,
        response.fingerprint,
        response.chat_template_digest or None,
        response.compute_dtype,
        response.device,
        response.deterministic,
        types.ServerLimits(**{name: getattr(response.limits, name) for name in names}),
        types.WeightCounts(response.weights.nf4, response.weights.unquantized, response.weights.experts),
    )


def version_before(now: types.Adapter) -> str:
    """The digest that a name pointed at before. Raises FailedPrecondition where it keeps no other."""
    found = next((digest for digest in now.versions if digest != now.digest), "")
    if not found:
        message = f"{now.name} has no other version: push another adapter under this name first"
        raise FailedPrecondition(message, ErrorDetails(reason="ADAPTER_CONFLICT"))
    return found


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
        merge=message.merge,
        accepted_bases=tuple(message.accepted_bases),
        expires=message.expires.ToDatetime(tzinfo=UTC) if message.HasField("expires") else None,
        max_uses=message.max_uses if message.HasField("max_uses") else None,
        uses_left=message.uses_left if message.HasField("uses_left") else None,
        vocabulary=message.vocabulary or None,
        text_files=tuple(message.text_files),
        versions=tuple(message.versions),
        certificate=_replay(message.certificate) if message.HasField("certificate") else None,
    )


def _replay(message: adapters_pb2.CertificateReplay) -> types.CertificateReplay:
    return types.CertificateReplay(message.difference, message.divergence, message.tolerance, message.compute_dtype)


def _residency(message: adapters_pb2.Residency) -> types.Residency:
    tier = _word(adapters_pb2.Tier, message.tier, "TIER_")
    state = _word(adapters_pb2.MergedState, message.merged, "MERGED_STATE_")
    return types.Residency(
        tier=cast(types.Tier, tier) if tier in get_args(types.Tier) else "registered",
        slot=message.slot if message.HasField("slot") else None,
        leases=message.leases,
        merged=cast(types.MergedState, state) if state in get_args(types.MergedState) else "none",
        merged_reason=message.merged_reason,
        host_bytes=message.host_bytes,
        merged_certificate=_replay(message.merged_certificate) if message.HasField("merged_certificate") else None,
    )


def file_progress(response: adapters_pb2.QueryUploadResponse) -> tuple[types.FileProgress, ...]:
    """The typed answer of QueryUpload."""
    return tuple(types.FileProgress(f.file, f.received, f.size) for f in response.files)


def _word(enum: Any, value: int, prefix: str) -> str:
    """An enum's value as a word; one that only a newer server knows as its number."""
    return enum.Name(value).removeprefix(prefix).lower() if value in enum.values() else str(value)
