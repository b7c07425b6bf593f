"""What a job is refused for before anything is loaded, and that looking changes nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_trainer.dry_run import check_whole_job
from loramux_trainer.errors import DataInvalid, JobInvalid, SeveralInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.preflight import check_job
from support.tiny import write_jsonl

JobMaker = Callable[..., TrainConfig]


def test_a_good_job_passes_and_leaves_nothing(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job("some/where/new")
    check_job(job, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    job.output.mkdir(parents=True)
    check_job(job, resume=False)
    assert list(job.output.iterdir()) == []


def test_data_that_is_not_there_is_named(make_job: JobMaker, tmp_path: Path) -> None:
    with pytest.raises(JobInvalid, match=r"data\.eval: .*nowhere\.jsonl is not a readable file"):
        check_job(make_job(data={"eval": "nowhere.jsonl", "eval_fraction": 0}), resume=False)
    job = make_job()
    job.data.train.unlink()
    with pytest.raises(JobInvalid, match=r"data\.train: .*is not a readable file"):
        check_job(job, resume=False)
    job.data.train.mkdir()
    with pytest.raises(JobInvalid, match=r"data\.train: .*is not a readable file"):
        check_job(job, resume=False)


def test_records_are_read_before_anything_is_loaded(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job()
    with job.data.train.open("a") as file:
        file.write('{"prompt": "a", "completion": "b", "score": 1}\n')
    with pytest.raises(DataInvalid, match=r"train\.jsonl:41: score is not a key that training reads"):
        check_job(job, resume=False)
    write_jsonl(tmp_path / "eval.jsonl", [[]])
    job = make_job(data={"eval": "eval.jsonl", "eval_fraction": 0})
    with pytest.raises(DataInvalid, match=r"eval\.jsonl:1: a JSON array"):
        check_job(job, resume=False)


@pytest.mark.parametrize("output", ["train.jsonl", "train.jsonl/adapter", "/proc/self", "/proc/self/adapter"])
def test_an_output_that_cannot_be_written_is_refused(make_job: JobMaker, output: str) -> None:
    with pytest.raises(JobInvalid, match=r"output: .* cannot be written"):
        check_job(make_job(output), resume=False)


def test_an_output_in_use_is_refused(make_job: JobMaker) -> None:
    job = make_job()
    (job.output / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(JobInvalid, match="unfinished run"):
        check_job(job, resume=False)
    check_job(job, resume=True)
    (job.output / "adapter_config.json").write_text("{}")
    with pytest.raises(JobInvalid, match="already has an adapter"):
        check_job(job, resume=True)


def test_everything_is_told_at_once(make_job: JobMaker, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    job = make_job("train.jsonl", model="base", data={"eval": "nowhere.jsonl", "eval_fraction": 0})
    job.data.train.write_text("x\n[1]\n")
    with pytest.raises(SeveralInvalid) as caught:
        check_job(job, resume=False)
    text = str(caught.value)
    for words in (
        "5 things are wrong:",
        "base cannot be loaded: it holds no config.json; give the directory of a Hugging Face checkpoint",
        "data.eval: ",
        "output: ",
        "train.jsonl:1: not JSON",
        "train.jsonl:2: ",
    ):
        assert words in text
    assert len(text.splitlines()) == 6


def test_looking_loads_no_torch() -> None:
    script = "import sys, loramux_trainer.preflight; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("check", [check_job, check_whole_job])
def test_an_optimizer_that_is_not_for_the_given_device_is_refused_before_anything_is_loaded(
    make_job: JobMaker, check: Callable[..., object]
) -> None:
    job = make_job(training={"optimizer": "paged_adamw_8bit", "device": "cpu"})
    with pytest.raises((JobInvalid, SeveralInvalid), match="paged_adamw_8bit needs a CUDA device"):
        check(job, resume=False)
