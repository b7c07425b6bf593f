"""The bench of training: its workloads, what is compared with what, and the smallest form of each, run whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux.bench import main, train_bench
from loramux.bench.driver import DriverFailed
from loramux.bench.main import BenchOptions, run
from loramux.bench.shapes import get_shape
from loramux.bench.train_bench import PEFT, StepSample, compared, measure_count, summarize_speed, systems_of
from loramux.bench.train_workload import Cell, CountWorkload, SpeedWorkload, find_training
from loramux.bench.workload import WorkloadInvalid, shipped, shipped_training
from loramux_adapters.embedded.tiny import TINY_NAME


def _speed(name: str = "train-tiny") -> SpeedWorkload:
    workload = find_training(name)
    assert isinstance(workload, SpeedWorkload)
    return workload


def test_shipped_workloads_of_training_are_valid_and_no_other_is_one() -> None:
    assert {"train-125m", "train-loramux-tiny", "count-loramux-tiny"} < set(shipped_training())
    for name in shipped_training():
        workload = find_training(name)
        assert workload is not None
        assert workload.name == name
        assert workload.shape == TINY_NAME or get_shape(workload.shape)
    assert not any(find_training(name) for name in shipped())
    asked = _speed("train-125m")
    assert (asked.members, asked.tokens, asked.threads, asked.rank) == ((1, 4, 8, 16), (32, 128), (1, 2), 16)
    counted = find_training("count-loramux-tiny")
    assert isinstance(counted, CountWorkload)
    assert (counted.members, counted.rank) == (256, 8)


def test_a_wrong_workload_of_training_names_its_key(tmp_path: Path) -> None:
    file = tmp_path / "w.toml"
    file.write_text('name = "x"\nshape = "tiny"\nmembers = []\ntokens = [8]\nthreads = [0]\nrounds = 1\nspeed = 1\n')
    with pytest.raises(WorkloadInvalid, match=r"members(.|\n)*threads(.|\n)*speed: unknown key"):
        find_training(str(file))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address": "127.0.0.1:1"}, "--address"),
        ({"profile_step": True}, "--profile-step"),
        ({"dtype": "float32"}, "--dtype"),
        ({"drivers": ("engine", "grpc")}, "--driver grpc"),
        ({"drivers": ("peft",)}, "--driver peft alone"),
        ({"workload": "count-loramux-tiny", "rounds": 2}, "--rounds"),
    ],
)
def test_an_option_without_effect_on_training_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    options = replace(BenchOptions("train-tiny", ("engine",), cache=tmp_path, out=tmp_path), **changes)
    with pytest.raises(WorkloadInvalid, match=f"{words} has no effect"):
        run(options, lambda message: None)


def test_each_fleet_is_compared_with_ours_of_the_same_products_and_with_peft() -> None:
    names = [(one.name, other.name) for one, other in compared(systems_of(_speed(), peft=True))]
    assert names == [
        ("fleet", "one by one"),
        ("fleet", "PEFT"),
        ("fleet, bfloat16 products", "one by one, bfloat16 products"),
        ("fleet, bfloat16 products", "PEFT"),
    ]
    alone = replace(_speed(), frozen_products=("float32",))
    assert [other.name for _, other in compared(systems_of(alone, peft=False))] == ["one by one"]


def test_ratios_are_of_one_round_by_the_clock_that_fits_the_threads() -> None:
    systems = systems_of(replace(_speed(), frozen_products=("float32",)), peft=True)
    fleet, alone = systems[:2]
    samples = []
    for number, (wall, processor) in enumerate(((1.0, 2.0), (2.0, 5.0), (4.0, 40.0))):
        for threads in (1, 2):
            cell = Cell(threads, 8, 4)
            samples.append(StepSample(fleet, cell, number, 32, 1.0, 1.0))
            samples += [StepSample(other, cell, number, 32, wall, processor) for other in (alone, PEFT)]
    one, two = summarize_speed(samples, systems)
    assert one.rates == {"fleet": 32.0, "one by one": 6.4, "PEFT": 6.4}
    ratio, other = one.ratios["fleet", "one by one"], two.ratios["fleet", "PEFT"]
    assert (ratio.median, ratio.low, ratio.high) == (5.0, 2.0, 40.0)
    assert (other.median, other.low, other.high) == (2.0, 1.0, 4.0)


@pytest.mark.slow
def test_the_smallest_form_runs_with_all_systems(tmp_path: Path) -> None:
    said: list[str] = []
    results = run(BenchOptions("train-tiny", ("engine", "peft"), cache=tmp_path, out=tmp_path), said.append)
    values = json.loads(json.dumps(results.values))
    assert [(cell["tokens"], cell["members"]) for cell in values["summary"]] == [(8, 1), (8, 3)]
    systems = ["fleet", "one by one", "fleet, bfloat16 products", "one by one, bfloat16 products", "PEFT"]
    assert all(list(cell["rates"]) == systems and min(cell["rates"].values()) > 0 for cell in values["summary"])
    assert len(values["rounds"]) == 2 * len(systems)  # the round that warms up is not there
    assert values["machine"]["cpu"] in results.page
    assert "fleet / PEFT" in results.page
    assert any(line.startswith("warm-up: ") for line in said)


@pytest.mark.slow
def test_a_fleet_that_grows_is_counted_against_one_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountWorkload("few", "tiny", members=5, admitted=2, tokens=8, steps=2, threads=1, seed=1, rank=2)
    monkeypatch.setattr(main, "find_training", lambda _: counted)
    results = run(BenchOptions("few", ("engine",), cache=tmp_path, out=tmp_path), lambda message: None)
    one, five = results.values["fleets"]
    assert [step["stepped"] for step in one["steps"]] == [1, 1]
    assert [step["stepped"] for step in five["steps"]] == [2, 4, 5, 5]
    assert one["peak_bytes"] > 2**26
    assert "| 5 | 4 | 2, 4, 5, 5 |" in results.page


def test_members_that_take_no_step_fail_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def ask(self, question: dict[str, Any]) -> dict[str, Any]:
            return {"steps": [{"stepped": 0}], "peak_bytes": None}

        def close(self) -> None:
            pass

    monkeypatch.setattr(train_bench, "Peer", Lazy)
    counted = CountWorkload("few", "tiny", members=2, admitted=2, tokens=8, steps=1, threads=1, seed=1)
    with pytest.raises(DriverFailed, match="0 of 1 members"):
        measure_count(counted, tmp_path, tmp_path, lambda message: None)
