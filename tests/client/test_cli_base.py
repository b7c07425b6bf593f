"""A base that cannot be loaded: serve, train and doctor say so from its files alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from loramux_adapters.embedded.tiny import tiny_path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A base whose tokenizer was not copied: everything loads, and the last file is missing."""
    return Path(shutil.copytree(tiny_path(), tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*")))


def run(*arguments: str) -> tuple[int, bool, str]:
    """Exit code, whether torch was imported, and what a user reads."""
    script = (
        "import sys\nfrom loramux.cli import main\nfrom typer.testing import CliRunner\n"
        f"result = CliRunner().invoke(main.app, {list(arguments)!r})\n"
        "print(result.exit_code, 'torch' in sys.modules, result.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, torch, said = done.stdout.split(" ", 2)
    return int(code), torch == "True", " ".join(said.split())


def test_serve_refuses_it_before_torch(broken: Path, tmp_path: Path) -> None:
    free = ("--listen=127.0.0.1:0", "--metrics-listen=none", f"--data-dir={tmp_path / 'data'}")
    code, torch, said = run("serve", f"--model={broken}", *free)
    assert (code, torch) == (ExitCode.USAGE, False)
    assert f"model: {broken} cannot be loaded: it holds no tokenizer: there is no tokenizer.json" in said
    assert "AutoTokenizer" in said


@pytest.mark.parametrize("flags", [[], ["--check"], ["--resume"]])
def test_train_refuses_it_before_torch(broken: Path, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "job.yaml").write_text("model: base\noutput: out\ndata: {train: train.jsonl}\n")
    code, torch, said = run("train", str(tmp_path / "job.yaml"), *flags)
    assert (code, torch) == (ExitCode.USAGE, False)
    assert f"model: {broken} cannot be loaded: it holds no tokenizer" in said
    assert not (tmp_path / "out").exists()


def test_doctor_says_what_a_start_would(broken: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", f"--model={broken}", f"--data-dir={tmp_path}"])
    assert result.exit_code == ExitCode.NO
    found = {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert found["base"]["state"] == "fail"
    assert "it holds no tokenizer" in found["base"]["detail"]
    assert "AutoTokenizer" in found["base"]["remedy"]


@pytest.mark.parametrize("model", ["loramux-tny", "./absent", "org/name", "job.yaml"])
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_train_and_serve_say_the_same_of_a_base_that_cannot_be_had(
    model: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job = tmp_path / "job.yaml"
    model = str(tmp_path / model) if model in ("./absent", "job.yaml") else model
    job.write_text(f"model: {model}\noutput: out\ndata: {{train: train.jsonl}}\n")
    served = CliRunner().invoke(app, ["serve", f"--model={model}", "--listen=127.0.0.1:0", "--metrics-listen=none"])
    trained = CliRunner().invoke(app, ["train", str(job), *flags])
    assert trained.exit_code == served.exit_code == ExitCode.USAGE
    assert trained.stderr == served.stderr
    assert "HF_HUB_OFFLINE=1" not in trained.stderr


def test_a_broken_base_decides_the_exit_code_of_several_mistakes(broken: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    for model, code in ((broken, ExitCode.USAGE), ("loramux-tiny", ExitCode.REFUSED)):
        job.write_text(f"model: {model}\noutput: job.yaml\ndata: {{train: train.jsonl}}\n")
        result = CliRunner().invoke(app, ["train", str(job), "--check"])
        assert result.exit_code == code
        assert {"  data.train", "  output"} <= {line.partition(":")[0] for line in result.stderr.splitlines()}


def test_a_gpu_that_is_not_here_is_refused_with_one_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job = tmp_path / "job.yaml"
    job.write_text("model: loramux-tiny\noutput: out\ndata: {train: train.jsonl}\ntraining: {device: cuda}\n")
    result = CliRunner().invoke(app, ["train", str(job)])
    assert (result.exit_code, "training.device: " in result.stderr) == (ExitCode.USAGE, True)
