"""Trackers: TensorBoard's own reader finds each step once, others get the calls of their packages, none ends a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loramux_trainer.errors import Interrupted, JobInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.job_file import parse_job_file
from loramux_trainer.run import train, train_file
from loramux_trainer.schema.tracking_config import TrackerName
from loramux_trainer.tracking import packages
from support.training import StopAt, Watcher, job_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


def _values(tmp_path: Path, *trackers: TrackerName, **more: Any) -> dict[str, Any]:
    return {**job_values(tmp_path), "tracking": {"report_to": list(trackers)}, **more}


def _scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(output / "logs"))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.mark.parametrize(("save_steps", "again"), [(2, [3, 4, 5, 6]), (200, [1, 2, 3, 4, 5, 6])])
def test_tensorboard_reads_each_step_once_also_after_a_resume(
    save_steps: int, again: list[int], tmp_path: Path
) -> None:
    """Steps behind the last checkpoint, or all without one, are taken and logged again: those of before are void."""
    values = _values(tmp_path, "tensorboard", checkpoint={"save_steps": save_steps})
    values["training"] |= {"eval_steps": 3}
    job = parse_job(values)

    class Killed(StopAt):
        def stepped(self, report: Any) -> None:
            super().stepped(report)
            if report.step == 4:
                raise RuntimeError("killed behind the step, before its checkpoint")

    with pytest.raises(RuntimeError, match="killed"):
        train(job, progress=Killed(10**9))
    assert [step for step, _ in _scalars(job.output)["train/loss"]] == [1, 2, 3]
    watch = StopAt(10**9)
    train(job, resume=True, progress=watch)
    found = _scalars(job.output)
    assert [report.step for report in watch.seen] == again
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["eval/loss"]] == [3, 6]
    assert {"train/learning_rate", "train/grad_norm", "train/num_tokens"} <= found.keys()
    last = watch.seen[-1]
    assert found["train/loss"][-1] == (6, pytest.approx(last.loss))
    assert found["train/learning_rate"][-1] == (6, pytest.approx(last.learning_rate))
    assert found["train/num_tokens"][-1] == (6, last.tokens)


def test_each_job_of_a_fleet_has_its_own_and_the_losss_metrics(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"prompt": "a", "chosen": "bcd", "rejected": "dcb"}\n' * 2
        + '{"prompt": "b", "chosen": "c", "rejected": "d"}\n'
    )
    jobs = [
        {"name": "plain"},
        {
            "name": "pairs",
            "loss": "dpo",
            "data": {"train": str(pairs), "eval_fraction": 0},
            "training": {"batch_size": 1},
        },
        {"name": "untracked", "tracking": {"report_to": "none"}},
    ]
    values = _values(tmp_path, "tensorboard", jobs=jobs)
    values["training"]["max_steps"] = 2
    file = parse_job_file(values)
    train_file(file, progress=Watcher(file))
    plain, dpo, untracked = (job.output for job in file.jobs)
    assert len(_scalars(plain)["train/loss"]) == 2
    assert "train/rewards/margins" in _scalars(dpo)
    assert not (untracked / "logs").exists()


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0
        self.ended += 1


def test_wandb_gets_a_run_of_the_jobs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the package: the calls are those of its documentation, the real one was not run here."""
    run, asked = FakeRun(), []
    module = SimpleNamespace(init=lambda **options: asked.append(options) or run, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    train(parse_job(_values(tmp_path, "wandb", name="mine")))
    assert [(options["project"], options["name"]) for options in asked] == [("loramux", "mine")]
    assert asked[0]["config"]["training"]["max_steps"] == 6
    assert [step for step, values in run.logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    assert run.ended == 1


class FakeClient:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def get_experiment_by_name(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("run", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_param(self, run: str, key: str, value: str) -> None:
        assert len(value) <= 500

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.calls.append((key, step))

    def set_terminated(self, run: str, status: str) -> None:
        self.calls.append(("ended", run, status))


def test_mlflow_gets_a_run_of_the_jobs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in, as above."""
    client = FakeClient()
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: client))  # type: ignore[arg-type]
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    train(parse_job(_values(tmp_path, "mlflow", name="mine")))
    assert client.calls[:2] == [("experiment", "loramux"), ("run", "7", "mine")]
    assert [step for key, step, *_ in client.calls if key == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert client.calls[-1] == ("ended", "r1", "FINISHED")


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_tracker_that_fails_ends_nothing(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, job: Any, taken: int) -> None:
            self.calls = 0
            if when == "open":
                raise OSError("no space left on device")

        def log(self, step: int, values: Any) -> None:
            self.calls += 1
            assert self.calls == 1 or when != "log"  # it is not called again
            if when == "log":
                raise OSError("no space left on device")

        def flush(self) -> None:
            pass

        def close(self, *, finished: bool) -> None:
            if when == "close":
                raise OSError("no space left on device")

    monkeypatch.setattr(packages, "OPEN", {"tensorboard": Broken})
    watch = StopAt(10**9)
    result = train(parse_job(_values(tmp_path, "tensorboard")), progress=watch)
    assert result.steps == 6
    assert [text for text in watch.warnings if "tensorboard" in text] == [
        "tensorboard takes no more of this run: OSError: no space left on device"
    ]


def test_a_stopped_run_closes_its_trackers(tmp_path: Path) -> None:
    job = parse_job(_values(tmp_path, "tensorboard"))
    watch = StopAt(2)
    with pytest.raises(Interrupted):
        train(job, progress=watch, stop=watch.event)
    assert [step for step, _ in _scalars(job.output)["train/loss"]] == [1, 2]


@pytest.mark.parametrize(("name", "remedy"), [("wandb", "pip install wandb"), ("tensorboard", "with the extra track")])
def test_a_missing_package_is_refused_before_the_first_step(
    name: TrackerName, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(JobInvalid, match=rf"tracking\.report_to: package {name} is not installed: .*{remedy}"):
        train(parse_job(_values(tmp_path, name)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "read"),
    [("none", ()), (None, ()), ([], ()), ("tensorboard", ("tensorboard",)), (["wandb", "mlflow"], ("wandb", "mlflow"))],
)
def test_trackers_are_named_as_in_transformers(given: Any, read: tuple[str, ...], tmp_path: Path) -> None:
    assert parse_job({**job_values(tmp_path), "report_to": given}).tracking.report_to == read


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobInvalid, match=r"tracking\.report_to"):
        parse_job({**job_values(tmp_path), "report_to": "comet_ml"})
