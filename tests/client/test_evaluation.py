"""Evaluations: statistics by hand, what is asked and how it is scored, and what is refused, on the fake server."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from loramux import Client, errors
from loramux.cli.main import app
from loramux.evaluation.reading import read_eval_records
from loramux.evaluation.run import evaluate
from loramux.evaluation.scoring import EvaluationInvalid
from loramux.evaluation.values import BASE, EvalRecord, Evaluation, LabeledTokens, Metric, Outcome, Row, Score
from loramux.terminal.failures import ExitCode
from loramux_trainer.errors import DataInvalid
from support.fake_service import FakeServer


def row(name: str, metric: Metric, *scores: tuple[float, float]) -> Row:
    made = [Outcome(f"f:{i}", None, False, {metric: Score(*score)}) for i, score in enumerate(scores)]
    return Row(name, None, tuple(made))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def bot(fake: FakeServer, adapter_dir: Path) -> str:
    with Client(fake.address) as client:
        client.push(adapter_dir, "bot")
    # The fake knows plain names; an evaluation asks for the version.
    digest = fake.state.adapters["bot"].digest
    fake.state.adapters[f"bot@{digest}"] = fake.state.adapters["bot"]
    return f"bot@{digest}"


@pytest.fixture
def file(tmp_path: Path, bot: str) -> Path:
    """The fake says who it is and what it was asked: one record is right at each of the two, one at none."""
    path = tmp_path / "eval.jsonl"
    values = [
        {"prompt": "one", "completion": "base: one"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": f" {bot}: two\n"}]},
        {"instruction": "three", "output": "nobody's answer"},
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_means_and_errors_are_those_of_the_textbook() -> None:
    shares = row("a", "exact", (1, 1), (0, 1), (1, 1), (1, 1))
    assert shares.mean("exact") == 0.75
    assert shares.stderr("exact") == pytest.approx(0.5 / 2)  # sample deviation 0.5 over sqrt(4)
    per_token = row("a", "loss", (3.0, 2), (1.0, 2))  # a mean of tokens, not of records' means
    assert per_token.mean("loss") == 1.0
    assert per_token.stderr("loss") == pytest.approx(math.sqrt(2 * (1.0**2 + 1.0**2)) / 4)
    assert row("a", "loss", (3.0, 1), (1.0, 3)).mean("loss") == 1.0
    assert row("a", "exact", (1, 1)).stderr("exact") is None


def test_a_difference_is_of_the_paired_records() -> None:
    base = row(BASE, "judge", (1, 1), (5, 1), (9, 1))
    better = row("a", "judge", (2, 1), (6, 1), (10, 1))
    both = Evaluation(("judge",), {BASE: base, "a": better})
    assert both.difference("a", "judge") == (1.0, 0.0)  # each record is better by one: nothing is left to chance
    error = better.stderr("judge")
    assert error is not None
    assert error > 2


def test_each_record_is_asked_of_the_base_and_of_one_version(fake: FakeServer, file: Path, bot: str) -> None:
    with Client(fake.address) as client:
        done = evaluate(client, read_eval_records(file), ["bot"], ["exact"], max_tokens=7)
    assert list(done.rows) == [BASE, "bot"]
    assert done.rows[BASE].digest is None
    assert done.rows["bot"].digest == bot.partition("@")[2]
    exact = {name: [o.scores["exact"].total for o in each.outcomes] for name, each in done.rows.items()}
    assert exact == {BASE: [1.0, 0.0, 0.0], "bot": [0.0, 1.0, 0.0]}
    assert [o.answer for o in done.rows["bot"].outcomes] == [f"{bot}: one", f"{bot}: two", f"{bot}: three"]
    assert [o.where.rpartition(":")[2] for o in done.rows["bot"].outcomes] == ["1", "2", "3"]
    assert {(r.sampling.temperature, r.stopping.max_tokens) for r in fake.state.requests} == {(0.0, 7)}


def test_regex_and_judge(fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(
        '{"prompt": "a1", "completion": "x"}\n{"prompt": "b2", "completion": "y", "regex": "^base: [a-z]2$"}\n'
    )
    seen = []

    def judge(prompt: object, answer: str, reference: str | None) -> int:
        seen.append((prompt, answer, reference))
        return len(answer)

    with Client(fake.address) as client:
        done = evaluate(client, read_eval_records(path), [], ["regex", "judge"], pattern="zzz", judge=judge)
    assert [o.scores["regex"].total for o in done.rows[BASE].outcomes] == [0.0, 1.0]
    assert done.rows[BASE].mean("judge") == len("base: a1")
    assert sorted(seen, key=str) == [("a1", "base: a1", "x"), ("b2", "base: b2", "y")]


def test_what_cannot_be_scored_is_refused_before_anything_is_asked(fake: FakeServer) -> None:
    def refusal(record: EvalRecord, metric: Metric, pattern: str | None = None) -> str:
        with Client(fake.address) as client, pytest.raises(EvaluationInvalid) as raised:
            evaluate(client, [EvalRecord("f:1", "p", "r"), record], [], [metric], pattern=pattern)
        return str(raised.value)

    tokens = EvalRecord("f:2", None, None, sequences=(LabeledTokens((1, 2), (1,)),))
    assert refusal(tokens, "exact") == "f:2: a record of token ids has no prompt to ask for metric exact"
    assert refusal(EvalRecord("f:2", "p", None), "exact").startswith("f:2: the answer has no text")
    assert refusal(tokens, "loss").startswith("f:1: the record has no tokens")
    assert refusal(tokens, "regex", "a").startswith("f:2: ")
    assert refusal(tokens, "regex").startswith("f:1: there is no pattern")
    assert "no regular expression" in refusal(tokens, "regex", "(")
    assert refusal(tokens, "judge") == "metric judge needs a judge"
    assert fake.state.requests == []


@pytest.mark.parametrize(
    ("value", "number"),
    [(True, 1.0), (3, 3.0), (np.float32(0.5), 0.5), (np.int64(2), 2.0), (np.bool_(True), 1.0), (np.array(0.25), 0.25)],
)
def test_a_judge_may_return_a_number_of_numpys(fake: FakeServer, value: object, number: float) -> None:
    with Client(fake.address) as client:
        done = evaluate(client, [EvalRecord("f:1", "p", "r")], [], ["judge"], judge=lambda *_: value)
    assert done.rows[BASE].mean("judge") == number


def test_a_judge_that_ends_the_program_is_refused(fake: FakeServer) -> None:
    """Else the command ended with the judge's own exit code, and printed nothing."""

    def judge(*_: object) -> float:
        sys.exit(0)

    with Client(fake.address) as client, pytest.raises(EvaluationInvalid, match="f:1: the judge raised SystemExit: 0"):
        evaluate(client, [EvalRecord("f:1", "p", "r")], [], ["judge"], judge=judge)


@pytest.mark.parametrize(
    "value", [None, "0.5", math.nan, math.inf, 10**400, 1j, [1.0], np.array([0.5]), np.float32(math.nan), np.str_("a")]
)
def test_a_judge_must_return_a_number(fake: FakeServer, value: object) -> None:
    with Client(fake.address) as client, pytest.raises(EvaluationInvalid, match="f:1: the judge returned"):
        evaluate(client, [EvalRecord("f:1", "p", "r")], [], ["judge"], judge=lambda *_: value)


def test_of_several_failures_the_earliest_record_is_named(fake: FakeServer) -> None:
    second_has_failed = threading.Event()

    def judge(prompt: object, *_: object) -> float:
        if prompt == "1":
            second_has_failed.wait(60)
            time.sleep(0.2)  # in which the caller could end with the second one's
        else:
            second_has_failed.set()
        raise ValueError("bad")

    records = [EvalRecord(f"f:{i}", str(i), "r") for i in (1, 2)]
    with Client(fake.address) as client, pytest.raises(EvaluationInvalid, match="f:1: the judge raised"):
        evaluate(client, records, [], ["judge"], judge=judge, concurrency=2)


def test_a_failure_names_the_earliest_record_and_stops_the_rest(fake: FakeServer) -> None:
    asked = []

    def judge(prompt: object, *_: object) -> float:
        asked.append(prompt)
        raise KeyError("no such word")

    records = [EvalRecord(f"f:{i}", str(i), "r") for i in range(1, 400)]
    with Client(fake.address) as client, pytest.raises(EvaluationInvalid) as raised:
        evaluate(client, records, [], ["judge"], judge=judge, concurrency=1)
    assert str(raised.value) == "f:1: the judge raised KeyError: 'no such word'"
    assert len(asked) < 399


def test_an_error_of_the_server_keeps_its_kind_and_gets_the_line(fake: FakeServer) -> None:
    fake.state.faults.finish = 3  # aborted, as a server that drains says
    with Client(fake.address) as client, pytest.raises(errors.Unavailable, match=r"^f:1: the server ended the answer"):
        evaluate(client, [EvalRecord("f:1", "p", "r")], [], ["exact"])
    scored = EvalRecord("f:1", None, None, sequences=(LabeledTokens((1, 2), (1,)),))
    with Client(fake.address) as client, pytest.raises(errors.Unavailable, match=r"^f:1: the server ended the answer"):
        evaluate(client, [scored], [], ["loss"])
    with Client(fake.address) as client, pytest.raises(errors.NotFound):
        evaluate(client, [EvalRecord("f:1", "p", "r")], ["nobody"], ["exact"])


def test_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"

    def refusal(text: str) -> str:
        path.write_text(text)
        with pytest.raises(DataInvalid) as raised:
            read_eval_records(path)
        return str(raised.value)

    good = '{"prompt": "a", "completion": "b"}\n'
    assert refusal("") == f"{path}: has no record"
    assert refusal(good + '{"question": "a"}').startswith(f"{path}:2: question is not a key")
    assert refusal(good + '{"prompt": "a", "completion": "b", "regex": 3}').startswith(f"{path}:2: regex must be")
    preference = refusal('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    assert preference.startswith(f"{path}:1: a preference record")


def test_the_command_prints_a_table_or_json(fake: FakeServer, file: Path, bot: str) -> None:
    shown = invoke(file, "-a", fake.address, "-A", "bot")
    assert shown.exit_code == 0, shown.stderr
    header, base, adapter = shown.stdout.splitlines()
    assert header.split() == ["ADAPTER", "DIGEST", "RECORDS", "EXACT", "±", "SE", "TO", "BASE"]
    assert base.split() == ["base", "3", "0.3333", "0.3333"]
    assert adapter.split() == ["bot", bot.partition("@")[2][:12], "3", "0.3333", "0.3333", "+0.0000"]
    [first, second] = json.loads(invoke(file, "-a", fake.address, "-A", "bot", "--json").stdout)["rows"]
    assert first["adapter"] is None
    assert second["metrics"]["exact"]["to_base_stderr"] == pytest.approx(math.sqrt(3 / 2 * 2 / 9))
    assert [outcome["exact"] for outcome in second["outcomes"]] == [0.0, 1.0, 0.0]
    limited = json.loads(invoke(file, "-a", fake.address, "--limit", "1", "--json").stdout)["rows"]
    assert [len(each["outcomes"]) for each in limited] == [1]


def test_the_command_refuses_in_a_sentence_and_prints_no_half(
    fake: FakeServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_for_test.py").write_text("def bad(prompt, answer, reference):\n    return answer.missing\n")
    raised = invoke(file, "-a", fake.address, "--judge", "judge_for_test:bad")
    assert (raised.exit_code, raised.stdout) == (ExitCode.REFUSED, "")
    assert f"{file}:1: the judge raised AttributeError: 'str' object has no attribute 'missing'" in raised.stderr
    assert invoke(file, "--judge", "judge_for_test:absent").exit_code == ExitCode.USAGE
    (tmp_path / "ending_for_test.py").write_text("raise SystemExit(0)\n")
    assert invoke(file, "--judge", "ending_for_test:judge").exit_code == ExitCode.USAGE
    assert invoke(file, "--metric", "bleu").exit_code == ExitCode.USAGE
    assert invoke(file, "--metric", "exact", "--regex", "a").exit_code == ExitCode.USAGE
    fake.state.faults.finish = 3
    gone = invoke(file, "-a", fake.address, "--picture", tmp_path / "eval.png")
    assert (gone.exit_code, gone.stdout) == (ExitCode.UNAVAILABLE, "")
    assert f"error: {file}:1: " in gone.stderr
    assert not (tmp_path / "eval.png").exists()
    (tmp_path / "empty.jsonl").write_text("")
    assert invoke(tmp_path / "empty.jsonl", "-a", fake.address).exit_code == ExitCode.REFUSED


def test_a_picture_is_drawn_or_refused_before_anything_is_asked(
    fake: FakeServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "eval.png"
    assert invoke(file, "-a", fake.address, "-A", "bot", "--picture", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.glob("*eval*")) == ["eval.jsonl", "eval.png"]
    asked = len(fake.state.requests)
    assert "must end with .png" in invoke(file, "-a", fake.address, "--picture", tmp_path / "eval.txt").stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    absent = invoke(file, "-a", fake.address, "--picture", picture)
    assert "--picture needs matplotlib, which is not installed" in absent.stderr
    assert len(fake.state.requests) == asked
