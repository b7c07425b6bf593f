"""`loramux train --check`: what the run would refuse, as far as the base's files and tokenizer tell it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer.data.check import check_data
from loramux_trainer.data.dataset import load_data
from loramux_trainer.data.examples import ExampleEncoder
from loramux_trainer.dry_run import check_whole_job
from loramux_trainer.errors import DataInvalid, JobInvalid, ModelInvalid, SeveralInvalid, TrainerError
from loramux_trainer.job import TrainConfig
from loramux_trainer.run import train
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import LossConfig
from support.hub_cache import cache_tiny
from support.tiny import tiny_encoder, write_jsonl

JobMaker = Callable[..., TrainConfig]


def test_a_good_job_passes_and_leaves_nothing(make_job: JobMaker, tmp_path: Path) -> None:
    assert check_whole_job(make_job(), resume=False) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_it_warns_as_the_run_does(make_job: JobMaker) -> None:
    """By the report of the run itself."""
    job = make_job(training={"max_steps": 12}, data={"eval_fraction": 0.0}, lora={"rank": 64})
    warned = check_whole_job(job, resume=False)
    train(job)
    report = json.loads((job.output / "train_report.json").read_text())
    assert warned
    assert list(warned) == report["warnings"]


def test_a_base_in_the_cache_is_looked_into_and_one_on_the_hub_is_left_to_the_run(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    job = make_job(model="org/name", lora={"target_modules": ["q_prj"]})
    assert check_whole_job(job, resume=False) is None
    cache_tiny(tmp_path / "hub", "org/name")
    with pytest.raises(JobInvalid, match=r"lora\.target_modules: q_prj names no module of org/name"):
        check_whole_job(job, resume=False)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_prj"], "q_prj names no module of loramux-tiny; its linear maps end in"),
        (r".*\.z_proj", "matches no module"),
        ("(", "not a regular expression"),
        (["input_layernorm"], "neither a linear map nor an embedding"),
    ],
)
def test_targets_are_judged(make_job: JobMaker, targets: Any, says: str) -> None:
    with pytest.raises(JobInvalid, match=f"lora.target_modules: .*{says}"):
        check_whole_job(make_job(lora={"target_modules": targets}), resume=False)


def test_everything_is_told_at_once(make_job: JobMaker) -> None:
    job = make_job(lora={"target_modules": ["q_prj"]})
    (job.output / "checkpoints" / "step-00000001").mkdir(parents=True)
    with job.data.train.open("a") as file:
        file.write('{"prompt": "a"}\n')
        file.write(json.dumps({"messages": [{"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]}) + "\n")
    with pytest.raises(SeveralInvalid) as caught:
        check_whole_job(job, resume=False)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for words in (
        "output: ",
        "lora.target_modules: ",
        "train.jsonl:41: a record needs",
        "train.jsonl:42: tools: the base's",
    ):
        assert f"  {words}" in text.replace(f"{job.data.train.parent}/", "")


def test_a_base_whose_configuration_cannot_be_read_is_told_beside_the_records(
    make_job: JobMaker, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_path(), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "nobody"}))
    job = make_job(model=str(base))
    with pytest.raises(ModelInvalid, match=r"model: .*base cannot be loaded: "):
        check_whole_job(job, resume=False)
    job.data.train.write_text("{")
    with pytest.raises(SeveralInvalid) as caught:
        check_whole_job(job, resume=False)
    assert [type(problem) for problem in caught.value.problems] == [ModelInvalid, DataInvalid]


def test_an_example_beyond_the_context_is_refused(make_job: JobMaker) -> None:
    job = make_job(data={"max_length": 4096, "eval_fraction": 0})
    job.data.train.write_text(json.dumps({"prompt": "x" * 3000, "completion": "y"}))
    with pytest.raises(JobInvalid, match=r"data\.max_length: an example has 3003 tokens, the base's context is"):
        check_whole_job(job, resume=False)


def test_a_warm_up_longer_than_the_epochs_is_refused(make_job: JobMaker) -> None:
    with pytest.raises(JobInvalid, match=r"training\.warmup_steps: warm-up of 50 steps leaves none of 5"):
        check_whole_job(make_job(training={"max_steps": None, "num_train_epochs": 1, "warmup_steps": 50}), resume=False)


def _outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except TrainerError as error:
        return str(error)


@pytest.mark.parametrize("truncation", ["drop", "truncate"])
@pytest.mark.parametrize(
    ("train", "options"),
    [
        (["a", "b", "a", "c"], {}),
        (["a", "b", "a", "c"], {"keep_duplicates": True}),
        (["a", "b"], {"eval": ["c", "a"]}),
        (["a", "b"], {"eval": ["b"]}),
        (["a", "b"], {"eval": ["much longer"]}),
        (["a", "a"], {"eval_fraction": 0.5}),
        (["much longer", "longer still"], {}),
        (["a", "much longer", "longer still", "and one more"], {"eval_fraction": 0.5}),
        (["a", "much longer", "longer still", "and one more"], {"eval_fraction": 0.25}),
        (["a", "\ue000"], {}),
    ],
)
def test_data_is_judged_as_the_run_judges_it(
    tmp_path: Path, tokenizer: Any, train: list[str], options: dict[str, Any], truncation: Any
) -> None:
    """Lengths where it passes, and to the letter what is said where it does not."""

    def write(name: str, texts: list[str]) -> Path:
        return write_jsonl(tmp_path / name, [{"prompt": "p", "completion": text} for text in texts])

    held = write("e.jsonl", options.pop("eval")) if "eval" in options else None
    job = DataConfig(write("t.jsonl", train), held, max_length=8, truncation=truncation, **options)
    encoder = tiny_encoder(tokenizer)
    for seed in range(4):
        ran = _outcome(lambda seed=seed: load_data(job, encoder, seed=seed))  # type: ignore[misc]
        checked = _outcome(lambda seed=seed: check_data(job, encoder, seed=seed))  # type: ignore[misc]
        if isinstance(ran, str):
            assert checked == ran
        else:
            assert checked.train == tuple(unit.tokens for unit in ran.train)
            assert checked.held == tuple(unit.tokens for unit in ran.eval)
            assert checked.longest == max(unit.longest for unit in (*ran.train, *ran.eval))
            assert checked.report == ran.report


def test_lines_that_only_the_tokenizer_can_tell_are_named_by_both(tmp_path: Path, tokenizer: Any) -> None:
    [_, last] = tokenizer.encode("z")
    encoder = ExampleEncoder(tokenizer, frozenset({tokenizer.eos_token_id}), last)
    records = [{"prompt": prompt, "completion": "b"} for prompt in ("a", "yz", "a", "z")]
    job = DataConfig(write_jsonl(tmp_path / "t.jsonl", records), write_jsonl(tmp_path / "e.jsonl", records[1:2]))
    for act in (check_data, load_data):
        with pytest.raises(SeveralInvalid) as caught:
            act(job, encoder, seed=0)
        found = [str(problem).removeprefix(f"{tmp_path}/")[:10] for problem in caught.value.problems]
        assert found == ["t.jsonl:2:", "t.jsonl:4:", "e.jsonl:1:"]


PAIRS = [{"prompt": "p", "chosen": text, "rejected": f"{text}{text}"} for text in ("a", "b", "a", "much longer")]


@pytest.mark.parametrize("truncation", ["drop", "truncate"])
@pytest.mark.parametrize(
    ("loss", "records", "options"),
    [
        ("sft", [{"text": text} for text in ("a", "bb", "ccc", "dddddd", "much longer")], {"packing": True}),
        ("sft", [{"text": "a"}, {"text": "bb"}], {"completion_only_loss": False, "eval_fraction": 0.5}),
        ("sft", PAIRS, {}),
        ("dpo", PAIRS, {"eval_fraction": 0.3}),
        ("dpo", [{"text": "a"}], {}),
        ("dpo", PAIRS, {"packing": True}),
        ("kto", PAIRS, {"keep_duplicates": True}),
        ("kto", [{"prompt": "p", "completion": "a", "label": label} for label in (True, False, True)], {}),
    ],
)
def test_units_are_judged_as_the_run_judges_them(
    tmp_path: Path, tokenizer: Any, loss: Any, records: list[Any], options: dict[str, Any], truncation: Any
) -> None:
    job = DataConfig(write_jsonl(tmp_path / "t.jsonl", records), max_length=8, truncation=truncation, **options)
    encoder, config = tiny_encoder(tokenizer), LossConfig(loss)
    ran = _outcome(lambda: load_data(job, encoder, seed=1, loss=config))
    checked = _outcome(lambda: check_data(job, encoder, seed=1, loss=config))
    if isinstance(ran, str):
        assert checked == ran
    else:
        assert checked.train == tuple(unit.tokens for unit in ran.train)
        assert checked.held == tuple(unit.tokens for unit in ran.eval)
        assert checked.longest == max(unit.longest for unit in (*ran.train, *ran.eval))
        assert checked.report == ran.report
