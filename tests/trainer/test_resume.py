"""Runs that stop and go on: the same bytes as without the stop, and which checkpoints are taken up."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from loramux_trainer import member_run
from loramux_trainer.checkpoints import list_checkpoints, read_checkpoint
from loramux_trainer.errors import CheckpointInvalid, Interrupted, JobInvalid
from loramux_trainer.export import REPORT
from loramux_trainer.job import RENAMED, TrainConfig
from loramux_trainer.run import CHECKPOINTS, train
from support.training import StopAt

JobMaker = Callable[..., TrainConfig]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("stop_after", [3, 5])
def test_resume_is_bit_exact(make_job: JobMaker, stop_after: int) -> None:
    whole, halved = make_job("whole"), make_job("halved")
    train(whole)
    watcher = StopAt(stop_after)
    with pytest.raises(Interrupted):
        train(halved, progress=watcher, stop=watcher.event)
    assert not (halved.output / "adapter_config.json").exists()
    rest = StopAt(10**9)
    train(halved, resume=True, progress=rest)
    assert rest.seen[0].step == stop_after + 1
    assert rest.warnings == []
    assert (halved.output / WEIGHTS).read_bytes() == (whole.output / WEIGHTS).read_bytes()
    history = [json.loads((job.output / REPORT).read_text())["history"] for job in (whole, halved)]
    assert history[0] == history[1]


def test_periodic_checkpoints_are_kept_to_the_limit(make_job: JobMaker) -> None:
    job = make_job(checkpoint={"save_steps": 3, "save_total_limit": 2})
    train(job)
    assert [path.name for path in list_checkpoints(job.output / CHECKPOINTS)] == ["step-00000006", "step-00000009"]


def test_a_checkpoint_of_another_job_or_data_is_refused(make_job: JobMaker) -> None:
    job = make_job()
    watcher = StopAt(2)
    with pytest.raises(Interrupted) as stopped:
        train(job, progress=watcher, stop=watcher.event)
    assert read_checkpoint(stopped.value.checkpoints[0]).step == 2
    with pytest.raises(JobInvalid, match="unfinished run"):
        train(job)
    with pytest.raises(CheckpointInvalid, match=r"another lora\.alpha: 8\.0, not 9\.0"):
        train(make_job(lora={"alpha": 9}), resume=True)
    with pytest.raises(CheckpointInvalid, match=r"another training\.compute_dtype: float32, not bfloat16"):
        train(make_job(training={"compute_dtype": "bfloat16"}), resume=True)
    records = job.data.train.read_text().splitlines()
    job.data.train.write_text("\n".join(records[1:]))
    with pytest.raises(CheckpointInvalid, match="another training data"):
        train(job, resume=True)


def test_a_checkpoint_with_the_former_names_of_keys_resumes_and_is_held_to_them(make_job: JobMaker) -> None:
    former = {present: name for name, present in RENAMED.items()}
    job, watcher = make_job(training={"lr_scheduler_type": "constant_with_warmup"}), StopAt(2)
    with pytest.raises(Interrupted) as stopped:
        train(job, progress=watcher, stop=watcher.event)
    file = stopped.value.checkpoints[0] / "checkpoint.json"
    meta = json.loads(file.read_text())
    meta["identity"] = {former.get(key, key): value for key, value in meta["identity"].items()}
    meta["identity"]["training.schedule"] = "constant"
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointInvalid, match=r"another training\.max_grad_norm: 1\.0, not 2\.0"):
        train(make_job(training={"lr_scheduler_type": "constant_with_warmup", "max_grad_norm": 2.0}), resume=True)
    assert train(job, resume=True).steps == 10


def test_when_to_evaluate_may_change_and_other_versions_are_told_of(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = StopAt(2), StopAt(3)
    with pytest.raises(Interrupted):
        train(make_job(), progress=first, stop=first.event)
    monkeypatch.setattr(member_run, "_versions", lambda: {"torch": "99.0"})
    with pytest.raises(Interrupted):
        train(make_job(training={"eval_steps": 7}), resume=True, progress=second, stop=second.event)
    [warning] = second.warnings
    assert f"torch {torch.__version__}" in warning
    assert "torch 99.0" in warning


def test_stopping_before_the_first_step_keeps_the_checkpoint_there_is(make_job: JobMaker) -> None:
    job, watcher = make_job(), StopAt(2)
    watcher.event.set()
    with pytest.raises(Interrupted, match="nothing is saved") as fresh:
        train(job, stop=watcher.event)
    assert fresh.value.checkpoints == ()
    assert not job.output.exists()
    watcher.event.clear()
    with pytest.raises(Interrupted) as first:
        train(job, progress=watcher, stop=watcher.event)
    with pytest.raises(Interrupted) as second:
        train(job, resume=True, stop=watcher.event)
    assert first.value.checkpoints == second.value.checkpoints
    assert read_checkpoint(second.value.checkpoints[0]).step == 2


SCRIPT = """
import sys
from pathlib import Path
from loramux_trainer.errors import Interrupted
from loramux_trainer.interrupt import stop_on_signals
from loramux_trainer.job import read_job
from loramux_trainer.progress import Silent
from loramux_trainer.run import train

class Loud(Silent):
    def stepped(self, report):
        print(report.step, flush=True)

with stop_on_signals() as stop:
    try:
        train(read_job(Path(sys.argv[1])), progress=Loud(), stop=stop)
    except Interrupted as error:
        print("saved", *error.checkpoints, flush=True)
"""


def test_sigterm_leaves_a_checkpoint_that_resumes(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job(training={"max_steps": 120, "eval_steps": 1000})
    file = tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump({**job.to_dict(), "lora": {**job.to_dict()["lora"], "target_modules": "all-linear"}})
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    try:
        while process.stdout.readline().strip() not in ("4", ""):
            pass
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert "saved" in rest
    [directory] = list_checkpoints(job.output / CHECKPOINTS)
    checkpoint = read_checkpoint(directory)
    assert 4 <= checkpoint.step < 120
    watcher = StopAt(checkpoint.step + 1)
    with pytest.raises(Interrupted):
        train(job, resume=True, progress=watcher, stop=watcher.event)
    assert watcher.seen[0].step == checkpoint.step + 1
