"""Every rule a request's fields must keep, checked before anything is allocated for it.

A broken rule is an InvalidRequest with the field's path, and the limit in its metadata.
Used by gRPC and HTTP alike; knows neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from lorica_adapters.spec import NAME_PATTERN
from lorica_server.api.calls import ChatTurn, GenerateCall, Limits, ResponseCall, SamplingCall, StoppingCall
from lorica_server.errors import InvalidRequest

MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024
MAX_STOP_CHARS = 256
MAX_SALT_CHARS = 256
MAX_TURNS = 4096
MAX_LABELS = 64

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_ROLE = re.compile(r"[A-Za-z_]{1,32}")
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_MAX_LABEL_CHARS = 256


def check_generate(call: GenerateCall, limits: Limits) -> None:
    """Everything that can be judged without tokenising. Raises InvalidRequest."""
    if call.request_id:
        check_request_id("request_id", call.request_id)
    if call.adapter:
        check_reference("adapter", call.adapter)
    check_salt(call.cache_salt)
    _check_input(call, limits)
    _check_sampling(call.sampling, limits)
    _check_stopping(call.stopping, limits)
    _check_response(call.response, limits)


def check_request_id(field: str, request_id: str) -> None:
    """The id a caller chose for a request."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(field, "must be 1 to 128 printable ASCII characters without blanks")


def check_reference(field: str, reference: str) -> None:
    """A name, an alias or `name@digest` (8 to 64 hex digits)."""
    name, at, digest = reference.partition("@")
    check_name(field, name)
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidRequest(field, "after @ there must be 8 to 64 lower-case hex digits of a digest")


def check_name(field: str, name: str) -> None:
    """A name or alias of an adapter."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(
            field, "must be 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
        )


def check_upload_id(field: str, upload_id: str) -> None:
    """The id under which an upload is resumed."""
    if not _UPLOAD_ID.fullmatch(upload_id):
        raise InvalidRequest(field, "must be 8 to 64 characters of A-Z, a-z, 0-9, _ and -")


def check_labels(field: str, labels: Mapping[str, str]) -> None:
    """Labels to set on an adapter."""
    _at_most(field, len(labels), MAX_LABELS, "labels")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidRequest(
                field, f"label key {key[:64]!r} must be 1 to 63 letters, digits, dots, dashes, slashes"
            )
        _at_most(f"{field}[{key}]", len(value), _MAX_LABEL_CHARS, "characters")


def check_salt(salt: str) -> None:
    """The caller's own salt of the prefix cache."""
    _at_most("cache_salt", len(salt), MAX_SALT_CHARS, "characters")


def check_chat(field: str, turns: Sequence[ChatTurn]) -> None:
    """A conversation; which roles make sense is the template's matter."""
    if not turns:
        raise InvalidRequest(field, "must hold at least one message")
    _at_most(field, len(turns), MAX_TURNS, "messages")
    for index, turn in enumerate(turns):
        if not _ROLE.fullmatch(turn.role):
            raise InvalidRequest(f"{field}[{index}].role", "must be a role like system, user or assistant")


def check_token_ids(field: str, ids: Collection[int], vocabulary: int) -> None:
    """Every id must be in the vocabulary: an id out of it would read past the embedding."""
    if ids and (max(ids) >= vocabulary or min(ids) < 0):
        index, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocabulary)
        raise InvalidRequest(
            f"{field}[{index}]",
            f"token id {token} is outside the vocabulary of {vocabulary}",
            metadata={"vocabulary": str(vocabulary)},
        )


def fit_tokens(prompt: int, max_tokens: int | None, limits: Limits) -> int:
    """How many tokens may be made after a prompt of `prompt` tokens; None means what is left.

    Raises InvalidRequest when the prompt leaves no room, or the caller asked for more than there is,
    in the context or in the whole KV cache.
    """
    # The last token's keys and values are never needed: the KV cache holds one token less than a text has.
    for name, limit, room, what in (
        ("context_tokens", limits.context_tokens, limits.context_tokens, "the context"),
        ("kv_cache_tokens", limits.kv_tokens, limits.kv_tokens + 1, "the whole KV cache"),
    ):
        facts = {name: str(limit), "prompt_tokens": str(prompt)}
        if prompt >= room:
            why = f"the prompt of {prompt} tokens leaves no room in {what} of {limit}"
            raise InvalidRequest("input", why, metadata=facts)
        if max_tokens is not None and prompt + max_tokens > room:
            why = f"{prompt} prompt tokens and {max_tokens} more are over {what} of {limit}"
            raise InvalidRequest("stopping.max_tokens", why, metadata=facts)
    return max_tokens if max_tokens is not None else min(limits.context_tokens, limits.kv_tokens + 1) - prompt


def check_suppressed(suppressed: Collection[int], limits: Limits) -> None:
    """The tokens forbidden until `min_tokens` are there must leave at least one to draw."""
    if sum(token < limits.vocabulary for token in suppressed) >= limits.vocabulary:
        raise InvalidRequest("stopping.min_tokens", "every token of the vocabulary would end the text")


def _check_input(call: GenerateCall, limits: Limits) -> None:
    given = [value for value in (call.text, call.token_ids, call.chat) if value is not None]
    if len(given) != 1:
        raise InvalidRequest("input", "exactly one of text, token_ids and chat must be set")
    if call.text is not None and not call.text:
        raise InvalidRequest("text", "must not be empty")
    if call.chat is not None:
        check_chat("chat.messages", call.chat)
    if call.token_ids is not None:
        if not call.token_ids:
            raise InvalidRequest("token_ids.ids", "must not be empty")
        fit_tokens(len(call.token_ids), call.stopping.max_tokens, limits)
        check_token_ids("token_ids.ids", call.token_ids, limits.vocabulary)


def _check_sampling(sampling: SamplingCall, limits: Limits) -> None:
    _within("sampling.temperature", sampling.temperature, 0.0, 100.0)
    _within("sampling.top_p", sampling.top_p, 0.0, 1.0, open_low=True)
    _within("sampling.min_p", sampling.min_p, 0.0, 1.0)
    _within("sampling.repetition_penalty", sampling.repetition_penalty, 0.01, 10.0)
    _within("sampling.presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _within("sampling.frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _within("sampling.top_k", sampling.top_k, 0, (1 << 32) - 1)
    _within("sampling.seed", sampling.seed, 0, (1 << 64) - 1)
    _within("sampling.n", sampling.n, 1, limits.max_choices, limit_name="max_choices")
    _at_most("sampling.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS, "entries")
    check_token_ids("sampling.logit_bias", sampling.logit_bias, limits.vocabulary)
    for token, bias in sampling.logit_bias.items():
        _within(f"sampling.logit_bias[{token}]", bias, -100.0, 100.0)


def _check_stopping(stopping: StoppingCall, limits: Limits) -> None:
    if stopping.max_tokens is not None and stopping.max_tokens < 1:
        raise InvalidRequest("stopping.max_tokens", "must be at least 1")
    if stopping.max_tokens is not None and stopping.max_tokens > limits.context_tokens:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"must be at most the context of {limits.context_tokens}",
            metadata={"context_tokens": str(limits.context_tokens)},
        )
    most = stopping.max_tokens if stopping.max_tokens is not None else limits.context_tokens
    _within("stopping.min_tokens", stopping.min_tokens, 0, most)
    strings = stopping.stop_strings
    _at_most("stopping.stop_strings", len(strings), limits.max_stop_strings, "strings", name="max_stop_strings")
    for index, text in enumerate(strings):
        if not text:
            raise InvalidRequest(f"stopping.stop_strings[{index}]", "must not be empty")
        _at_most(f"stopping.stop_strings[{index}]", len(text), MAX_STOP_CHARS, "characters")
    _at_most("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_TOKENS, "ids")
    check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, limits.vocabulary)


def _check_response(response: ResponseCall, limits: Limits) -> None:
    _within("response.logprobs", response.logprobs, 0, limits.max_logprobs, limit_name="max_logprobs")
    _within("response.prompt_logprobs", response.prompt_logprobs, 0, limits.max_logprobs, limit_name="max_logprobs")


def _within(
    field: str, value: float | None, low: float, high: float, *, open_low: bool = False, limit_name: str = ""
) -> None:
    if value is None:
        return
    if math.isfinite(value) and (low < value if open_low else low <= value) and value <= high:
        return
    rule = f"must be {'over' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}"
    raise InvalidRequest(field, rule, metadata={limit_name: f"{high:g}"} if limit_name else None)


def _at_most(field: str, count: int, limit: int, what: str, *, name: str = "limit") -> None:
    if count > limit:
        raise InvalidRequest(field, f"{count} {what}, and {limit} are allowed", metadata={name: str(limit)})
