"""The table of LoRA and QLoRA: its rows, what a row's figures come to, and PEFT's loop beside the fleet."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer import fleet_run, space
from loramux_trainer.data.examples import Example
from loramux_trainer.errors import Diverged, JobInvalid, ModelInvalid
from loramux_trainer.fleet.member import Member
from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import read_job_file
from loramux_trainer.planning import table
from loramux_trainer.planning.apart import TrialFailed
from loramux_trainer.planning.row_trial import RowRequest, RowTrial, measure
from loramux_trainer.planning.rows import ROWS, Row, job_of
from loramux_trainer.planning.short_job import Watch
from loramux_trainer.planning.table import in_process, measure_table
from loramux_trainer.planning.work import work_of
from loramux_trainer.preparation import read_job_data
from loramux_trainer.trl_engine import peft_loop
from support.training import job_values

CPU = torch.device("cpu")
TRIAL = RowTrial(parameters=5, loaded=10, peak=20, seconds=6.0, tokens=30, loss=1.5, eval_loss=None)


def write(tmp_path: Path, **more: Any) -> Path:
    values = job_values(tmp_path)
    for section, changes in more.items():
        both = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
        values[section] = both
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def one_job(tmp_path: Path, **more: Any) -> TrainConfig:
    return read_job_file(write(tmp_path, **more)).jobs[0]


def test_from_row_to_row_one_thing_changes() -> None:
    """QLoRA by PEFT against LoRA by PEFT differ in bits, QLoRA by the fleet in who trains, and so on."""
    classic, peft, fleet, sgd, all_linear, *ranks = ROWS
    assert classic == dataclasses.replace(peft, bits=16)
    assert peft == dataclasses.replace(fleet, by="peft")
    assert sgd == dataclasses.replace(fleet, optimizer="sgd")
    assert all_linear == dataclasses.replace(fleet, adapted="all linear")
    assert [row.rank for row in ranks] == [16, 32, 64, 128, 256, 256]
    assert ranks[-1] == dataclasses.replace(ranks[-2], optimizer="sgd")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"training": {"optimizer": "lion", "num_train_epochs": 4, "max_steps": None}},
        {"training": {"optimizer": "sophia", "betas": [0.9, 0.95], "hessian_update_period": 4}},
        {"method": "adalora", "adalora": {"init_r": 20}},
        {"method": "prefix", "prompt": {"num_virtual_tokens": 3}},
        {"lora": {"rank": 4, "rank_pattern": {"q_proj": 2}, "dropout": 0.1, "use_rslora": True}},
        {"init": "pissa", "training": {"lr_scheduler_type": "wsd", "warmup_steps": 4}},
        {"training": {"load_best_model_at_end": True, "early_stopping_patience": 1}},
        {"tracking": {"report_to": ["tensorboard"]}, "data": {"eval_fraction": 0}},
    ],
    ids=str,
)
def test_a_job_of_any_method_gives_its_examples_to_every_row(more: dict[str, Any], tmp_path: Path) -> None:
    job = one_job(tmp_path, **more)
    for row in ROWS:
        short = job_of(job, row, 7, tmp_path / "row")
        assert (short.method, short.init, short.training.max_steps) == ("lora", "A", 7)
        assert (short.lora.rank, short.lora.alpha) == (row.rank, 2 * row.rank)
        assert (short.lora.dropout, short.lora.rank_pattern) == (job.lora.dropout, {})
        assert short.training.optimizer == row.optimizer
        assert (short.data, short.training.batch_size) == (job.data, job.training.batch_size)
        assert short.training.learning_rate == job.training.learning_rate
        assert short.tracking.report_to == ()
        assert short.checkpoint.save_steps == 0  # no step waits for a disk


def test_the_betas_of_a_job_are_those_of_its_own_optimizer(tmp_path: Path) -> None:
    given = one_job(tmp_path, training={"betas": [0.8, 0.9]})
    other = one_job(tmp_path, training={"optimizer": "lion"})
    assert job_of(given, ROWS[0], 3, tmp_path).training.betas == (0.8, 0.9)
    assert job_of(other, ROWS[0], 3, tmp_path).training.betas == (0.9, 0.999)
    with_momentum = one_job(tmp_path, training={"optimizer": "sgd", "momentum": 0.5})
    assert job_of(with_momentum, ROWS[3], 3, tmp_path).training.momentum == 0.5


def test_the_time_of_the_run_is_that_of_its_tokens(tmp_path: Path) -> None:
    path = write(tmp_path)
    tokens = work_of(read_job_file(path).jobs).tokens
    (measured,) = measure_table(path, 4, rows=ROWS[2:3], measure=lambda _: TRIAL)
    assert measured.step_seconds == 2.0
    assert measured.run_seconds == pytest.approx(6.0 / 30 * tokens)
    assert not (tmp_path / "out").exists()


def test_a_row_that_fails_ends_no_other(tmp_path: Path) -> None:
    def some(request: RowRequest) -> RowTrial:
        if request.row.bits == 16:
            raise TrialFailed("no memory")
        return TRIAL

    measured = list(measure_table(write(tmp_path), 4, measure=some))
    assert [row.row for row in measured] == list(ROWS)
    assert measured[0] == table.MeasuredRow(ROWS[0], failure="no memory")
    assert all(row.trial == TRIAL for row in measured[1:])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"engine": "trl"}, "engine: the table compares with engine: fleet"),
        ({"loss": "dpo"}, "loss: the table compares losses per token: loss: sft"),
        ({"loss": {"name": "sft", "loss_type": "dft"}}, "loss: the table compares"),
        ({"jobs": [{"name": "a"}, {"name": "b"}]}, "jobs: the table is of one job"),
        ({"sweep": {"parameters": {"lora.rank": [4]}}}, "jobs: the table is of one job"),
        ({"data": {"train": "absent.jsonl"}}, r"data\.train"),
    ],
)
def test_what_makes_no_table_is_refused_before_a_row(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    def never(_: RowRequest) -> RowTrial:
        raise AssertionError

    with pytest.raises(JobInvalid, match=said):
        measure_table(write(tmp_path, **more), 4, measure=never)
    with pytest.raises(JobInvalid, match="2 steps at least"):
        measure_table(write(tmp_path), 1, measure=never)


def test_a_base_that_is_not_here_is_not_fetched_by_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelInvalid, match="org/absent is not on this machine"):
        measure_table(write(tmp_path, model="org/absent"), 4)


def test_without_peft_its_rows_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    with pytest.raises(TrialFailed, match="peft is not installed: install Loramux with the extra trl"):
        in_process(RowRequest(str(tmp_path / "job.yaml"), ROWS[0], 3))


def test_a_row_in_a_process_of_its_own_fails_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match=r"it failed: cannot read .*absent\.yaml"):
        in_process(RowRequest(str(tmp_path / "absent.yaml"), ROWS[2], 3))


def test_peft_and_the_fleet_train_on_the_same_examples(tmp_path: Path) -> None:
    """B is zero before the first step, and hardly more after it at this rate: with either of them it is the base's."""
    training = {"gradient_accumulation_steps": 2, "max_grad_norm": None, "learning_rate": 1e-8}
    path = write(tmp_path, training=training, data={"packing": True})
    peft, fleet = (measure(RowRequest(str(path), row, 2), _empty(tmp_path, row.by)) for row in (ROWS[1], ROWS[2]))
    assert (peft.parameters, peft.tokens) == (fleet.parameters, fleet.tokens)
    assert peft.loss == pytest.approx(fleet.loss, abs=1e-4)
    assert peft.eval_loss == pytest.approx(fleet.eval_loss, abs=1e-4)
    assert fleet.loaded > 0
    assert fleet.seconds > 0


def _empty(tmp_path: Path, name: str) -> Path:
    scratch = tmp_path / f"scratch-{name}"
    scratch.mkdir()
    return scratch


def test_a_row_that_diverges_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, loss = Member.finish_step, peft_loop.PeftLoop._loss
    monkeypatch.setattr(Member, "finish_step", lambda self, value, *more: step(self, math.nan, *more))
    monkeypatch.setattr(peft_loop.PeftLoop, "_loss", lambda self, batch: loss(self, batch) * math.nan)
    path = write(tmp_path)
    for row in (ROWS[1], ROWS[2]):
        with pytest.raises(Diverged, match="step 1: loss nan"):
            measure(RowRequest(str(path), row, 2), scratch := _empty(tmp_path, row.by))
        assert list(scratch.iterdir()) == []


def test_what_the_file_says_of_its_fleet_is_of_the_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Seen(fleet_run.Fleet):
        def __init__(self, *given: Any, token_budget: int, **more: Any) -> None:
            seen.append(token_budget)
            super().__init__(*given, token_budget=token_budget, **more)

    monkeypatch.setattr(fleet_run, "Fleet", Seen)
    path = write(tmp_path, fleet={"token_budget": 77}, data={"eval_fraction": 0})
    monkeypatch.setattr(space, "_free_bytes", lambda directory: 0)  # nor does it need a disk
    trial = measure(RowRequest(str(path), ROWS[2], 2), scratch := _empty(tmp_path, "fleet"))
    assert seen == [77]
    assert trial.eval_loss is None
    assert list(scratch.iterdir()) == []


def test_a_base_whose_configuration_asks_for_more_than_logits(tmp_path: Path) -> None:
    """Fine-tunes leave such switches on; the base in NF4 is loaded without them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_path(), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "return_dict": False, "output_hidden_states": True}))
    job = one_job(tmp_path, model=str(base))
    watch = Watch()
    peft_loop.PeftLoop(read_job_data(job_of(job, ROWS[0], 2, tmp_path / "row")), CPU, 16).go(watch)
    assert len(watch.losses) == 2


@pytest.mark.parametrize("bits", [16, 4])
def test_the_loop_of_peft(bits: int, tmp_path: Path) -> None:
    """What is frozen is what the row says, and what is trained is what it counts; the loss is one per token."""
    job = one_job(tmp_path, training={"max_steps": 2, "gradient_checkpointing": bits == 4})
    prepared = read_job_data(job_of(job, Row(bits, "peft", "all linear", 4), 2, tmp_path / "row"))
    loop = peft_loop.PeftLoop(prepared, CPU, bits)
    frozen = {name: each for name, each in loop._model.named_parameters() if not each.requires_grad}
    held = {each.dtype for name, each in frozen.items() if "_proj.base_layer.weight" in name}
    assert held == {torch.bfloat16 if bits == 16 else torch.uint8}
    outline = prepared.reading.outline
    trained = sum(each.numel() for each in loop._model.parameters() if each.requires_grad)
    linear = [module for name, module in outline.modules.items() if name.endswith("_proj")]
    assert trained == sum(4 * (module.in_features + module.out_features) for module in linear)
    before = {name: each.clone() for name, each in frozen.items()}
    watch = Watch()
    loop.go(watch)
    assert all(torch.equal(each, before[name]) for name, each in frozen.items())
    assert len(watch.losses) == 2
    assert watch.losses[0] == pytest.approx(_first_loss(loop, prepared), abs=0.02 if bits == 16 else 1e-4)
    assert watch.eval_loss is not None


def _first_loss(loop: peft_loop.PeftLoop, prepared: Any) -> float:
    """Of the examples of the first step, row by row, without the adapter."""
    order = peft_loop.StepOrder.of(prepared.job.training, [unit.tokens for unit in prepared.data.train])
    units = [prepared.data.train[index] for batch in order.micro_batches(0) for index in batch]
    total = 0.0
    with torch.no_grad(), loop._model.disable_adapter():
        for row in (row for unit in units for row in unit.rows):
            logits = loop._model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1].double()
            total += _negative_log_probability(logits, row)
    return total / sum(unit.supervised for unit in units)


def _negative_log_probability(logits: torch.Tensor, row: Example) -> float:
    scores = torch.log_softmax(logits, 1)
    return -sum(float(scores[at, label]) for at, label in enumerate(row.labels[1:]) if label != peft_loop.IGNORE)


def test_the_command_shows_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def some(request: RowRequest) -> RowTrial:
        if request.row.bits == 16:
            raise TrialFailed("it was ended for want of memory")
        return dataclasses.replace(TRIAL, peak=14_180_000_000, eval_loss=1.25)

    monkeypatch.setattr(table, "in_process", some)
    path = str(write(tmp_path))
    shown = CliRunner().invoke(app, ["train", path, "--table", "--steps", "4"])
    assert shown.exit_code == 0, shown.output
    head, first, second, *_ = shown.stdout.splitlines()
    assert " ".join(head.split()) == "BASE BY ADAPTED RANK OPTIMIZER TRAINED STEP THE RUN PEAK LOSS EVAL LOSS"
    assert " ".join(first.split()) == "bfloat16 PEFT query and value 8 adamw - - - - - -"
    assert second.startswith("NF4       PEFT     query and value  8     adamw      5        2 s   ")
    assert second.endswith("14.18 GB  1.5000  1.2500")
    assert "bfloat16, PEFT, query and value, rank 8, adamw: it was ended for want of memory" in shown.stderr
    as_json = CliRunner().invoke(app, ["train", path, "--table", "--json"])
    rows = json.loads(as_json.stdout)
    assert [row["row"]["rank"] for row in rows] == [row.rank for row in ROWS]
    assert rows[0]["failure"]
    assert rows[1]["trial"]["peak"] == 14_180_000_000
    alone = CliRunner().invoke(app, ["train", path, "--steps", "4"])
    assert alone.exit_code == ExitCode.REFUSED
    assert "--steps is of --table" in alone.stderr

    for flags, said in (
        (["--table", "--check"], "--check and --table are several commands"),
        (["--plan", "--publish", "a"], "--plan trains no adapter that --publish could push"),
        (["--check", "--steps", "4"], "--steps is of --table"),
        (["--table", "--if-better-than", "base"], "--if-better-than says when to publish"),
    ):
        refused = CliRunner().invoke(app, ["train", path, *flags])
        assert (refused.exit_code, refused.stdout) == (ExitCode.REFUSED, "")
        assert said in refused.stderr

    def never(_: RowRequest) -> RowTrial:
        raise TrialFailed("no")

    monkeypatch.setattr(table, "in_process", never)
    failed = CliRunner().invoke(app, ["train", path, "--table"])
    assert failed.exit_code != 0
    assert "no row could be measured" in failed.stderr


def test_terminated_in_the_middle_it_shows_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGTERM unwinds, so that the process of the row ends too, with what it wrote."""
    unwound: list[bool] = []

    def some(request: RowRequest) -> RowTrial:
        if request.row == ROWS[1]:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                unwound.append(True)
        return TRIAL

    def by_default(number: int, frame: object) -> None:
        raise AssertionError

    monkeypatch.setattr(table, "in_process", some)
    before = signal.signal(signal.SIGTERM, by_default)
    try:
        shown = CliRunner().invoke(app, ["train", str(write(tmp_path)), "--table", "--json"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert shown.exit_code == ExitCode.INTERRUPTED
    assert unwound == [True]
    assert [row["row"]["bits"] for row in json.loads(shown.stdout)] == [16]
