"""The commands that work here, train, bench and demo: what they refuse, and what they say meanwhile."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loramux.bench.main import BenchOptions, BenchResults
from loramux.cli.main import app
from loramux.terminal.failures import ExitCode


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_train_reads_and_refuses_a_job(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: loramux-tiny\noutput: out\ndata: {train: train.jsonl}\n")
    missing = invoke("train", str(job), "--check")
    assert missing.exit_code == ExitCode.REFUSED
    assert "data.train" in missing.stderr
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}')
    broken = invoke("train", str(job), "--check")
    assert broken.exit_code == ExitCode.REFUSED
    assert "train.jsonl:1: a record needs either messages, or prompt and completion" in " ".join(broken.stderr.split())
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert invoke("train", str(job), "--check").exit_code == 0
    job.write_text("model: loramux-tiny\noutput: out\ndata: {train: train.jsonl}\nlora: {rank: -1}\n")
    result = invoke("train", str(job), "--check")
    assert result.exit_code == ExitCode.REFUSED
    assert "lora.rank" in result.stderr


def test_train_takes_a_file_of_several_jobs(tmp_path: Path) -> None:
    records = "".join(f'{{"prompt": "say {i}", "completion": "it {i}"}}\n' for i in range(8))
    (tmp_path / "train.jsonl").write_text(records)
    common = "model: loramux-tiny\noutput: out\ndata: {train: train.jsonl}\n"
    job = tmp_path / "job.yaml"
    job.write_text(common + "jobs: [{name: a}, {name: b, lora: {rank: 0}}]\n")
    for flags in ([], ["--check"]):
        result = invoke("train", str(job), *flags)
        assert result.exit_code == ExitCode.REFUSED
        assert "jobs[1].lora.rank: must be at least 1, not 0" in result.stderr
    assert not (tmp_path / "out").exists()

    common = common.replace("train.jsonl}", "train.jsonl, eval_fraction: 0.25}")
    steps = "training: {max_steps: 2, batch_size: 2}\n"
    job.write_text(common + steps + "jobs: [{name: a}, {name: b, method: ia3}]\n")
    assert invoke("train", str(job), "--check").stdout == f"ok: {job} is 2 valid jobs\n"
    result = invoke("train", str(job))
    assert result.exit_code == 0
    assert "a: finished at step 2" in result.stderr
    *described, hint = result.stdout.splitlines()
    assert [line.split(":")[0] for line in described] == [str(tmp_path / "out" / name) for name in "ab"]
    assert hint == f"publish one with: loramux adapters push {tmp_path / 'out' / 'a'}"

    job.write_text(
        common.replace("output: out", "output: swept") + steps + "sweep: {parameters: {lora.rank: [2, 4]}}\n"
    )
    lines = invoke("train", str(job)).stdout.splitlines()
    assert lines[2].startswith("best: rank-")
    assert lines[3].startswith(f"publish it with: loramux adapters push {tmp_path / 'swept' / 'rank-'}")


def test_a_job_that_is_broken_yaml_is_told_in_one_line_with_its_remedy(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: loramux-tiny\noutput: out\ndata:\n\ttrain: train.jsonl\n")
    result = invoke("train", str(job))
    assert result.exit_code == ExitCode.REFUSED
    assert result.stderr == f"error: {job}:4:1: not YAML: a tab\n       indent with spaces\n"
    for text in ("", "- model\n"):
        job.write_text(text)
        assert invoke("train", str(job)).stderr == (
            f"error: {job}: not a mapping of keys\n       write lines like `model: loramux-tiny`\n"
        )


def test_the_first_ctrl_c_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from loramux_trainer.errors import Interrupted

    def train(job: object, *, stop: threading.Event, **_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        if stop.is_set():
            raise Interrupted(())

    monkeypatch.setattr("loramux_trainer.run.train", train)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    job = tmp_path / "job.yaml"
    job.write_text("model: loramux-tiny\noutput: out\ndata: {train: train.jsonl}\n")
    assert invoke("train", str(job)).exit_code == ExitCode.INTERRUPTED
    assert "stopping after this step" in capfd.readouterr().err


def test_bench_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    for arguments, words in (
        (["--driver", "warp"], "no driver 'warp'"),
        (["--address", "127.0.0.1:1"], "--driver grpc"),
        (["--driver", "peft", "--profile-step"], "--driver engine"),
        (["--workload", str(tmp_path / "none.toml")], "shipped are dense-125m, kinds-125m"),
    ):
        result = invoke("bench", *arguments)
        assert result.exit_code == ExitCode.USAGE
        assert words in result.stderr


def test_a_workload_that_is_broken_toml_is_told_in_one_line_with_its_remedy(tmp_path: Path) -> None:
    workload = tmp_path / "work.toml"
    workload.write_text("name = x\n")
    result = invoke("bench", "--driver", "engine", "-w", str(workload))
    assert result.exit_code == ExitCode.USAGE
    said = "text is in double quotes, and true and false have no capitals"
    assert result.stderr == f"error: {workload}:1:8: not TOML: not a value\n       {said}\n"
    workload.write_text('name = "x"\n')
    assert f"error: {workload}: shape: is required" in invoke("bench", "-w", str(workload)).stderr


def test_bench_leaves_an_absent_peft_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(options: BenchOptions, announce: object) -> BenchResults:
        seen.append(options.drivers)
        return BenchResults("name", {}, "page")

    monkeypatch.setattr("loramux.bench.main.run", run)
    monkeypatch.setattr("loramux.cli.bench.find_spec", lambda name: None)
    result = invoke("bench", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert seen == [("engine",)]
    assert "pip install '.[bench]'" in result.stderr.splitlines()[0]
    assert (tmp_path / "name.md").read_text() == "page"
    assert invoke("bench", "--driver", "peft").exit_code == ExitCode.USAGE


def test_bench_tries_its_directory_first_and_shows_what_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = invoke("bench", "-w", "mixed-tiny", "--out", str(tmp_path / "file"))
    assert refused.exit_code == ExitCode.REFUSED
    assert "--out" in refused.stderr
    assert refused.stdout == ""
    monkeypatch.setattr("loramux.bench.main.run", lambda options, announce: BenchResults("name", {}, "the page"))
    late = invoke("bench", "--out", str(tmp_path / "file"))
    assert late.exit_code == ExitCode.REFUSED
    assert late.stdout == "the page\n"
    assert "cannot write" in late.stderr


def test_a_refused_run_leaves_no_directory_and_no_bar(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: loramux-tiny\noutput: out\ndata: {train: missing.jsonl}\n")
    result = invoke("train", str(job))
    assert result.exit_code == ExitCode.REFUSED
    assert not (tmp_path / "out").exists()
    assert "loading" not in result.stderr
    assert result.stderr.lstrip().startswith("error: ")


def test_unknown_demo_task_lists_the_known() -> None:
    result = invoke("demo", "--task", "nothing")
    assert result.exit_code == ExitCode.USAGE
    assert "backwards" in result.stderr


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["style=much"], "'much' is no number, as in style=0.5"),
        (["style", "style=2"], "style is given twice"),
        (["style", "=2"], "must not be empty"),
        (["style", "facts=0"], "is too near 0"),
    ],
)
def test_adapters_with_weights_are_refused_by_name(given: list[str], why: str) -> None:
    arguments = [argument for each in given for argument in ("-A", each)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["generate", "hi", *arguments, "--wait", "0"])
    assert result.exit_code != 0
    assert why in result.output


def test_an_empty_adapter_name_is_refused_and_never_the_base() -> None:
    """As `--adapter "$NAME"` gives where NAME is not set."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["generate", "hi", "--adapter", ""])
    assert result.exit_code == ExitCode.USAGE
    assert "must not be empty; leave it out to ask the base" in result.stderr
