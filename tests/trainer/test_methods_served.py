"""Every method and initialization on three architectures: trained in one fleet, exported, loaded by PEFT, served.

PEFT on the dequantized base (for bottlenecks the reference of AdapterHub's package) says what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from loramux_trainer.errors import JobInvalid
from support.method_rows import NAMES, REFUSED, jobs_of
from support.method_table import documented, row_names
from support.trained_methods import Row, Trained, job_of, measure, save_base, train_rows
from support.training import train_together

BOUND = 2e-5
"""Largest logit difference over the logits' standard deviation; 3e-6 was measured."""
ROWS = [(architecture, name) for architecture in NAMES for name in jobs_of(architecture)]
Measured = Callable[[str], tuple[Trained, dict[str, Row]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Of an architecture, once: one fleet trains all of its rows, one batch serves them."""

    @cache
    def of(architecture: str) -> tuple[Trained, dict[str, Row]]:
        trained = train_rows(architecture, tmp_path_factory.mktemp(architecture))
        return trained, measure(trained)

    return of


@pytest.mark.parametrize(("architecture", "name"), ROWS, ids=[f"{each}: {name}" for each, name in ROWS])
def test_training_peft_and_serving_say_the_same(measured: Measured, architecture: str, name: str) -> None:
    row = measured(architecture)[1][name]
    assert row.moved > 100 * BOUND
    assert max(row.training, row.alone, row.mixed) < BOUND
    assert row.same_tokens


@pytest.mark.parametrize("architecture", NAMES)
def test_no_two_rows_say_the_same(measured: Measured, architecture: str) -> None:
    """Otherwise what a job asks for may have had no effect, or a row of the batch may have been its neighbor's."""
    rows = measured(architecture)[1]
    for one, other in combinations(rows, 2):
        apart = (rows[one].first - rows[other].first).abs().max() / rows[one].first.std()
        assert float(apart) > 10 * BOUND, (one, other)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_no_initialization_moves_the_model(architecture: str, tmp_path: Path) -> None:
    """Of steps without a length: of maps that are stored transposed, with trained biases and at the head too."""
    still = {"learning_rate": 1e-30}
    rows = {name: {**row, "training": still} for name, row in jobs_of(architecture).items() if "init" in name}
    for name, row in measure(train_rows(architecture, tmp_path, rows)).items():
        assert row.moved < BOUND, name


@pytest.mark.parametrize("architecture", NAMES)
def test_the_base_stays_as_it_was(measured: Measured, architecture: str) -> None:
    prints = measured(architecture)[0].fingerprints
    assert len(prints["before"]) == 1
    assert all(each == prints["before"] for each in prints.values()), prints


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_meaning_is_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    architecture, row, field, says = REFUSED[what]
    base = save_base(architecture, tmp_path)
    with pytest.raises(JobInvalid, match=says) as refused:
        train_together([job_of(base, "refused", row, tmp_path)])
    assert refused.value.field == field
    assert not (tmp_path / "refused").exists()


def test_the_documentation_has_these_rows() -> None:
    table = documented()
    assert list(table) == row_names()
    for name, cells in table.items():
        for architecture in NAMES:
            assert bool(cells[architecture]) == (name in jobs_of(architecture)), (name, architecture)
