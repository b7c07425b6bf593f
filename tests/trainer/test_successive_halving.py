"""Which runs of a sweep go on: examples, and what holds for all."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_trainer.errors import CheckpointInvalid
from loramux_trainer.halving import Halving, best_of
from loramux_trainer.halving_record import RECORD, HalvingRecord, record_of
from loramux_trainer.job_file import parse_job_file
from loramux_trainer.schema.sweep_config import HalvingConfig
from loramux_trainer.successive_halving import Rung, configuration_losses, ranked, rungs, survivors

NAMES = st.text("abc", min_size=1, max_size=3)
LOSSES = st.dictionaries(NAMES, st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.5, 1.0]))
POSITIVE = st.integers(1, 500)


def test_nine_candidates_by_three() -> None:
    assert rungs(9, 90, eta=3, min_steps=10) == (Rung(10, 3), Rung(30, 1))
    assert rungs(27, 90, eta=3, min_steps=10) == (Rung(10, 9), Rung(30, 3))
    assert rungs(5, 100, eta=2, min_steps=10) == (Rung(10, 2), Rung(20, 1))
    assert rungs(1, 100, eta=2, min_steps=10) == rungs(8, 10, eta=2, min_steps=10) == ()


def test_the_best_go_on_and_ties_are_by_name() -> None:
    losses = {"d": 1.0, "b": 1.0, "nan": math.nan, "c": 0.5, "down": -math.inf, "a": 2.0}
    assert ranked(losses) == ("c", "b", "d", "a", "down", "nan")
    assert survivors(losses, 2) == ("c", "b")
    assert survivors(losses, 5) == ("c", "b", "d", "a")


def test_seeds_count_together() -> None:
    configurations = {"a-0": "a", "a-1": "a", "b-0": "b", "b-1": "b"}
    losses = configuration_losses({"a-0": 1.0, "a-1": 2.0, "b-0": 0.1, "b-1": math.inf}, configurations)
    assert losses["a"] == 1.5
    assert survivors(losses, 2) == ("a",)


def test_a_configuration_of_which_a_seed_diverged_is_neither_kept_nor_the_best(tmp_path: Path) -> None:
    configurations = {"a-0": "a", "a-1": "a", "b-0": "b", "b-1": "b", "c-0": "c", "c-1": "c"}
    losses = {"a-0": 0.1, "b-0": 1.0, "b-1": 2.0, "c-0": 3.0, "c-1": 3.0}  # a-1 has diverged
    best = best_of(losses, configurations)
    assert best is not None
    assert (best.name, best.run, best.loss, best.next_name) == ("b", "b-0", 1.5, "c")
    record = HalvingRecord(tmp_path / "record.json", {})
    halving = Halving(HalvingConfig(2, 3), configurations, dict.fromkeys(configurations, 6), record)
    assert halving.decide(2, losses) == {
        "a-0": "step 2: eval loss 0.1000 counts for nothing, as another seed has none",
        "c-0": "step 2: eval loss 3.0000 was not enough",
        "c-1": "step 2: eval loss 3.0000 was not enough",
    }


@pytest.mark.parametrize("wrong", [{"eta": 1}, {"min_steps": 0}, {"candidates": 0}, {"total_steps": 0}])
def test_counts_that_mean_nothing_are_refused(wrong: dict[str, int]) -> None:
    values = {"candidates": 4, "total_steps": 10, "eta": 2, "min_steps": 1, **wrong}
    with pytest.raises(ValueError, match="at least"):
        rungs(values["candidates"], values["total_steps"], eta=values["eta"], min_steps=values["min_steps"])


@given(POSITIVE, POSITIVE, st.integers(2, 5), POSITIVE)
def test_rungs_narrow_within_the_steps(candidates: int, total: int, eta: int, min_steps: int) -> None:
    found = rungs(candidates, total, eta=eta, min_steps=min_steps)
    steps = [rung.step for rung in found]
    counts = [candidates, *(rung.survivors for rung in found)]
    assert all(later == eta * earlier for earlier, later in itertools.pairwise(steps))
    assert all(min_steps <= step < total for step in steps)
    assert all(1 <= later < earlier for earlier, later in itertools.pairwise(counts))
    assert counts[-1] == 1 or not found or steps[-1] * eta >= total
    # The rungs cost at most as much as letting all of them train to the end.
    spent, before = 0, 0
    for rung, count in zip(found, counts, strict=False):
        spent, before = spent + count * (rung.step - before), rung.step
    assert spent + counts[-1] * (total - before) <= candidates * total


@given(LOSSES, st.integers(1, 10), st.randoms(use_true_random=False))
def test_survivors_are_the_best_whatever_the_order(losses: dict[str, float], count: int, chance: random.Random) -> None:
    shuffled = list(losses.items())
    chance.shuffle(shuffled)
    found = survivors(losses, count)
    assert found == survivors(dict(shuffled), count)
    finite = {name for name, loss in losses.items() if math.isfinite(loss)}
    assert len(found) == min(count, len(finite))
    assert set(found) <= finite
    for kept in found:
        for lost in finite - set(found):
            assert (losses[kept], kept) < (losses[lost], lost)
    assert survivors(losses, count + 1)[: len(found)] == found
    assert sorted(ranked(losses)) == sorted(losses)


@given(st.dictionaries(NAMES, st.floats(0, 10), min_size=1), st.randoms(use_true_random=False))
def test_means_of_seeds_have_the_same_bits_in_every_order(losses: dict[str, float], chance: random.Random) -> None:
    configurations = {name: name[0] for name in losses}
    shuffled = list(losses.items())
    chance.shuffle(shuffled)
    means = configuration_losses(losses, configurations)
    assert means == configuration_losses(dict(shuffled), configurations)
    for configuration, mean in means.items():
        runs = [loss for name, loss in losses.items() if configurations[name] == configuration]
        assert min(runs) - 1e-9 <= mean <= max(runs) + 1e-9


def test_a_sweep_judged_on_other_data_is_another(tmp_path: Path) -> None:
    """A record of a version that did not keep it goes on."""
    evals = tmp_path / "eval.jsonl"
    evals.write_text('{"prompt": "a", "completion": "b"}\n')
    values = {
        "model": "loramux-tiny",
        "output": str(tmp_path / "out"),
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(evals)},
        "sweep": {"parameters": {"lora.rank": [2, 4]}, "successive_halving": {"min_steps": 2, "eta": 2}},
    }
    record_of(parse_job_file(values)).decide(2, {"lora.rank-2": "lost"})
    again = record_of(parse_job_file(values))
    again.read()
    assert again.is_decided(2)
    evals.write_text('{"prompt": "a", "completion": "c"}\n')
    with pytest.raises(CheckpointInvalid, match="is of another sweep"):
        record_of(parse_job_file(values)).read()
    file = tmp_path / "out" / RECORD
    earlier = json.loads(file.read_text())
    del earlier["sweep"]["evals"]
    file.write_text(json.dumps(earlier))
    record_of(parse_job_file(values)).read()
