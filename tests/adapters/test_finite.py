"""One pass finds what torch's own question finds."""

from __future__ import annotations

import math

import pytest
import torch

from loramux_adapters.finite import is_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 7, 64, 4097])
def test_one_wrong_value_is_found_wherever_it_is(dtype: torch.dtype, wrong: float, size: int) -> None:
    for place in {0, size // 2, size - 1}:
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert is_finite(tensor)
        tensor[place] = wrong
        assert not is_finite(tensor)
        assert not torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite_together(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert is_finite(torch.tensor([[most, -most], [most, most]], dtype=dtype))


def test_whole_numbers_and_nothing_are_finite() -> None:
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.tensor([-(2**63), 2**63 - 1]))


def test_rows_of_another_order_in_memory_count_too() -> None:
    tensor = torch.zeros(8, 6)
    tensor[5, 4] = math.nan
    assert not is_finite(tensor.T)
    assert not is_finite(tensor[::5, ::2])
    assert is_finite(tensor[::2, 1::2])
