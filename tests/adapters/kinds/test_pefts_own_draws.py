"""What PEFT's files leave out and its code makes anew: positions from a seed, wavelets, block sizes, pattern keys."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.waveft.wavelet import Wavelet

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.boft import butterfly_order
from loramux_adapters.formats.peft.name_keys import DottedKeys
from loramux_adapters.formats.peft.oft import nearest_divisor
from loramux_adapters.formats.peft.positions import Drawn
from loramux_adapters.formats.peft.wavelets import daubechies

SEEDS = (0, 777, -1, -777, 2**31, 2**32 + 5, 2**63, 2**64 - 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 97, 128 * 192])
def test_positions_are_those_that_torch_draws(seed: int, size: int) -> None:
    whole = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    drawn = Drawn(seed, "n_frequency")
    for count in (1, size // 3, size, 2):
        if 1 <= count <= size:
            assert torch.equal(drawn.of(size, count), whole[:count]), count


def test_positions_do_not_change() -> None:
    """Files mean these; a new version of numpy or torch must not draw others."""
    drawn = Drawn(777, "n_frequency").of(4096 * 4096, 6)
    assert drawn.tolist() == [
        1374311,
        8240085,
        6766295,
        6474818,
        14786199,
        14783200,
    ]


@pytest.mark.parametrize("moments", range(1, 11))
def test_wavelets_are_pefts(moments: int) -> None:
    peft = torch.tensor(Wavelet(f"db{moments}").rec_lo, dtype=torch.float64)
    assert float((daubechies(moments) - peft).abs().max()) < 1e-11


@given(st.integers(1, 400), st.integers(1, 500))
def test_a_block_size_that_does_not_divide_is_moved_as_peft_moves_it(size: int, wanted: int) -> None:
    assert nearest_divisor(size, wanted) == OFTLayer.adjust_oft_parameters(None, size, wanted) or (
        size % wanted == 0 and nearest_divisor(size, wanted) == wanted
    )


@pytest.mark.parametrize(("size", "block", "factors"), [(64, 4, 5), (96, 8, 3), (64, 2, 1)])
def test_butterflies_have_pefts_order(size: int, block: int, factors: int) -> None:
    for factor in range(factors):
        blocks = size // block // 2**factor
        peft = BOFTLayer.block_butterfly_perm(None, size, blocks, block // 2, factors - 1)
        assert torch.equal(butterfly_order(size, block, factor), peft)


KEYS = ["q_proj", "self_attn.q_proj", "layers.0.mlp.down_proj", "down_proj|q_proj", ".*_proj", "h", "q.proj", "x"]
NAMES = ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "x", "h", "layers.1.self_attn.q_proj", "a.x", "ax"]


@given(st.permutations(KEYS), st.integers(0, len(KEYS)))
def test_dotted_keys_match_as_peft_matches_them(keys: list[str], count: int) -> None:
    found = DottedKeys(keys[:count], "pattern", RegexBudget(ReadLimits(regex_seconds=60.0)))
    for name in NAMES:
        expected = next((key for key in keys[:count] if re.match(rf".*\.{key}$", name)), name)
        assert found.find(name) == (expected if expected in keys[:count] else None), name
