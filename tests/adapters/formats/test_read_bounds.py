"""What a stranger's config may ask for before anything is computed."""

from __future__ import annotations

import pytest

from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.module_tuner import check_rank
from loramux_adapters.formats.peft.positions import Drawn


def test_positions_that_torch_draws_otherwise_are_refused() -> None:
    """From 0xFFFFFFFF // 20 on: measured with torch 2.13, equal at 214,748,300 and different at 230,000,000."""
    assert len(Drawn(777, "random_loc_seed").of(214_748_300, 3)) == 3
    with pytest.raises(AdapterInvalid, match="random_loc_seed"):
        Drawn(777, "random_loc_seed").of(0xFFFFFFFF // 20, 3)


def test_a_rank_that_takes_no_rank_rows_is_bounded_too() -> None:
    check_rank(512, ReadLimits())
    with pytest.raises(AdapterIncompatible, match="r 513 is over this server's limit of 512"):
        check_rank(513, ReadLimits())
