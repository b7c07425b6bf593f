"""A part held out: by record, so that nothing of a record is on both sides."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, reject
from hypothesis import strategies as st

from loramux_trainer.data.dataset import part
from loramux_trainer.errors import DataInvalid
from loramux_trainer.schema.data_config import DataConfig

RECORDS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), min_size=2, max_size=25)


@given(RECORDS, st.floats(0.05, 0.9), st.integers(0, 5), st.booleans())
def test_no_record_and_no_copy_is_on_both_sides(
    records: list[list[int]], fraction: float, seed: int, keep_duplicates: bool
) -> None:
    job = DataConfig(Path("train.jsonl"), eval_fraction=fraction, keep_duplicates=keep_duplicates)
    try:
        sides = part(records, None, job, seed)
    except DataInvalid:  # all that there is would be held out
        reject()
    train, held = set(sides.train), set(sides.held)
    assert held
    assert not train & held
    assert train | held == {unit for units in records for unit in units}
    for units in records:
        assert set(units) <= train or set(units) <= held, units
    assert part(records, None, job, seed) == sides


def test_records_of_one_example_are_split_as_they_were_before_there_were_several() -> None:
    """Checkpoints go on with the same training set."""
    units = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    job = DataConfig(Path("train.jsonl"), eval_fraction=0.3, keep_duplicates=True)
    distinct = list(dict.fromkeys(units))
    random.Random("split/7").shuffle(distinct)
    held = distinct[: round(0.3 * len(distinct))]
    sides = part([[unit] for unit in units], None, job, 7)
    assert list(sides.held) == held
    assert list(sides.train) == [unit for unit in units if unit not in held]
