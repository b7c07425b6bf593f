"""Row-invariant products are what deterministic mode rests on: measured here on every machine that runs the tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loramux_adapters.kernels import invariant
from support.invariance import check_linear, check_reference
from support.processes import run_in_threads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
def test_a_row_does_not_depend_on_its_neighbors(dtype: torch.dtype) -> None:
    check_linear(dtype)


@DTYPES
def test_nor_does_a_low_rank_delta(dtype: torch.dtype) -> None:
    check_reference(dtype)


def test_with_two_threads() -> None:
    run_in_threads(2, "from support.invariance import main; main()")


def test_it_is_the_linear_map() -> None:
    torch.manual_seed(0)
    for rows in (1, 5, 32, 100):
        x, weight, bias = torch.randn(rows, 96), torch.randn(64, 96), torch.randn(64)
        torch.testing.assert_close(invariant.linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(invariant.linear(x, weight), F.linear(x, weight))


def test_inputs_of_any_stride() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(96, 5).T, torch.randn(96, 64).T
    torch.testing.assert_close(invariant.linear(x, weight), x @ weight.T)
