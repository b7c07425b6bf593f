"""Rules of fields, judged without a server, value by value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.store.checks import check_labels
from loramux_server.api import validate
from loramux_server.api.calls import ChatTurn, GenerateCall, ResponseOptions
from loramux_server.api.server_limits import ServerLimits
from loramux_server.errors import InvalidRequest
from loramux_server.requests import SamplingParams, StopConditions

LIMITS = ServerLimits(
    context_tokens=128,
    max_batch_tokens=64,
    max_running=8,
    max_queued=16,
    kv_tokens=96,
    max_rank=64,
    max_adapter_bytes=1 << 20,
    adapter_device_bytes=1 << 20,
    vocabulary=64,
    max_choices=4,
    max_logprobs=5,
    max_stop_strings=3,
)
GOOD = GenerateCall(text="hi")


_BESIDE = ("n", "seed", "max_tokens")  # on the wire within the groups


def _with(sampling: Mapping[str, Any] = MappingProxyType({}), stop: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """GOOD with these fields."""
    given = {**sampling, **stop}
    groups = [{key: value for key, value in group.items() if key not in _BESIDE} for group in (sampling, stop)]
    return replace(
        GOOD,
        sampling=SamplingParams(**groups[0]),
        stop=StopConditions(**groups[1]),
        **{key: given[key] for key in _BESIDE if key in given},
    )


def _refused(call: GenerateCall) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        validate.check_generate(call, LIMITS)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"temperature": math.inf}, "sampling.temperature"),
        ({"temperature": -0.1}, "sampling.temperature"),
        ({"temperature": 100.5}, "sampling.temperature"),
        ({"top_p": math.nan}, "sampling.top_p"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.1}, "sampling.top_p"),
        ({"min_p": -1.0}, "sampling.min_p"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"repetition_penalty": math.inf}, "sampling.repetition_penalty"),
        ({"presence_penalty": 3.0}, "sampling.presence_penalty"),
        ({"frequency_penalty": -math.inf}, "sampling.frequency_penalty"),
        ({"n": 0}, "sampling.n"),
        ({"n": 1 << 31}, "sampling.n"),
        ({"seed": 1 << 64}, "sampling.seed"),
        ({"logit_bias": {1: math.nan}}, "sampling.logit_bias[1]"),
        ({"logit_bias": {1: 101.0}}, "sampling.logit_bias[1]"),
        ({"logit_bias": {64: 1.0}}, "sampling.logit_bias[0]"),
        ({"logit_bias": dict.fromkeys(range(2000), 0.0)}, "sampling.logit_bias"),
    ],
)
def test_invalid_sampling_is_refused(fields: dict[str, Any], path: str) -> None:
    assert _refused(_with(sampling=fields)).field == path


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"max_tokens": 129}, "stopping.max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "stopping.min_tokens"),
        ({"stop_strings": ("",)}, "stopping.stop_strings[0]"),
        ({"stop_strings": ("a", "b", "c", "d")}, "stopping.stop_strings"),
        ({"stop_strings": ("a", "b" * 257)}, "stopping.stop_strings[1]"),
        ({"stop_token_ids": (3, 64)}, "stopping.stop_token_ids[1]"),
        ({"stop_token_ids": (1,) * 1025}, "stopping.stop_token_ids"),
    ],
)
def test_invalid_stop_conditions_are_refused(fields: dict[str, Any], path: str) -> None:
    assert _refused(_with(stop=fields)).field == path


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_invalid_logprobs_are_refused(name: str) -> None:
    error = _refused(_with(sampling={name: 1_000_000}))
    assert (error.field, error.metadata) == (f"response.{name}", {"max_logprobs": "5"})


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    error = _refused(GenerateCall(token_ids=(1, 2, 64)))
    assert (error.field, error.metadata) == ("token_ids.ids[2]", {"vocabulary": "64"})


@pytest.mark.parametrize(
    ("call", "path"),
    [
        (GenerateCall(), "input"),
        (GenerateCall(text="a", token_ids=(1,)), "input"),
        (GenerateCall(text=""), "text"),
        (GenerateCall(token_ids=()), "token_ids.ids"),
        (GenerateCall(chat=()), "chat.messages"),
        (GenerateCall(chat=(ChatTurn("", "hi"),)), "chat.messages[0].role"),
        (GenerateCall(token_ids=(1,) * 128), "input"),
        (GenerateCall(token_ids=(1,) * 50, max_tokens=79), "stopping.max_tokens"),
        (GenerateCall(token_ids=(1,) * 50, max_tokens=48), "stopping.max_tokens"),
    ],
)
def test_invalid_inputs_are_refused(call: GenerateCall, path: str) -> None:
    assert _refused(call).field == path


def test_the_context_limit_is_in_the_metadata() -> None:
    with pytest.raises(InvalidRequest) as caught:
        LIMITS.fit_tokens(100, None)
    assert caught.value.metadata == {"kv_cache_tokens": "96", "prompt_tokens": "100"}
    with pytest.raises(InvalidRequest) as caught:
        LIMITS.fit_tokens(200, None)
    assert caught.value.metadata["context_tokens"] == "128"


@given(prompt=st.integers(1, 300), asked=st.none() | st.integers(1, 300))
def test_what_fits_is_never_over_a_limit_and_left_out_means_what_is_left(prompt: int, asked: int | None) -> None:
    room = min(LIMITS.context_tokens, LIMITS.kv_tokens + 1)
    try:
        got = LIMITS.fit_tokens(prompt, asked)
    except InvalidRequest:
        assert prompt + (asked or 1) > room
    else:
        assert got >= 1
        assert prompt + got <= room
        assert got == (room - prompt if asked is None else asked)


@pytest.mark.parametrize(
    ("prompt", "asked", "granted"),
    [(10, None, 23), (32, None, 1), (33, None, 64), (10, 40, 40)],  # the last token's KV is never written
)
def test_what_is_left_out_ends_at_a_longrope_bases_original_context(
    prompt: int, asked: int | None, granted: int
) -> None:
    limits = replace(LIMITS, original_context_tokens=32)
    assert limits.fit_tokens(prompt, asked) == granted


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a,b", "a\0b", "x" * 300, "\u202eabc", "", " a", "a b", ".a", "-a", "é", "a\n"]
)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        validate.check(validate.name("name", name))
    with pytest.raises(InvalidRequest):
        validate.check(validate.reference("adapter", f"{name}@{'a' * 8}"))


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ({"team/a_b.c-d": "x y"}, ""),
        ({"k": "v" * 256}, ""),
        ({"k": "v" * 257}, "printable"),
        ({"k": "a\nb"}, "printable"),
        ({"": "x"}, "the key must be 1 to 63"),
        ({"_a": "x"}, "a letter or digit first"),
        ({"\u202e": "x"}, r"'\\u202e'.*the key must be"),
        ({f"k{n}": "" for n in range(65)}, "64"),
    ],
)
def test_the_api_and_the_store_judge_labels_alike(labels: dict[str, str], why: str) -> None:
    if not why:
        validate.check(validate.labels("set_labels", labels))
        check_labels(labels)
        return
    with pytest.raises(InvalidRequest, match=why):
        validate.check(validate.labels("set_labels", labels))
    with pytest.raises(AdapterInvalid, match=why):
        check_labels(labels)


@pytest.mark.parametrize("reference", ["a@", "a@1234567", "a@XYZ45678", "a@" + "0" * 65, "a@b@12345678"])
def test_invalid_versions_are_refused(reference: str) -> None:
    with pytest.raises(InvalidRequest):
        validate.check(validate.reference("adapter", reference))


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "a\n", "é"])
def test_request_ids(request_id: str) -> None:
    assert _refused(replace(GOOD, request_id=request_id)).field == "request_id"


def test_what_is_within_bounds_passes() -> None:
    validate.check_generate(
        GenerateCall(
            request_id="r-1",
            adapter="german@0123abcd",
            chat=(ChatTurn("user", "hi"),),
            sampling=SamplingParams(0.0, 1.0, 0, 1.0, 10.0, -2.0, 2.0, {63: -100.0}, logprobs=5, prompt_logprobs=0),
            stop=StopConditions(64, ("a", "b", "c"), True, (0, 63), ignore_eos=True),
            response=ResponseOptions(True, True),
            n=4,
            seed=(1 << 64) - 1,
            max_tokens=64,
            priority=-5,
            cache_salt="s",
        ),
        LIMITS,
    )


@pytest.mark.parametrize(
    ("call", "field", "why"),
    [
        ({"adapter": "a", "adapters": (("b", 1.0),)}, "adapters", "give either adapter or adapters"),
        ({"adapters": (("b", 1.0),) * 17}, "adapters", "17 adapters together"),
        ({"adapters": (("b", 1.0), ("", 1.0))}, "adapters[1].adapter", "must be 1 to 64 letters"),
        ({"adapters": (("b@12", 1.0),)}, "adapters[0].adapter", "after @ there must be"),
        *(
            (
                {"adapters": (("b", 1.0), ("c", weight))},
                "adapters[1].weight",
                "must be from 1e-06 to 100, or as much below 0",
            )
            for weight in (0.0, 9e-7, math.nan, math.inf, -100.1)
        ),
    ],
)
def test_several_adapters_have_names_and_weights(call: dict[str, Any], field: str, why: str) -> None:
    refused = dict(_refused(replace(GOOD, **call)).violations)
    assert refused.keys() == {field}
    assert refused[field].startswith(why)


def test_several_adapters_are_allowed() -> None:
    validate.check_generate(replace(GOOD, adapters=tuple((f"a{index}", -100.0) for index in range(16))), LIMITS)
