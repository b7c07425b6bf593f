"""Where an activated LoRA begins to act: found in time of the lengths alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loramux_server.api.activation import find_activation
from loramux_server.errors import InvalidRequest
from support.timing import processor_seconds

FEW = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@given(st.lists(st.integers(0, 2), max_size=40), FEW)
def test_it_is_the_last_occurrence(prompt: list[int], invocation: list[int]) -> None:
    places = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)] == invocation]
    try:
        found = [find_activation(prompt, invocation)]
    except InvalidRequest:
        found = []
    assert found == places[-1:]


def test_prompts_and_invocations_made_for_each_other_hold_nobody_up() -> None:
    """Compared at every place, these took half a second of the event loop."""
    prompt = (7,) * 32_768
    with processor_seconds() as spent:
        for invocation in ((*prompt[:8192], 8), (8, *prompt[:8192])):
            try:
                find_activation(prompt, invocation)
            except InvalidRequest:
                continue
            raise AssertionError("found what is not there")
    assert spent.seconds < 0.25
