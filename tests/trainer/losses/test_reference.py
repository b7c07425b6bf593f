"""The precomputed reference: what goes in comes out, for the unit it belongs to."""

from __future__ import annotations

import pytest
import torch

from loramux_trainer.losses.reference import PrecomputedReference

CPU = torch.device("cpu")


def _filled() -> PrecomputedReference:
    reference = PrecomputedReference([2, 1, 2])
    reference.put(2, [torch.tensor([-1.0, -2.0]), torch.tensor([-4.0])])
    reference.put(0, [torch.tensor([-8.0]), torch.tensor([-16.0, -16.0])])
    return reference


def test_rows_come_back_in_the_order_of_the_units_asked_for() -> None:
    assert torch.cat(_filled().of([2, 0], CPU)).tolist() == [-3.0, -4.0, -8.0, -32.0]
    assert {row.shape for row in _filled().of([2, 0], CPU)} == {(1,)}
    assert torch.cat(_filled().of([1], CPU)).isnan().tolist() == [True]  # was not put


def test_what_cannot_be_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="unit 1 has 1 rows, not 2"):
        _filled().put(1, [torch.zeros(1)] * 2)
    with pytest.raises(ValueError, match="unit 1 are not finite"):
        _filled().put(1, [torch.tensor([torch.nan])])
