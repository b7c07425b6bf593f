"""The borders of a draw: the ends of the unit interval, the nucleus's edge, rows that failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from loramux_server.model.draw import SCALE, Filters, draw, filtered_weights

LAST = 1.0 - 2.0**-53


def always(number: float) -> Callable[[Sequence[int], int], list[float]]:
    return lambda rows, _: [number] * len(rows)


@pytest.mark.parametrize(("number", "token"), [(0.0, 2), (0.499, 2), (0.5, 4), (LAST, 4)])
def test_tokens_without_weight_are_never_drawn(number: float, token: int) -> None:
    logits = torch.full((1, 6), float("-inf"))
    logits[0, [2, 4]] = 1.0
    assert draw(logits, logits.amax(1), [Filters(1.0)], always(number)).tolist() == [token]


def test_a_total_beyond_the_precision_of_floats_keeps_the_last_number_inside() -> None:
    logits = torch.zeros(1, 150_000)  # total 1.6e17, above 2^53
    assert draw(logits, logits.amax(1), [Filters(1.0)], always(LAST)).tolist() == [149_999]


def test_a_token_on_the_edge_of_the_nucleus_is_out() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.log(2), -math.log(2)]])  # shares 2, 2, 1, 1 of 6
    weights, nucleus = filtered_weights(logits, logits.amax(1), [Filters(1.0, top_p=2 / 3)])
    assert weights.tolist() == [[SCALE, SCALE, SCALE // 2, SCALE // 2]]
    assert nucleus.tolist() == [2 * SCALE]
    for number in (0.0, 0.3, 0.6, 0.7, 0.9, LAST):
        assert draw(logits, logits.amax(1), [Filters(1.0, top_p=2 / 3)], always(number)).item() < 2
        assert draw(logits, logits.amax(1), [Filters(1.0, top_p=0.67)], always(number)).item() < 4
    assert draw(logits, logits.amax(1), [Filters(1.0, top_p=0.67)], always(LAST)).tolist() == [3]


def test_top_p_of_zero_keeps_the_likeliest() -> None:
    logits = torch.linspace(0, 1, 9)[None]
    for number in (0.0, LAST):
        assert draw(logits, logits.amax(1), [Filters(1.0, top_p=0.0)], always(number)).tolist() == [8]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("filters", [Filters(1.0), Filters(1.0, top_p=0.5, top_k=3, min_p=0.1)])
def test_a_failed_row_has_no_weight_and_stops_nobody(filters: Filters, bad: float) -> None:
    logits = torch.zeros(2, 8)
    logits[0] = bad
    best = torch.tensor([float("nan"), 0.0])
    weights, _ = filtered_weights(logits, best, [filters] * 2)
    assert weights[0].tolist() == [0] * 8
    assert draw(logits, best, [filters] * 2, always(0.5))[1].item() == 4
