"""Disks that fill up or are too small: what a run says, what it leaves, and that nothing trained is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_trainer import checkpoints, export, member_run, space
from loramux_trainer.errors import JobInvalid, OutputFailed
from loramux_trainer.export import REPORT
from loramux_trainer.job import TrainConfig
from loramux_trainer.run import CHECKPOINTS, train
from support.training import StopAt

JobMaker = Callable[..., TrainConfig]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("method", ["export", "write_checkpoint"])
def test_a_disk_that_fills_up_is_reported(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(member_run, method, fail)
    with pytest.raises(OutputFailed, match="cannot be written any more: No space left"):
        train(make_job(training={"max_steps": 3}, checkpoint={"save_steps": 2}))


def test_a_disk_that_fills_up_at_the_export_loses_nothing(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, failed = make_job("whole"), make_job("failed")
    train(whole)
    real = export.write_files

    def fill_up(directory: Path, *arguments: Any, **options: Any) -> None:
        real(directory, *arguments, **options)
        file = directory / WEIGHTS
        file.write_bytes(file.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_files", fill_up)
    says = r"No space left on device; free some space and run again with --resume, which continues from .*step-00000010"
    with pytest.raises(OutputFailed, match=says):
        train(failed)
    assert [path.name for path in failed.output.iterdir()] == [CHECKPOINTS]
    monkeypatch.undo()
    watcher = StopAt(10**9)
    train(failed, resume=True, progress=watcher)
    assert watcher.seen == []
    assert (failed.output / WEIGHTS).read_bytes() == (whole.output / WEIGHTS).read_bytes()
    assert sorted(path.name for path in failed.output.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        CERTIFICATE_FILE,
        REPORT,
    ]


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_no_part_of_it(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(checkpoint={"save_steps": 4})
    real = checkpoints.write_durably

    def fill_up(path: Path, content: bytes) -> None:
        real(path, content[:100] if "step-00000004" in str(list(path.parent.parent.iterdir())) else content)
        if "step-00000004" in str(list(path.parent.parent.iterdir())):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_durably", fill_up)
    with pytest.raises(OutputFailed, match=r"--resume, which continues from .*step-00000004"):
        train(job)
    assert [path.name for path in (job.output / CHECKPOINTS).iterdir()] == ["step-00000004"]


def test_a_disk_without_room_is_refused_before_the_first_step(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, watcher = make_job(), StopAt(10**9)
    monkeypatch.setattr(space, "_free_bytes", lambda _: 1_000_000)
    with pytest.raises(JobInvalid, match=r"output: .* a disk with 1 MB free, and the run writes up to \d MB"):
        train(job, progress=watcher)
    assert watcher.seen == []
    assert not job.output.exists()


def test_room_is_needed_for_the_checkpoints_that_are_kept_and_the_adapter(make_job: JobMaker) -> None:
    million = 10**6

    def megabytes(existing: int = 0, **options: int) -> int:
        return (space.needed_bytes(make_job(checkpoint=options), million, 10, existing) - (1 << 20)) // (4 * million)

    assert megabytes(save_steps=0) == 3 + 1  # factors and two moments, and the factors alone
    assert megabytes(save_steps=10) == 3 + 1  # the last step's is the one before the export
    assert megabytes(save_steps=3, save_total_limit=2) == 3 * 3 + 1
    assert megabytes(save_steps=3, save_total_limit=2, existing=2) == 3 + 1
    assert megabytes(save_steps=3, save_total_limit=9) == 4 * 3 + 1
    best = make_job(training={"load_best_model_at_end": True}, checkpoint={"save_steps": 0})
    assert space.needed_bytes(best, million, 10, 0) == 4 * million * (4 + 1) + (1 << 20)


def test_room_is_needed_for_all_that_train_at_once(
    make_job: JobMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = make_job()
    job.output.mkdir()
    one = space.still_needed(job, 10**6, 10)
    monkeypatch.setattr(space, "_free_bytes", lambda _: one + one // 2)
    space.check_space(job, 10**6, 10)
    with pytest.raises(JobInvalid, match=r"output: .* the run and those beside it write up to"):
        space.check_space(job, 10**6, 10, {tmp_path: one})


def test_checkpoints_are_written_by_default(make_job: JobMaker) -> None:
    assert make_job().checkpoint.save_steps == 200
