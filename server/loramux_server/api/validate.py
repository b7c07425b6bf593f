"""Every rule a request's fields must keep, checked before anything is allocated for it.

A broken rule is an InvalidRequest with the field's path, and the limit in its metadata. Rules yield what they find
wrong, checks raise all of it at once. Used by gRPC and HTTP alike; knows neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from loramux_adapters.combination import LARGEST_WEIGHT, MOST_COMBINED, SMALLEST_WEIGHT, is_weight
from loramux_adapters.names import (
    LABEL_KEY,
    MAX_LABEL_CHARACTERS,
    MAX_LABELS,
    MAX_TTL_SECONDS,
    MAX_USES,
    NAME,
    UPLOAD_ID,
    VERSION,
    wrong_labels,
)
from loramux_server.api.calls import ChatTurn, GenerateCall
from loramux_server.api.server_limits import ServerLimits
from loramux_server.errors import InvalidRequest

MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024
MAX_STOP_CHARS = 256
MAX_SALT_CHARS = 256
MIN_REPETITION_PENALTY = 0.009999999776482582  # 0.01 as it comes over the wire, in float32
MAX_TURNS = 4096
MAX_ALIASES_AT_ONCE = 64
_ANY_TOKEN = 1 << 32  # beyond what the wire carries

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_ROLE = re.compile(r"[A-Za-z_]{1,32}")

Wrong = Iterator[InvalidRequest]


def check(*rules: Iterable[InvalidRequest]) -> None:
    """Raise what the rules find wrong, all of it in one InvalidRequest."""
    wrong = [error for rule in rules for error in rule]
    if wrong:
        raise InvalidRequest.of_all(wrong)


def check_generate(call: GenerateCall, limits: ServerLimits) -> None:
    """Everything that can be checked without tokenizing, and before it is known which tokens an adapter knows."""
    if call.adapter or call.adapters:
        limits = replace(limits, vocabulary=_ANY_TOKEN)
    check(
        request_id("request_id", call.request_id) if call.request_id else (),
        reference("adapter", call.adapter) if call.adapter else (),
        _combined(call) if call.adapters else (),
        _at_most("cache_salt", len(call.cache_salt), MAX_SALT_CHARS, "characters"),
        _input(call, limits),
        _sampling(call, limits),
        _stopping(call, limits),
        _response(call, limits),
    )


def check_vocabulary(call: GenerateCall, vocabulary: int) -> None:
    """Whether all token ids of a call are known to what answers it."""
    check(
        token_ids("token_ids.ids", call.token_ids or (), vocabulary),
        token_ids("sampling.logit_bias", call.sampling.logit_bias, vocabulary),
        token_ids("stopping.stop_token_ids", call.stop.stop_token_ids, vocabulary),
    )


def request_id(field: str, value: str) -> Wrong:
    """The id a caller chose for a request."""
    if not _REQUEST_ID.fullmatch(value):
        yield InvalidRequest(field, "must be 1 to 128 printable ASCII characters without blanks")


def reference(field: str, value: str) -> Wrong:
    """A name, an alias or `name@digest` (8 to 64 hex digits)."""
    adapter, at, digest = value.partition("@")
    yield from name(field, adapter)
    if at and not VERSION.allows(digest):
        yield InvalidRequest(field, f"after @ there must be {VERSION.words}")


def _combined(call: GenerateCall) -> Wrong:
    if call.adapter:
        yield InvalidRequest("adapters", "give either adapter or adapters")
    yield from _at_most("adapters", len(call.adapters), MOST_COMBINED, "adapters together")
    for index, (value, weight) in enumerate(call.adapters):
        yield from reference(f"adapters[{index}].adapter", value)
        if not is_weight(weight):
            why = f"must be from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, or as much below 0: leave the adapter out"
            yield InvalidRequest(f"adapters[{index}].weight", why)


def name(field: str, value: str) -> Wrong:
    """A name or alias of an adapter."""
    if not NAME.allows(value):
        yield InvalidRequest(field, f"must be {NAME.words}")


def version(field: str, value: str) -> Wrong:
    """The start of a digest, or nothing."""
    if value and not VERSION.allows(value):
        yield InvalidRequest(field, f"must be {VERSION.words}")


def upload_id(field: str, value: str) -> Wrong:
    """The id under which an upload is resumed."""
    if not UPLOAD_ID.allows(value):
        yield InvalidRequest(field, f"must be {UPLOAD_ID.words}")


def labels(field: str, values: Mapping[str, str]) -> Wrong:
    """Labels to set on an adapter."""
    yield from _at_most(field, len(values), MAX_LABELS, "labels")
    for key, why in wrong_labels(values):
        shown = key if LABEL_KEY.allows(key) else repr(key[:64])
        limit = {"limit": str(MAX_LABEL_CHARACTERS)} if len(values[key]) > MAX_LABEL_CHARACTERS else None
        yield InvalidRequest(f"{field}[{shown}]", why, metadata=limit)


def lifetime(field: str, ttl_seconds: float | None, max_uses: int | None) -> Wrong:
    """When an adapter ends by itself; `field` is the message that holds both."""
    note = "that is 10 years, and unset means that the adapter stays"
    yield from _within(f"{field}.ttl_seconds", ttl_seconds, 0.0, MAX_TTL_SECONDS, open_low=True, note=note)
    yield from _within(f"{field}.max_uses", max_uses, 1, MAX_USES, note="unset means no limit")


def aliases(field: str, values: Sequence[str]) -> Wrong:
    """Aliases to add or to remove at once."""
    if len(values) > MAX_ALIASES_AT_ONCE:
        yield InvalidRequest(field, f"at most {MAX_ALIASES_AT_ONCE} at once")
        return
    for index, alias in enumerate(values):
        yield from name(f"{field}[{index}]", alias)


def chat(field: str, turns: Sequence[ChatTurn]) -> Wrong:
    """A conversation; which roles make sense is the template's matter."""
    if not turns:
        yield InvalidRequest(field, "must hold at least one message")
    yield from _at_most(field, len(turns), MAX_TURNS, "messages")
    for index, turn in enumerate(turns):
        if not _ROLE.fullmatch(turn.role):
            yield InvalidRequest(f"{field}[{index}].role", "must be a role like system, user or assistant")


def token_ids(field: str, ids: Collection[int], vocabulary: int) -> Wrong:
    """Every id must be in the vocabulary: an id out of it would read past the embedding. Names the first."""
    if ids and (max(ids) >= vocabulary or min(ids) < 0):
        index, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocabulary)
        yield InvalidRequest(
            f"{field}[{index}]",
            f"token id {token} is outside the vocabulary of {vocabulary}",
            metadata={"vocabulary": str(vocabulary)},
        )


def check_token_ids(field: str, ids: Collection[int], vocabulary: int) -> None:
    """Raise what `token_ids` finds."""
    check(token_ids(field, ids, vocabulary))


def check_suppressed(suppressed: Collection[int], limits: ServerLimits) -> None:
    """The tokens forbidden until `min_tokens` are there must leave at least one to draw."""
    if sum(token < limits.vocabulary for token in suppressed) >= limits.vocabulary:
        raise InvalidRequest("stopping.min_tokens", "every token of the vocabulary would end the text")


def _input(call: GenerateCall, limits: ServerLimits) -> Wrong:
    given = [value for value in (call.text, call.token_ids, call.chat) if value is not None]
    if len(given) != 1:
        yield InvalidRequest("input", "exactly one of text, token_ids and chat must be set")
    elif call.text is not None and not call.text:
        yield InvalidRequest("text", "must not be empty")
    elif call.chat is not None:
        yield from chat("chat.messages", call.chat)
    elif call.token_ids is not None and not call.token_ids:
        yield InvalidRequest("token_ids.ids", "must not be empty")
    elif call.token_ids is not None:
        try:
            limits.fit_tokens(len(call.token_ids), call.max_tokens)
        except InvalidRequest as error:
            if error.field == "input" or _is_possible(call.max_tokens, limits):  # else its own rule names it
                yield error
        yield from token_ids("token_ids.ids", call.token_ids, limits.vocabulary)


def _is_possible(max_tokens: int | None, limits: ServerLimits) -> bool:
    return max_tokens is None or 1 <= max_tokens <= limits.context_tokens


def _sampling(call: GenerateCall, limits: ServerLimits) -> Wrong:
    sampling = call.sampling
    yield from _within("sampling.temperature", sampling.temperature, 0.0, 100.0, note="0 is greedy")
    yield from _within("sampling.top_p", sampling.top_p, 0.0, 1.0, open_low=True, note="1 or unset means off")
    yield from _within("sampling.min_p", sampling.min_p, 0.0, 1.0, note="0 or unset means off")
    yield from _within(
        "sampling.repetition_penalty",
        sampling.repetition_penalty,
        MIN_REPETITION_PENALTY,
        10.0,
        note="1 or unset means off",
    )
    for field in ("presence_penalty", "frequency_penalty"):
        yield from _within(f"sampling.{field}", getattr(sampling, field), -2.0, 2.0, note="0 or unset means off")
    yield from _within("sampling.top_k", sampling.top_k, 0, (1 << 32) - 1, note="0 or unset means off")
    yield from _within("sampling.seed", call.seed, 0, (1 << 64) - 1, note="unset means that the server draws one")
    yield from _within("sampling.n", call.n, 1, limits.max_choices, limit_name="max_choices")
    yield from _at_most("sampling.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS, "entries")
    yield from token_ids("sampling.logit_bias", sampling.logit_bias, limits.vocabulary)
    for token, bias in sampling.logit_bias.items():
        yield from _within(f"sampling.logit_bias[{token}]", bias, -100.0, 100.0)


def _stopping(call: GenerateCall, limits: ServerLimits) -> Wrong:
    max_tokens, stop = call.max_tokens, call.stop
    possible = _is_possible(max_tokens, limits)
    if max_tokens is not None and max_tokens < 1:
        yield InvalidRequest("stopping.max_tokens", f"{max_tokens} is out of range: must be at least 1")
    elif not possible:
        yield InvalidRequest(
            "stopping.max_tokens",
            f"{max_tokens} is out of range: must be at most the context of {limits.context_tokens}",
            metadata={"context_tokens": str(limits.context_tokens)},
        )
    most = max_tokens if possible and max_tokens is not None else limits.context_tokens
    yield from _within("stopping.min_tokens", stop.min_tokens, 0, most)
    strings = stop.stop_strings
    yield from _at_most(
        "stopping.stop_strings", len(strings), limits.max_stop_strings, "strings", name="max_stop_strings"
    )
    for index, text in enumerate(strings):
        if not text:
            yield InvalidRequest(f"stopping.stop_strings[{index}]", "must not be empty")
        yield from _at_most(f"stopping.stop_strings[{index}]", len(text), MAX_STOP_CHARS, "characters")
    yield from _at_most("stopping.stop_token_ids", len(stop.stop_token_ids), MAX_STOP_TOKENS, "ids")
    yield from token_ids("stopping.stop_token_ids", stop.stop_token_ids, limits.vocabulary)


def _response(call: GenerateCall, limits: ServerLimits) -> Wrong:
    for field in ("logprobs", "prompt_logprobs"):
        value = getattr(call.sampling, field)
        yield from _within(f"response.{field}", value, 0, limits.max_logprobs, limit_name="max_logprobs")


def _within(
    field: str,
    value: float | None,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    limit_name: str = "",
    note: str = "",
) -> Wrong:
    if value is None:
        return
    if math.isfinite(value) and (low < value if open_low else low <= value) and value <= high:
        return
    rule = f"must be {'over' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}"
    why = f"{value:g} is out of range: {rule}" + (f"; {note}" if note else "")
    yield InvalidRequest(field, why, metadata={limit_name: f"{high:g}"} if limit_name else None)


def _at_most(field: str, count: int, limit: int, what: str, *, name: str = "limit") -> Wrong:
    if count > limit:
        yield InvalidRequest(field, f"{count} {what}, and {limit} are allowed", metadata={name: str(limit)})
