"""Bounds: contradictions are found when they are made, what can never fit is refused with the limit."""

from __future__ import annotations

import pytest

from loramux_server.errors import InvalidRequest
from support.scheduler_harness import limits, submission


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_blocks": 0}, "kv_blocks must be at least 1"),
        ({"block_tokens": -1}, "block_tokens must be at least 1"),
        ({"max_queued": -1}, "max_queued must be at least 0"),
        ({"max_batch_tokens": 7}, "raise it to 8 or lower max_running"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, int], words: str):
    with pytest.raises(ValueError, match=words):
        limits(**changes)


@pytest.mark.parametrize(("prompt", "output", "fits"), [(16, 1, True), (10, 7, True), (10, 8, False), (17, 0, False)])
def test_the_last_token_needs_no_room(prompt: int, output: int, fits: bool):
    bounds = limits(kv_blocks=4)
    what = submission(prompt=prompt, max_tokens=output)
    if fits:
        bounds.check_fits(what)
        return
    with pytest.raises(InvalidRequest) as caught:
        bounds.check_fits(what)
    assert caught.value.metadata == {"kv_cache_tokens": "16", "prompt_tokens": str(prompt)}
    assert caught.value.field == ("input" if prompt > 16 else "stopping.max_tokens")


def test_an_empty_prompt_and_too_many_choices_are_refused():
    bounds = limits(max_queued=2)
    with pytest.raises(InvalidRequest, match="no tokens"):
        bounds.check_fits(submission(prompt=[]))
    bounds.check_fits(submission(n=10))
    with pytest.raises(InvalidRequest, match="11 choices"):
        bounds.check_fits(submission(n=11))
