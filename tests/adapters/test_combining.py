"""What one module's sum is made of: as few whole weights as can be."""

from __future__ import annotations

import torch

from loramux_adapters.combining import SummedWeights, _sum_weights
from loramux_adapters.formats.peft.extras import Replace
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.spec import ModuleSpec


def test_beside_other_weights_all_low_ranks_are_one() -> None:
    """Each share takes the module's whole weight anew while a step waits: sixteen adapters took five times as long."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        low_ranks = [LowRank(torch.randn(rank, 8), torch.randn(6, rank)) for rank in (1, 2, 4)]
        own, frozen = torch.randn(6, 8), torch.randn(6, 8)
    dense = Dense(Replace(own), 6, 8)
    weights = (0.5, -1.0, 2.0)
    contributions = [((dense,), 0.25), *(((part,), weight) for part, weight in zip(low_ranks, weights, strict=True))]
    change = _sum_weights(ModuleSpec("m", "linear", 8, 6, False), contributions).change
    assert isinstance(change, SummedWeights)
    assert len(change.shares) == 2
    expected = frozen + 0.25 * (own - frozen) + sum(w * p.b @ p.a for p, w in zip(low_ranks, weights, strict=True))
    torch.testing.assert_close(change.apply(frozen.clone()), expected)
