"""Plans: straight lines through trials, the work of all jobs, and a plan beside what its run took."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramux_trainer.errors import JobInvalid
from loramux_trainer.job_file import read_job_file
from loramux_trainer.planning.apart import TrialFailed
from loramux_trainer.planning.plan import in_process, make_plan, plan_from
from loramux_trainer.planning.record import Taken, add_taken, plan_path, write_plan
from loramux_trainer.planning.trial import Request, Trial, shortened
from loramux_trainer.planning.work import Work
from support.training import job_values

GIB = 1 << 30


def trial(layers: int) -> Trial:
    """What grows with the layers, over what does not."""
    return Trial(
        layers=layers,
        process=GIB,
        loaded=GIB + layers * 100,
        load_peak=2 * GIB + layers * 300,
        peak=GIB + layers * 10_000_000,
        load_seconds=1 + layers,
        step_seconds=0.1 * layers,
        step_tokens=50,
        eval_seconds=0.01 * layers,
        eval_tokens=10,
    )


def test_what_grows_with_layers_grows_in_a_straight_line() -> None:
    plan = plan_from([trial(1), trial(5)], 32, Work(7, 5000, 300), "cpu", 3 * GIB)
    assert (plan.process, plan.base) == (GIB, 3200)
    assert (plan.loading, plan.training) == (2 * GIB + 9600, GIB + 320_000_000)
    assert plan.peak == plan.loading
    assert plan.load_seconds == pytest.approx(33)
    assert plan.train_seconds == pytest.approx(3.2 / 50 * 5000)
    assert plan.eval_seconds == pytest.approx(0.32 / 10 * 300)
    assert plan.seconds == pytest.approx(33 + 320 + 9.6)
    assert plan.measured_layers == (1, 5)
    assert plan.fits
    assert not plan_from([trial(1), trial(5)], 32, Work(7, 5000, 300), "cpu", 2 * GIB).fits


def test_a_small_base_is_measured_whole_and_without_evaluation() -> None:
    whole = replace(trial(4), eval_tokens=0, eval_seconds=0.0)
    plan = plan_from([whole], 4, Work(7, 5000, 0), "cpu", GIB)
    assert (plan.training, plan.eval_seconds) == (whole.peak, 0.0)


def _write(tmp_path: Path, **more: Any) -> Path:
    values = {**job_values(tmp_path), **more}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_work_is_that_of_all_jobs(tmp_path: Path) -> None:
    asked: list[Request] = []

    def measure(request: Request) -> Trial:
        asked.append(request)
        return trial(request.layers)

    one = make_plan(_write(tmp_path), measure=measure)
    jobs = [{"name": "a"}, {"name": "b", "training": {"max_steps": 12}}]
    both = make_plan(_write(tmp_path, jobs=jobs), measure=measure)
    assert (one.steps, both.steps) == (6, 18)
    assert both.tokens == pytest.approx(3 * one.tokens, abs=2)
    assert [request.layers for request in asked] == [one.layers, one.layers]
    assert one.free > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"eval_fraction": 0}},
        {"training": {"lr_scheduler_type": "constant", "warmup_steps": None}},
        {"training": {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": 4}, "warmup_steps": 2}},
        {"training": {"max_steps": None, "num_train_epochs": 2, "early_stopping_patience": 1}},
        {"method": "adalora", "adalora": {"tinit": 2, "tfinal": 2}},
        {"jobs": [{"name": f"r{rank}", "lora": {"rank": rank}} for rank in (2, 8, 4)], "fleet": {"max_members": 2}},
        {"sweep": {"parameters": {"lora.rank": [2, 8]}, "successive_halving": {"min_steps": 2}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_jobs_of_every_kind_are_cut_short(changes: dict[str, Any], tmp_path: Path) -> None:
    values = job_values(tmp_path)
    merged = dict(changes)
    for section in changes.keys() & values.keys():
        both = {**values[section], **changes[section]}
        merged[section] = {key: value for key, value in both.items() if value is not None}
    short = shortened(read_job_file(_write(tmp_path, **merged)), "base", tmp_path / "scratch")
    assert {job.training.max_steps for job in short.jobs} == {3}
    assert {job.model for job in short.jobs} == {"base"}
    assert len(short.jobs) == (2 if "jobs" in changes or "sweep" in changes else 1)
    if "jobs" in changes:
        assert [job.lora.rank for job in short.jobs] == [8, 4]
    assert all(job.output.is_dir() for job in short.jobs)


def test_what_cannot_be_planned_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match="only jobs with engine: fleet"):
        make_plan(_write(tmp_path, engine="trl"))
    with pytest.raises(JobInvalid, match=r"data\.train"):
        make_plan(_write(tmp_path, data={"train": "absent.jsonl"}))


def test_a_trial_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match=r"a trial on 2 layers of the base failed: cannot read .*absent\.yaml"):
        in_process(Request(str(tmp_path / "absent.yaml"), str(tmp_path), 2))


def test_a_plan_is_kept_for_its_own_jobs(tmp_path: Path) -> None:
    path = _write(tmp_path)
    file = read_job_file(path)
    assert add_taken(path, file, Taken(5, 1.0)) is None  # there is none
    assert write_plan(path, file, {"peak": 4, "seconds": 2.0}) == plan_path(path) == tmp_path / "job.plan.json"
    assert add_taken(path, file, Taken(5, 1.0)) == {"peak": 4, "seconds": 2.0}
    assert json.loads(plan_path(path).read_text())["taken"] == {"peak": 5, "seconds": 1.0}
    other = read_job_file(_write(tmp_path, lora={"rank": 3}))
    assert add_taken(path, other, Taken(6, 1.0)) is None
    assert json.loads(plan_path(path).read_text())["taken"]["peak"] == 5
    for damaged in ("", "{", "[]", "{}", '{"plan": 3}', '{"plan": {}, "jobs": ""}'):
        plan_path(path).write_text(damaged)
        assert add_taken(path, file, Taken(5, 1.0)) is None
        assert plan_path(path).read_text() == damaged


def _train(path: Path, *more: str) -> str:
    command = [sys.executable, "-m", "loramux.cli.main", "train", str(path), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_peak_of_a_run_is_the_one_that_was_planned(tmp_path: Path) -> None:
    path = _write(tmp_path)
    said = _train(path, "--plan")
    assert "measured on 4 of 4 layers; 6 steps" in said
    assert not (tmp_path / "out").exists()
    assert "(planned " in _train(path)
    kept = json.loads(plan_path(path).read_text())
    assert kept["taken"]["peak"] == pytest.approx(kept["plan"]["peak"], rel=0.15)
    report = json.loads((tmp_path / "out" / "train_report.json").read_text())
    assert report["peak_bytes"] == pytest.approx(kept["plan"]["peak"], rel=0.15)
