"""Early stopping, the best evaluation's adapter, and what a user is warned of."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from loramux_trainer import member_run
from loramux_trainer.advice import warnings_before
from loramux_trainer.data.dataset import DataReport
from loramux_trainer.errors import CheckpointInvalid, Interrupted, JobInvalid, OutputFailed
from loramux_trainer.export import REPORT
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.member import Member
from loramux_trainer.guard import best_of_evals, is_patience_over, worse_epochs
from loramux_trainer.job import LoraConfig, TrainConfig
from loramux_trainer.job_file import parse_job_file
from loramux_trainer.progress import EvalReport
from loramux_trainer.run import train
from loramux_trainer.schema.adapter_config import AdaloraConfig, GaloreConfig
from support.training import StopAt

JobMaker = Callable[..., TrainConfig]
WEIGHTS = "adapter_model.safetensors"
# At this rate the eval loss falls, then rises.
RISING = {"learning_rate": 0.1, "lr_scheduler_type": "constant_with_warmup", "max_steps": 12, "eval_steps": 2}
GUARDED = {**RISING, "early_stopping_patience": 2, "load_best_model_at_end": True}


def evals(*losses: float) -> list[EvalReport]:
    return [EvalReport(step, loss) for step, loss in enumerate(losses, start=1)]


def stops_in_transformers(losses: list[float], patience: int, threshold: float) -> bool:
    callback, best = EarlyStoppingCallback(patience, threshold), None
    arguments: Any = SimpleNamespace(greater_is_better=False)
    for loss in losses:
        state: Any = SimpleNamespace(best_metric=best)
        callback.check_metric_value(arguments, state, None, loss)  # type: ignore[arg-type]
        if callback.early_stopping_patience_counter >= patience:
            return True
        best = loss if best is None or loss < best else best  # as Trainer._determine_best_metric
    return False


def test_patience_is_that_of_transformers() -> None:
    draw, answers = random.Random(0), set()
    for _ in range(2000):
        losses = [draw.randrange(8) / 8 for _ in range(draw.randrange(1, 8))]
        patience, threshold = draw.randrange(1, 4), draw.randrange(3) / 8
        expected = stops_in_transformers(losses, patience, threshold)
        answers.add(expected)
        assert is_patience_over(evals(*losses), patience, threshold) == expected, (losses, patience, threshold)
    assert answers == {True, False}


def test_the_best_is_the_first_of_equals_and_worse_epochs_are_named() -> None:
    reports = evals(3.0, 2.0, 2.5, 1.0, 1.0, 4.0)
    best = best_of_evals(reports)
    assert best is not None
    assert best.step == 4
    assert best_of_evals([]) is None
    [notice] = worse_epochs(reports, 2)
    assert notice.startswith("epoch 3 is worse than epoch 2: eval loss 4.0000, it was 1.0000;")
    assert worse_epochs(reports, 7) == []


def test_a_guarded_run_ends_early_and_exports_the_best_evaluation(make_job: JobMaker) -> None:
    guarded = make_job("guarded", training=GUARDED)
    result = train(guarded)
    report = json.loads((guarded.output / REPORT).read_text())
    best = min(report["evals"], key=lambda each: each["loss"])
    assert result.steps < 12
    assert report["stopped_early"]
    assert result.steps == best["step"] + 2 * 2  # the patience, in evaluations of two steps
    assert report["exported_step"] == best["step"]
    assert result.eval_loss == best["loss"]
    plain = make_job("plain", training={**RISING, "max_steps": best["step"]})
    assert train(plain).eval_loss == result.eval_loss
    # The constant schedule's first steps do not depend on how many follow: the warm-up is one step in both.
    assert (guarded.output / WEIGHTS).read_bytes() == (plain.output / WEIGHTS).read_bytes()
    last = make_job("last", training={**GUARDED, "load_best_model_at_end": False})
    assert train(last).steps == result.steps
    assert (last.output / WEIGHTS).read_bytes() != (guarded.output / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", ["lora", "adalora", "galore"])
def test_the_best_survives_a_resume_bit_for_bit(make_job: JobMaker, method: Any) -> None:
    own: dict[str, Any] = {
        "lora": {},
        "adalora": {"adalora": AdaloraConfig(init_r=6, tinit=2, tfinal=4, delta_t=2)},
        "galore": {"lora": LoraConfig(target_modules=("q_proj",)), "galore": GaloreConfig(rank=4, update_proj_gap=3)},
    }[method]
    whole, halved = (replace(make_job(name, training=GUARDED), method=method, **own) for name in ("whole", "halved"))
    steps = train(whole).steps
    watcher = StopAt(steps - 1)  # after the best evaluation
    with pytest.raises(Interrupted):
        train(halved, progress=watcher, stop=watcher.event)
    assert train(halved, resume=True).steps == steps
    assert (halved.output / WEIGHTS).read_bytes() == (whole.output / WEIGHTS).read_bytes()
    reports = [json.loads((job.output / REPORT).read_text()) for job in (whole, halved)]
    assert reports[0]["evals"] == reports[1]["evals"]
    assert reports[0]["exported_step"] == reports[1]["exported_step"]
    assert reports[0]["exported_step"] < steps or method != "lora"


def test_a_run_whose_export_failed_exports_the_best_without_another_step(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, job = make_job("whole", training=GUARDED), make_job("failed", training=GUARDED)
    train(whole)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(member_run, "export", full)
        with pytest.raises(OutputFailed):
            train(job)
    rest = StopAt(10**9)
    train(job, resume=True, progress=rest)
    assert rest.seen == []
    assert (job.output / WEIGHTS).read_bytes() == (whole.output / WEIGHTS).read_bytes()


def test_when_to_evaluate_is_part_of_a_guarded_run(make_job: JobMaker) -> None:
    watcher = StopAt(2)
    with pytest.raises(Interrupted):
        train(make_job(training=GUARDED), progress=watcher, stop=watcher.event)
    with pytest.raises(CheckpointInvalid, match=r"another training\.eval_steps: 2, not 3"):
        train(make_job(training={**GUARDED, "eval_steps": 3}), resume=True)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"training": {"early_stopping_patience": 1}, "data": {"eval_fraction": 0}}, "early_stopping_patience"),
        ({"training": {"load_best_model_at_end": True}, "data": {"eval_fraction": 0}}, "load_best_model_at_end"),
        ({"training": {"early_stopping_threshold": 0.1}}, "early_stopping_threshold"),
    ],
)
def test_what_has_no_effect_is_refused(make_job: JobMaker, sections: dict[str, Any], field: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        make_job(**sections)
    assert caught.value.field == f"training.{field}"


def test_early_stopping_beside_successive_halving_is_refused() -> None:
    values = {
        "model": "loramux-tiny",
        "output": "out",
        "data": {"train": "train.jsonl", "eval_fraction": 0.1},
        "training": {"early_stopping_patience": 1},
        "sweep": {
            "parameters": {"training.learning_rate": [1e-3, 1e-2]},
            "successive_halving": {"min_steps": 2},
        },
    }
    with pytest.raises(JobInvalid, match="stops them itself"):
        parse_job_file(values)


def test_a_worse_epoch_is_told_and_reported(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def rising(_: Fleet, members: Sequence[Member]) -> dict[str, EvalReport]:
        return {member.name: EvalReport(member.step, float(member.step)) for member in members}

    monkeypatch.setattr(Fleet, "evaluate", rising)
    job = make_job(training={**RISING, "eval_steps": 5, "max_steps": 10})
    watcher = StopAt(10**9)
    train(job, progress=watcher)
    [warning] = watcher.warnings
    assert warning.startswith("epoch 2 is worse than epoch 1: eval loss 10.0000, it was 5.0000;")
    assert json.loads((job.output / REPORT).read_text())["warnings"] == watcher.warnings


DATA = DataReport(
    records=100, train=100, eval=0, duplicates=0, leaked=0, too_long=0, endless=0, tokens=9000, masked=4000, longest=99
)


@pytest.mark.parametrize(
    ("training", "data", "epochs", "parameters", "says"),
    [
        ({}, {"eval": 5}, 9.0, 5000 * 1000, None),
        ({}, {}, 3.0, 1000, None),
        ({}, {}, 4.0, 1000, "4 epochs without an eval set"),
        ({}, {}, 6.0, 1000, "6 epochs over 100 examples"),
        ({}, {"eval": 5, "masked": 0}, 1.0, 1000, "none of the 100 training examples has a prompt"),
        ({}, {"eval": 5}, 1.0, 5000 * 1000 + 1, "rank 16 trains 5,000,001 parameters on 5,000 supervised tokens"),
        ({"optimizer": "sgd", "lr_scheduler_type": "constant_with_warmup"}, {"eval": 5}, 1.0, 1000, "sgd keeps"),
        ({"optimizer": "sgd"}, {"eval": 5}, 1.0, 1000, None),
    ],
)
def test_warnings_before_the_first_step(
    make_job: JobMaker, training: dict[str, Any], data: dict[str, int], epochs: float, parameters: int, says: str | None
) -> None:
    job = make_job(training=training, lora={"rank": 16})
    found = list(warnings_before(job, replace(DATA, **data), epochs, parameters))
    assert len(found) == (says is not None)
    assert all(warning.startswith(str(says)) for warning in found)


def test_they_come_before_the_first_step_of_a_run(make_job: JobMaker) -> None:
    watcher = StopAt(1)
    with pytest.raises(Interrupted):
        train(make_job(data={"eval_fraction": 0}, training={"max_steps": 20}), progress=watcher, stop=watcher.event)
    assert [warning.split(";")[0] for warning in watcher.warnings] == [
        "4 epochs without an eval set do not show over-fitting"
    ]
