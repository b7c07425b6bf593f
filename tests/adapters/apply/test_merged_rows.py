"""From how many rows on a merged adapter has a product of its own beside others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loramux_adapters.apply import merged_rows
from loramux_adapters.apply.inject import AdaptedModel, inject
from loramux_adapters.base.load import load_base
from support.checkpoints import save_checkpoint, wide_model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    checkpoint = save_checkpoint(wide_model("llama"), tmp_path_factory.mktemp("base"))
    return inject(load_base(checkpoint, compute_dtype=torch.float32), capacity=8)


# Seconds of the frozen product by rows, and of the dense one by rows.
MACHINES: dict[str, tuple[Callable[[int], float], Callable[[int], float], int | None]] = {
    "a row costs alike": (lambda rows: 1 + rows, lambda rows: 1 + rows, None),
    "many rows of codes are dear": (lambda rows: rows * rows, lambda rows: 100 + rows, 32),
    "very many": (lambda rows: 1 + 2 * rows, lambda rows: 200 + rows, 512),
    "dense is dear": (lambda rows: rows, lambda rows: 3 * rows, None),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_two_products_must_cost_less_than_one(
    machine: str, adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_cost, dense_cost, expected = MACHINES[machine]
    product = merged_rows._measured(adapted)
    assert product is not None

    def seconds(run: Callable[[], torch.Tensor], _device: torch.device) -> float:
        used: list[str] = []
        monkeypatch.setattr(product, "forward", lambda x: used.append("frozen") or x)
        rows = len(run())
        return frozen_cost(rows) if used else dense_cost(rows)

    monkeypatch.setattr(merged_rows, "_seconds", seconds)
    assert merged_rows.measure_merged_rows(adapted) == expected


def test_it_is_measured_here(adapted: AdaptedModel) -> None:
    assert merged_rows.measure_merged_rows(adapted) in (None, 32, 128, 512)
