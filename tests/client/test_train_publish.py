"""`loramux train --publish`: what would fail after hours of training is refused before it, on the fake server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramux import Client
from loramux.cli.train_publish import prepare
from loramux.evaluation.gate import BetterThan
from loramux.evaluation.reading import read_eval_records
from loramux.terminal.failures import CommandError
from loramux_trainer.base_reading import read_base
from loramux_trainer.data.dataset import load_data
from loramux_trainer.job_file import JobFile, parse_job_file
from loramux_trainer.preparation import source_of
from support.fake_service import FakeServer
from support.tiny import write_jsonl

SHORT = [{"prompt": f"a{number}", "completion": "b" * (number + 1)} for number in range(6)]


def job_file(root: Path, held: list[dict[str, Any]] = SHORT, loss: str = "sft", **data: Any) -> JobFile:
    train, held_out = root / "train.jsonl", root / "held.jsonl"
    write_jsonl(train, [{key: "z" if isinstance(value, str) else value for key, value in held[0].items()}])
    write_jsonl(held_out, held)
    values = {"model": "loramux-tiny", "output": str(root / "out"), "loss": loss}
    return parse_job_file({**values, "data": {"train": str(train), "eval": str(held_out), **data}}, root=root)


@pytest.fixture
def bot(fake: FakeServer, adapter_dir: Path) -> str:
    with Client(fake.address) as client:
        client.push(adapter_dir, "bot")
    fake.state.adapters["alias"] = fake.state.adapters["bot"]
    fake.state.adapters["0.5"] = fake.state.adapters["bot"]
    return "bot"


def test_what_the_gate_compares_with(fake: FakeServer, tmp_path: Path, bot: str) -> None:
    file = job_file(tmp_path)

    def other(given: str) -> object:
        gate = prepare(file, "fresh", given, "loss", fake.address).gate
        assert isinstance(gate, BetterThan)
        assert len(gate.records) == len(SHORT)
        return gate.other

    assert [other(given) for given in ("current", "base", bot, "2", "-1e-3", ".25")] == [None, "", bot, 2, -1e-3, 0.25]


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("two words", None, "'two words' is no name of an adapter"),
        ("", None, "'' is no name of an adapter"),
        ("alias", None, "alias is an alias of bot"),
        ("fresh", "absent", "absent is no adapter of the server"),
        ("fresh", "nan", "nan is no adapter of the server"),
        ("fresh", "inf", "inf is no adapter of the server"),
        ("fresh", "-inf", "-inf is no adapter of the server"),
        ("fresh", "0.5", "0.5 is a number, and an adapter of the server has that name; write 0.5@"),
    ],
)
def test_names_that_mean_nothing_or_two_things_are_refused(
    name: str, given: str | None, says: str, fake: FakeServer, tmp_path: Path, bot: str
) -> None:
    with pytest.raises(CommandError) as refused:
        prepare(job_file(tmp_path), name, given, "loss", fake.address)
    assert says in f"{refused.value}; {refused.value.failure.remedy}"


@pytest.mark.parametrize(
    ("options", "metric", "says"),
    [
        ({"held": [{"input_ids": [5, 6, 7]}]}, "exact", "held.jsonl:1: a record of token ids has no prompt"),
        (
            {"held": [*SHORT, {"prompt": "a" * 70, "completion": "b"}]},
            "loss",
            "jsonl:7: 73 tokens, the server has",
        ),
        (
            {"held": [{"prompt": "a" * 70, "completion": "b"}], "max_length": 20},
            "loss",
            "has no record of at most",
        ),
        ({"held": [{"prompt": "a", "chosen": "b", "rejected": "c"}], "loss": "dpo"}, "loss", "the records of loss dpo"),
    ],
)
def test_records_that_the_server_could_not_be_asked_for_are_refused(
    options: dict[str, Any], metric: str, says: str, fake: FakeServer, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=says):
        prepare(job_file(tmp_path, **options), "fresh", "base", metric, fake.address)


@pytest.mark.parametrize(
    ("held", "data"),
    [
        (SHORT, {"completion_only_loss": False}),
        (SHORT, {"max_length": 8}),
        (SHORT, {"max_length": 8, "truncation": "truncate"}),
        ([{"question": "a", "answer": "b", "id": 7}], {"columns": {"prompt": "question", "completion": "answer"},
         "ignore_columns": ["id"]}),
        ([{"instruction": "say", "output": "b"}], {"instruction_format": "alpaca"}),
        ([{"prompt": "a", "completion": "b", "regex": 5}], {"ignore_columns": ["regex"]}),
    ],
    ids=["masks", "length", "truncation", "columns", "alpaca", "regex"],
)  # fmt: skip
def test_the_gate_scores_the_tokens_that_the_job_evaluates(
    held: list[dict[str, Any]], data: dict[str, Any], tmp_path: Path
) -> None:
    """And not those of the defaults, under which records are masked, or not read at all, otherwise."""
    [job] = job_file(tmp_path, held, **data).jobs
    evaluated = load_data(job.data, read_base(job, source_of(job)).encoder, seed=0).eval
    records = read_eval_records(tmp_path / "held.jsonl", base="loramux-tiny", data=job.data)
    scored = [(sequence.ids, len(sequence.targets)) for record in records for sequence in record.sequences]
    wanted = [(row.ids, row.supervised) for unit in evaluated for row in unit.rows]
    assert scored == wanted
    assert scored


def test_no_record_is_asked_for_with_a_limit_of_none(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "held.jsonl", SHORT)
    assert read_eval_records(tmp_path / "held.jsonl", limit=0) == ()
    assert len(read_eval_records(tmp_path / "held.jsonl", limit=2)) == 2
