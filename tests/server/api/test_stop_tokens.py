"""Stop strings that spell special tokens stop at the token; those that only hold one are refused."""

from __future__ import annotations

import pytest

from loramux_server.api.stop_tokens import resolve_stop_tokens
from loramux_server.errors import InvalidRequest
from loramux_server.requests import StopConditions

SPECIAL = {"<|im_end|>": 7, "<|im": 8, "\n": 9, "[PAD]": 64}


def test_a_string_that_spells_a_special_token_stops_at_it() -> None:
    asked = StopConditions(stop_strings=("<|im_end|>", "END"), stop_token_ids=(3,), min_tokens=5)
    resolved = resolve_stop_tokens(asked, SPECIAL, 64)
    assert resolved.stop_token_ids == (3, 7)
    # The string stays: ordinary tokens may spell it too.
    assert (resolved.stop_strings, resolved.min_tokens) == (asked.stop_strings, 5)


def test_a_token_that_the_model_cannot_make_is_no_stop_token() -> None:
    assert resolve_stop_tokens(StopConditions(stop_strings=("[PAD]",)), SPECIAL, 64).stop_token_ids == ()


@pytest.mark.parametrize("string", ["<|im_end|>\n", "a<|im_end|>"])
def test_a_string_that_only_holds_one_is_refused_with_the_token_named(string: str) -> None:
    with pytest.raises(InvalidRequest, match=r"give <\|im_end\|> alone") as refused:
        resolve_stop_tokens(StopConditions(stop_strings=("x", string)), SPECIAL, 64)
    assert refused.value.field == "stopping.stop_strings[1]"


def test_blank_special_tokens_are_ordinary_parts_of_strings() -> None:
    assert resolve_stop_tokens(StopConditions(stop_strings=("\n\nUser:",)), SPECIAL, 64).stop_token_ids == ()
    assert resolve_stop_tokens(StopConditions(stop_strings=("\n",)), SPECIAL, 64).stop_token_ids == (9,)
