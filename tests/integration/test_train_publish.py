"""`loramux train --publish` against a real server: the gate decides on held-out data, and nobody is overruled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from loramux import Client
from loramux.cli.main import app
from loramux.errors import FailedPrecondition, NotFound, Unavailable
from loramux.evaluation.gate import BetterThan
from loramux.evaluation.reading import read_eval_records
from loramux.local_server import LocalServer
from loramux.publishing import Verdict, publish
from loramux.retry import RetryPolicy
from loramux.terminal.failures import ExitCode
from support.live import until_idle
from support.tiny import write_jsonl
from support.training import RECORDS, job_values

NAME = "spoken"


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
        for adapter in client.adapters():
            if adapter.name.startswith(NAME):
                client.delete(adapter.name)
    until_idle(server)


def job(root: Path, output: str, **training: Any) -> Path:
    values = job_values(root)
    write_jsonl(root / "held.jsonl", RECORDS[18:])
    write_jsonl(root / "train.jsonl", RECORDS[:18])
    values["data"] = {"train": str(root / "train.jsonl"), "eval": str(root / "held.jsonl")}
    values["output"] = str(root / output)
    values["training"] = {**values["training"], **training}
    path = root / f"{output}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(path: Path, server: LocalServer, *more: str) -> Result:
    return CliRunner().invoke(app, ["train", str(path), "--publish", NAME, "--address", server.address, *more])


def versions(client: Client) -> list[str]:
    return [adapter.name for adapter in client.adapters() if adapter.name.startswith(NAME)]


def test_what_is_better_takes_the_name_and_what_is_not_leaves_it(
    client: Client, server: LocalServer, tmp_path: Path
) -> None:
    first = train(job(tmp_path, "first"), server, "--if-better-than", "current")  # the name is new: than the base
    assert first.exit_code == 0, first.stderr
    assert "loss " in first.stderr
    assert "is better than" in first.stderr
    assert "of the base" in first.stderr
    assert f"published {NAME}: " in first.stdout
    serving = client.adapter(NAME)
    assert serving.certificate is not None

    worse = train(job(tmp_path, "worse", max_steps=1, learning_rate=1e-6), server, "--if-better-than", "current")
    assert worse.exit_code == ExitCode.NO
    assert "is not better than" in worse.stderr
    assert f"{NAME} still serves {serving.digest[:12]}" in worse.stderr
    assert client.adapter(NAME).digest == serving.digest

    better = train(job(tmp_path, "better", max_steps=20), server, "--if-better-than", "current", "--metric", "loss")
    assert better.exit_code == 0, better.stderr
    now = client.adapter(NAME)
    assert f"published {NAME}: {serving.digest[:12]} -> {now.digest[:12]}" in better.stdout
    assert now.versions == (now.digest, serving.digest)
    assert versions(client) == [NAME]  # no candidate is left
    back = CliRunner().invoke(app, ["adapters", "rollback", NAME, "--address", server.address])
    assert back.stdout.strip() == f"{NAME}: {now.digest[:12]} -> {serving.digest[:12]}"


def test_what_cannot_be_published_is_refused_before_the_training(server: LocalServer, tmp_path: Path) -> None:
    path = job(tmp_path, "never")
    values = yaml.safe_load(path.read_text())
    cases = {
        ("--publish", NAME, "--if-better-than", "base", "--metric", "bleu"): "--metric bleu is none of loss, exact",
        ("--publish", NAME, "--address", "127.0.0.1:1"): "not trained, since nothing could be published afterwards",
        ("--if-better-than", "base"): "--if-better-than says when to publish",
    }
    for flags, says in cases.items():
        address = () if "--address" in flags else ("--address", server.address)
        refused = CliRunner().invoke(app, ["train", str(path), *flags, *address])
        assert refused.exit_code in (ExitCode.REFUSED, ExitCode.UNAVAILABLE)
        assert says in " ".join(refused.stderr.split())
    path.write_text(yaml.safe_dump({**values, "jobs": [{"name": "a"}, {"name": "b"}]}))
    assert "takes one job, or a sweep" in train(path, server).stderr
    values["data"].pop("eval")
    path.write_text(yaml.safe_dump(values))
    assert "compares on data.eval" in train(path, server, "--if-better-than", "base").stderr
    assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("trained")
    for name in ("one", "two"):
        path = job(root, name, seed=len(name), max_steps=2 if name == "one" else 3)
        assert CliRunner().invoke(app, ["train", str(path)]).exit_code == 0
    return root / "one", root / "two"


def test_a_name_that_was_moved_while_it_was_measured_is_left(client: Client, trained: tuple[Path, Path]) -> None:
    one, two = trained
    client.push(one, NAME)

    def gate(client: Client, candidate: str, serving: str) -> Verdict:
        client.push(two, NAME)  # somebody else
        return Verdict(True, "better")

    with pytest.raises(FailedPrecondition, match=f"'{NAME}' points at"):
        publish(client, one, NAME, gate=gate)
    moved = client.adapter(NAME)
    assert moved.versions[0] == moved.digest != moved.versions[1]
    assert versions(client) == [NAME]


def test_a_gate_that_fails_leaves_nothing_behind(client: Client, trained: tuple[Path, Path]) -> None:
    def gate(client: Client, candidate: str, serving: str) -> Verdict:
        assert client.adapter(candidate).expires is not None  # gone by itself, should this process die
        raise RuntimeError("the judge is gone")

    with pytest.raises(RuntimeError, match="the judge is gone"):
        publish(client, trained[0], NAME, gate=gate)
    with pytest.raises(NotFound):
        client.adapter(NAME)
    assert versions(client) == []


def test_a_new_name_that_somebody_takes_while_it_is_measured_is_left(
    client: Client, trained: tuple[Path, Path]
) -> None:
    one, two = trained

    def gate(client: Client, candidate: str, serving: str) -> Verdict:
        assert serving == ""
        client.push(two, NAME)  # somebody else
        return Verdict(True, "better")

    with pytest.raises(FailedPrecondition, match=f"'{NAME}' points at .* and was to be new"):
        publish(client, one, NAME, gate=gate)
    assert len(client.adapter(NAME).versions) == 1
    assert versions(client) == [NAME]


KILLED = """
import sys
from loramux import Client
from loramux.publishing import publish

def gate(client, candidate, serving):
    print(candidate, flush=True)
    sys.stdin.read()

with Client(sys.argv[1]) as client:
    publish(client, sys.argv[2], sys.argv[3], gate=gate)
"""


def test_a_publish_that_is_killed_leaves_the_name_and_a_candidate_that_ends(
    client: Client, server: LocalServer, trained: tuple[Path, Path]
) -> None:
    one, two = trained
    before = client.push(one, NAME).adapter.digest
    command = [sys.executable, "-c", KILLED, server.address, str(two), NAME]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        candidate = process.stdout.readline().strip()  # it is being measured
        process.kill()
    assert client.adapter(NAME).digest == before
    left = client.adapter(candidate)
    assert left.expires is not None
    publication = publish(client, two, NAME, gate=lambda *_: Verdict(True, "better"))
    assert (publication.before, client.adapter(NAME).digest) == (before, left.digest)


def test_a_server_that_goes_away_in_a_publish_serves_what_it_served(trained: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = trained
    options = {"model": "loramux-tiny", "data_dir": str(tmp_path / "data"), "kv_bytes": "8MiB"}
    with (
        LocalServer(options, log=tmp_path / "first.log") as first,
        Client(first.address, retry=RetryPolicy(attempts=1)) as client,
    ):
        before = client.push(one, NAME).adapter.digest

        def gate(client: Client, candidate: str, serving: str) -> Verdict:
            os.kill(first.pid, signal.SIGKILL)
            return Verdict(True, "better")

        with pytest.raises(Unavailable):
            publish(client, two, NAME, gate=gate)
    with LocalServer(options, log=tmp_path / "second.log") as second, Client(second.address) as client:
        assert client.adapter(NAME).digest == before
        assert publish(client, two, NAME, gate=lambda *_: Verdict(True, "better")).before == before


def test_a_gate_may_ask_for_a_number_or_another_adapter(
    client: Client, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    job(tmp_path, "unused")
    records = read_eval_records(tmp_path / "held.jsonl", base="loramux-tiny")
    one, two = trained
    client.push(one, f"{NAME}-other")
    number = BetterThan(records, "loss", 0.0)(client, f"{NAME}-other", "")
    assert not number.passed
    assert "is not better than 0 (" in number.says
    assert BetterThan(records, "loss", 100.0)(client, f"{NAME}-other", "").passed
    client.push(two, f"{NAME}-two")
    losses = {}
    for mine, theirs in ((f"{NAME}-two", f"{NAME}-other"), (f"{NAME}-other", f"{NAME}-two")):
        losses[mine] = BetterThan(records, "loss", theirs)(client, mine, "")
    assert losses[f"{NAME}-two"].passed != losses[f"{NAME}-other"].passed
    assert f"of {NAME}-other, standard error of the difference" in losses[f"{NAME}-two"].says
