"""Files of several jobs that are stopped in the middle: nothing is trained twice, nothing lost, and the same bytes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer import member_run
from loramux_trainer.errors import CheckpointInvalid, Interrupted, JobInvalid, OutputFailed
from loramux_trainer.finished import REPORT
from loramux_trainer.halving_record import RECORD
from loramux_trainer.run import FleetOutcome, train, train_file
from support.tiny import write_jsonl
from support.training import RECORDS, Watcher, job_file, job_values

WEIGHTS = "adapter_model.safetensors"
JOBS = [
    {"name": "short", "lora": {"rank": 2}, "training": {"max_steps": 2}},
    {"name": "long", "lora": {"rank": 4, "dropout": 0.2}},
    {"name": "late", "method": "ia3", "training": {"optimizer": "lion"}},
]
SWEEP = {
    "parameters": {"training.learning_rate": [1e-6, 1e-2], "lora.rank": [2, 8]},
    "successive_halving": {"min_steps": 2, "eta": 2},
}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return job_values(tmp_path)


def _bytes(outcome: FleetOutcome) -> dict[str, bytes]:
    return {name: (result.output / WEIGHTS).read_bytes() for name, result in outcome.results.items()}


def test_jobs_that_are_finished_are_taken_as_they_are(values: dict[str, Any], tmp_path: Path) -> None:
    whole = train_file(job_file({**values, "output": str(tmp_path / "whole")}, jobs=JOBS, fleet={"max_members": 2}))
    file = job_file(values, jobs=JOBS, fleet={"max_members": 2})
    first = Watcher(file, ("late", 2))
    with pytest.raises(Interrupted):
        train_file(file, progress=first, stop=first.event)
    assert first.states == {"short": "finished"}
    rest = Watcher(file)
    outcome = train_file(file, resume=True, progress=rest)
    assert rest.steps("short") == []
    assert rest.steps("long") == [5, 6]
    assert rest.steps("late") == [3, 4, 5, 6]
    assert "finished before" in rest.jobs["short"].warnings[0]
    assert _bytes(outcome) == _bytes(whole)
    assert outcome.results["short"].steps == 2
    again = Watcher(file)
    assert train_file(file, resume=True, progress=again).results == outcome.results
    assert again.states == dict.fromkeys(("short", "long", "late"), "finished")
    with pytest.raises(JobInvalid, match="already has an adapter"):
        train_file(file)


def test_a_finished_adapter_of_another_job_or_data_is_not_taken(values: dict[str, Any], tmp_path: Path) -> None:
    job = job_file(values, lora={"rank": 2}, training={**values["training"], "max_steps": 1}).jobs[0]
    result = train(job)
    assert train(job, resume=True) == result
    other = job_file(values, lora={"rank": 3}, training={**values["training"], "max_steps": 1}).jobs[0]
    with pytest.raises(JobInvalid, match=r"output: .*the adapter of another job \(lora\.rank: 2, not 3\)"):
        train(other, resume=True)
    write_jsonl(tmp_path / "train.jsonl", RECORDS[:20])
    with pytest.raises(JobInvalid, match=r"output: .*an adapter of other training data"):
        train(job, resume=True)
    (job.output / REPORT).write_text("{}")
    with pytest.raises(JobInvalid, match="already has an adapter"):
        train(job, resume=True)


@pytest.mark.parametrize("step", [2, 3])
def test_a_sweep_goes_on_with_those_that_were_left(values: dict[str, Any], tmp_path: Path, step: int) -> None:
    whole = train_file(job_file({**values, "output": str(tmp_path / "whole")}, sweep=SWEEP))
    file = job_file(values, sweep=SWEEP)
    best = whole.best
    assert best is not None
    first = Watcher(file, (best.run, step))
    with pytest.raises(Interrupted):
        train_file(file, progress=first, stop=first.event)
    rest = Watcher(file)
    outcome = train_file(file, resume=True, progress=rest)
    for name in rest.jobs:
        steps = first.steps(name) + rest.steps(name)
        assert steps == list(range(1, len(steps) + 1))  # none twice
    assert outcome.stopped == whole.stopped
    assert outcome.best == best
    assert _bytes(outcome) == _bytes(whole)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RECORD, *outcome.results}


@pytest.mark.usefixtures("one_thread")
def test_those_that_fell_behind_are_waited_for_at_a_rung(values: dict[str, Any], tmp_path: Path) -> None:
    """A run that is killed leaves checkpoints of different steps. In deterministic mode no byte tells of it, nor of the
    sweep: the winner is the job alone.
    """
    values["training"]["deterministic"] = True
    whole = train_file(job_file({**values, "output": str(tmp_path / "whole")}, sweep=SWEEP))
    file = job_file(values, sweep=SWEEP, checkpoint={"save_steps": 1, "save_total_limit": 9})
    best = whole.best
    assert best is not None
    first = Watcher(file, (best.run, 2))
    with pytest.raises(Interrupted):
        train_file(file, progress=first, stop=first.event)
    losers = [job for job in file.jobs if job.name in first.states]
    assert losers
    # As if it had been killed before the decision, with one job's last checkpoint not written.
    (tmp_path / "out" / RECORD).unlink()
    shutil.rmtree(tmp_path / "out" / best.run / "checkpoints" / "step-00000002")
    outcome = train_file(file, resume=True, progress=Watcher(file))
    assert outcome.stopped == whole.stopped
    assert outcome.best == best
    alone = train(replace(next(job for job in file.jobs if job.name == best.run), output=tmp_path / "alone"))
    assert _bytes(outcome) == _bytes(whole) == {best.run: (alone.output / WEIGHTS).read_bytes()}


def test_a_sweep_is_not_begun_over_nor_resumed_as_another(values: dict[str, Any], tmp_path: Path) -> None:
    file = job_file(values, sweep=SWEEP)
    first = Watcher(file, (file.jobs[-1].run_name, 2))
    with pytest.raises(Interrupted):
        train_file(file, progress=first, stop=first.event)
    for job in file.jobs:
        shutil.rmtree(job.output, ignore_errors=True)
    with pytest.raises(JobInvalid, match=rf"output: .* has the {RECORD} of another run; continue with --resume"):
        train_file(file)
    other = job_file(values, sweep={**SWEEP, "successive_halving": {"min_steps": 3, "eta": 2}})
    with pytest.raises(CheckpointInvalid, match=f"{RECORD} is of another sweep"):
        train_file(other, resume=True)
    (tmp_path / "out" / RECORD).write_text("{")
    with pytest.raises(CheckpointInvalid, match="cannot be read"):
        train_file(file, resume=True)


@pytest.mark.parametrize("what", ["write_checkpoint", "export"])
def test_an_output_that_fails_does_not_end_the_others(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = getattr(member_run, what)

    def fail(place: Path, *given: Any, **more: Any) -> Any:
        if "long" in place.parts:
            raise OSError(28, "No space left on device")
        return real(place, *given, **more)

    monkeypatch.setattr(member_run, what, fail)
    file = job_file(values, jobs=JOBS, checkpoint={"save_steps": 4})
    watcher = Watcher(file)
    outcome = train_file(file, progress=watcher)
    assert outcome.results.keys() == {"short", "late"}
    assert "No space left on device" in outcome.failures["long"]
    assert watcher.states["long"] == "failed"
    monkeypatch.undo()
    assert train_file(file, resume=True).results.keys() == {"short", "long", "late"}


def test_a_stop_saves_the_others_where_one_cannot_be(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = member_run.write_checkpoint

    def fail(root: Path, *given: Any, **more: Any) -> Path:
        if "long" in root.parts:
            raise OSError(28, "No space left on device")
        return real(root, *given, **more)

    monkeypatch.setattr(member_run, "write_checkpoint", fail)
    file = job_file(values, jobs=JOBS)
    watcher = Watcher(file, ("late", 4))
    with pytest.raises(OutputFailed, match="No space left"):
        train_file(file, progress=watcher, stop=watcher.event)
    assert (file.jobs[2].output / "checkpoints" / "step-00000004").exists()


def test_a_checkpoint_of_another_job_that_is_found_late_ends_that_job_only(values: dict[str, Any]) -> None:
    file = job_file(values, jobs=JOBS[:2], fleet={"max_members": 1})
    watcher = Watcher(file, ("long", 2))
    with pytest.raises(Interrupted):
        train_file(file, progress=watcher, stop=watcher.event)
    shutil.rmtree(file.jobs[0].output)
    jobs = [JOBS[0], {**JOBS[1], "lora": {"rank": 5}}]
    other = job_file(values, jobs=jobs, fleet={"max_members": 1})
    outcome = train_file(other, resume=True)
    assert outcome.results.keys() == {"short"}
    assert "lora.rank: 4, not 5" in outcome.failures["long"]


def test_a_late_mistake_names_its_job(values: dict[str, Any]) -> None:
    jobs = [{"name": "good"}, {"name": "bad", "lora": {"target_modules": ["nothing"]}}]
    with pytest.raises(JobInvalid, match=r"job bad: lora\.target_modules: nothing names no module"):
        train_file(job_file(values, jobs=jobs))
