"""`loramux eval` against a real server: the trainer's own loss, answers as asked one by one, a server that ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from loramux.evaluation.reading import read_eval_records
from loramux.evaluation.run import evaluate
from loramux.evaluation.values import BASE
from loramux.local_server import LocalServer
from loramux.terminal.failures import ExitCode
from loramux_trainer.demo_tasks import DEMO_TASKS, held_out_questions, training_records
from loramux_trainer.job import parse_job
from loramux_trainer.run import train
from support.tiny import write_jsonl

OPTIONS = {"dtype": "float32", "kv_bytes": "64MiB", "adapter_device_bytes": "64MiB", "readiness_seconds": "0"}
LOSS_TOLERANCE = 1e-4
"""Between the trainer's graph and the server's, per token in float32; one token more or less moves it by over 1e-2."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """(adapter, held-out file, the trainer's loss on that file) of a short run."""
    root = tmp_path_factory.mktemp("capitals")
    task = next(task for task in DEMO_TASKS if task.name == "capitals")
    write_jsonl(root / "train.jsonl", training_records(task)[:200])
    held = [
        {"messages": [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}]}
        for q in held_out_questions(task, 12)
    ]
    write_jsonl(root / "eval.jsonl", [*held, {"prompt": "Once upon", "completion": " a time there was"}])
    job = {
        "model": "loramux-tiny",
        "output": "capitals",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "lora": {"rank": 8},
        "training": {"learning_rate": 3e-3, "max_steps": 30, "batch_size": 8},
    }
    result = train(parse_job(job, root=root))
    assert result.eval_loss is not None
    return result.output, root / "eval.jsonl", result.eval_loss


def test_loss_is_the_trainers_and_answers_are_those_of_single_requests(
    capitals: tuple[Path, Path, float], tmp_path: Path
) -> None:
    adapter, file, loss = capitals
    with (
        LocalServer({**OPTIONS, "data_dir": str(tmp_path / "data")}, log=tmp_path / "log") as server,
        Client(server.address) as client,
    ):
        client.push(adapter, "capitals")
        records = read_eval_records(file, base="loramux-tiny")
        done = evaluate(client, records, ["capitals"], ["loss", "exact"], max_tokens=32, concurrency=8)
        assert done.rows["capitals"].mean("loss") == pytest.approx(loss, abs=LOSS_TOLERANCE)
        assert done.rows[BASE].mean("loss") > loss + 0.1
        assert done.difference("capitals", "exact")[0] > 0.3
        for name, row in done.rows.items():
            for record, outcome in zip(records, row.outcomes, strict=True):
                text, messages = (record.prompt, None) if isinstance(record.prompt, str) else (None, record.prompt)
                said = client.generate(text, messages=messages, adapter=name, temperature=0.0, max_tokens=32)
                assert outcome.answer == said.text.strip()


def test_a_server_that_ends_in_the_middle_is_one_sentence_with_the_line(
    capitals: tuple[Path, Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file, _ = capitals
    monkeypatch.chdir(tmp_path)
    options = {**OPTIONS, "data_dir": str(tmp_path / "data"), "drain_seconds": "1"}
    with LocalServer(options, log=tmp_path / "log") as server:

        def end(*_: object) -> float:
            server.stop()
            return 1.0

        monkeypatch.setattr("loramux.cli.evaluate._load", lambda _: end)
        done = CliRunner().invoke(
            app, ["eval", str(file), "-a", server.address, "--judge", "a:b", "--concurrency", "1", "--json"]
        )
    assert (done.exit_code, done.stdout) == (ExitCode.UNAVAILABLE, "")
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {file}:2: ")


def test_a_model_is_served_for_one_run(capitals: tuple[Path, Path, float]) -> None:
    adapter, file, _ = capitals
    arguments = ["--model", "loramux-tiny", "-A", str(adapter), "-M", "loss", "--limit", "3", "--json"]
    done = CliRunner().invoke(app, ["eval", str(file), *arguments])
    assert done.exit_code == 0, done.stderr
    base, trained = json.loads(done.stdout)["rows"]
    assert (base["adapter"], trained["adapter"]) == (None, "capitals")
    assert trained["metrics"]["loss"]["mean"] < base["metrics"]["loss"]["mean"]
