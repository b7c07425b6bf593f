"""The job schema: defaults, YAML, and one precise error per mistake."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramux_trainer.errors import JobInvalid, SeveralInvalid
from loramux_trainer.job import DataConfig, OptimConfig, TrainConfig, parse_job, read_job
from loramux_trainer.schema.keys import ALIASES

MINIMAL = {"model": "org/name", "output": "out", "data": {"train": "train.jsonl"}}


def test_minimal_job_gets_defaults_and_paths_relative_to_its_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: org/name\noutput: out\ndata: {train: train.jsonl}\ntraining: {learning_rate: 2e-4}\n")
    job = read_job(file)
    assert job.model == "org/name"
    assert job.output == tmp_path / "out"
    assert job.data.train == tmp_path / "train.jsonl"
    assert job.training.learning_rate == 2e-4  # YAML 1.1 reads 2e-4 as a string
    assert job.lora.target_modules == "all-linear"
    assert job.scale == 2.0


def test_a_local_directory_is_a_model_and_rslora_scales_by_the_root(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    job = parse_job({**MINIMAL, "model": "base", "lora": {"rank": 16, "alpha": 8, "use_rslora": True}}, root=tmp_path)
    assert job.model == str(tmp_path / "base")
    assert job.scale == 2.0


def test_a_home_directory_is_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"train": "~/train.jsonl", "eval": "~no-such-user/eval.jsonl"}
    job = parse_job({"model": "~/base", "output": "~/out", "data": data}, root=Path("/elsewhere"))
    assert (job.model, job.output) == (str(tmp_path / "base"), tmp_path / "out")
    assert job.data.train == tmp_path / "train.jsonl"
    assert job.data.eval == Path("/elsewhere/~no-such-user/eval.jsonl")


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"model": None}, "model", "must be a non-empty string"),
        ({"data": {}}, "data.train", "is required"),
        ({"data": "train.jsonl"}, "data", "must be a mapping"),
        ({"data": {"train": 3}}, "data.train", "must be a path"),
        ({"data": {"train": "t", "eval_fracton": 0.1}}, "data.eval_fracton", "did you mean eval_fraction?"),
        ({"data": {"train": "t", "eval": "e", "eval_fraction": 0.1}}, "data.eval_fraction", "not both"),
        ({"data": {"train": "t", "eval_fraction": 0.9}}, "data.eval_fraction", "must be at most 0.5"),
        ({"data": {"train": "t", "truncation": "cut"}}, "data.truncation", "must be one of drop, truncate"),
        ({"lora": {"rank": 0}}, "lora.rank", "must be at least 1"),
        ({"lora": {"rank": 2.5}}, "lora.rank", "must be a whole number"),
        ({"lora": {"rank": True}}, "lora.rank", "must be a number"),
        ({"lora": {"dropout": 1}}, "lora.dropout", "must be below 1"),
        ({"lora": {"use_rslora": "yes please"}}, "lora.use_rslora", "must be true or false"),
        ({"lora": {"target_modules": []}}, "lora.target_modules", "names no module"),
        ({"lora": {"target_modules": [1]}}, "lora.target_modules[0]", "must be a non-empty string"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate", "must be above 0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate", "must be finite"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate", "must be a number"),
        (
            {"training": {"lr_scheduler_type": "wavy"}},
            "training.lr_scheduler_type",
            "must be one of cosine, linear, constant_with_warmup",
        ),
        ({"training": {"betas": [0.9]}}, "training.betas", "must have 2 items"),
        ({"training": {"betas": [0.9, 1.0]}}, "training.betas[1]", "must be below 1"),
        (
            {"training": {"max_steps": 9, "num_train_epochs": 2}},
            "training.num_train_epochs",
            "max_steps is in its place",
        ),
        ({"method": "galore", "training": {"weight_decay": 0.1}}, "training.weight_decay", "decays the frozen weight"),
        ({"training": {"max_steps": 10, "warmup_steps": 10}}, "training.warmup_steps", "leaves none of 10"),
        ({"checkpoint": {"save_total_limit": 0}}, "checkpoint.save_total_limit", "must be at least 1"),
        ({"surprise": 1}, "surprise", "unknown key"),
    ],
)
def test_each_mistake_is_named(change: dict[str, object], field: str, says: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        parse_job({**MINIMAL, **change})
    assert caught.value.field == field
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"data": {"train": "t", "overlong": "drop"}}, "data.overlong", "was renamed to data.truncation"),
        ({"lora": {"targets": "all-linear"}}, "lora.targets", "was renamed to lora.target_modules"),
        ({"lora": {"rslora": True}}, "lora.rslora", "was renamed to lora.use_rslora"),
        ({"lora": {"use_dora": True}}, "lora.use_dora", "is called method here"),
        ({"training": {"adam_beta1": 0.9}}, "training.adam_beta1", "is called training.betas here"),
        ({"training": {"schedule": "linear"}}, "training.schedule", "was renamed to training.lr_scheduler_type"),
        ({"training": {"warmup": 3}}, "training.warmup", "was renamed to training.warmup_steps"),
        ({"training": {"epochs": 1}}, "training.epochs", "was renamed to training.num_train_epochs"),
        ({"training": {"steps": 1}}, "training.steps", "was renamed to training.max_steps"),
        (
            {"training": {"accumulation": 2}},
            "training.accumulation",
            "was renamed to training.gradient_accumulation_steps",
        ),
        ({"training": {"clip": 1.0}}, "training.clip", "was renamed to training.max_grad_norm"),
        ({"training": {"eval_every": 5}}, "training.eval_every", "was renamed to training.eval_steps"),
        ({"checkpoint": {"every": 5}}, "checkpoint.every", "was renamed to checkpoint.save_steps"),
        ({"checkpoint": {"keep": 5}}, "checkpoint.keep", "was renamed to checkpoint.save_total_limit"),
    ],
)
def test_a_former_key_is_refused_with_the_present_one(change: dict[str, object], field: str, says: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        parse_job({**MINIMAL, **change})
    assert str(caught.value) == f"{field} {says}"
    assert (caught.value.field, caught.value.message) == (field, says)


@pytest.mark.parametrize("data", [{}, {"eval_fraction": 0.0}])
def test_when_to_evaluate_needs_something_to_evaluate(data: dict[str, Any]) -> None:
    values = {**MINIMAL, "data": {"train": "train.jsonl", **data}, "training": {"eval_steps": 5}}
    with pytest.raises(JobInvalid, match=r"^training\.eval_steps: needs an eval loss; set data\.eval"):
        parse_job(values)
    for given in ({"eval": "eval.jsonl"}, {"eval_fraction": 0.1}):
        assert parse_job({**values, "data": {"train": "train.jsonl", **given}}).training.eval_steps == 5


def test_all_mistakes_are_named_at_once_one_line_each() -> None:
    values = {
        "modle": "org/name",
        "data": {"train": 3, "eval": "e", "eval_fraction": 0.1, "truncation": "cut"},
        "lora": {"rank": 0, "target_modules": []},
        "training": {"betas": [1, 2], "max_steps": 10, "warmup_steps": 10, "seed": -1},
        "checkpoint": "often",
    }
    with pytest.raises(SeveralInvalid) as caught:
        parse_job(values)
    expected = [
        "modle", "model", "output", "data.train", "data.truncation", "data.eval_fraction", "lora.rank",
        "lora.target_modules", "training.betas[0]", "training.betas[1]", "training.seed", "training.warmup_steps",
        "checkpoint",
    ]  # fmt: skip
    first, *lines = str(caught.value).splitlines()
    assert first == "13 things are wrong:"
    assert sorted(line.strip().partition(": ")[0] for line in lines) == sorted(expected)


def test_a_job_made_in_python_is_held_to_the_same() -> None:
    with pytest.raises(SeveralInvalid) as caught:
        TrainConfig(
            "org/name",
            Path("out"),
            DataConfig(Path("t"), eval=Path("e"), eval_fraction=0.1),
            training=OptimConfig(max_steps=10, warmup_steps=10),
        )
    assert [problem.field for problem in caught.value.problems if isinstance(problem, JobInvalid)] == [
        "data.eval_fraction",
        "training.warmup_steps",
    ]


PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_job_of_the_page_on_training_has_the_defaults() -> None:
    values = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])
    assert values["data"].pop("eval_fraction") == 0.05  # instead of eval
    documented = parse_job(values).to_dict()
    assert documented == parse_job({**MINIMAL, "model": values["model"], "output": values["output"]}).to_dict()
    shown = {f"{part}.{key}" for part, section in values.items() if isinstance(section, dict) for key in section}
    assert shown >= {"lora.rank", "training.learning_rate", "checkpoint.save_steps"}


def test_the_table_of_keys_has_every_key_with_its_default_and_its_other_names() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.partition("\n## Keys\n")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]
    job = TrainConfig("model", Path("out"), DataConfig(Path("t")))
    expected: dict[str, object] = {}
    for name, value in vars(job).items():
        section = vars(value) if dataclasses.is_dataclass(value) else None
        expected |= {name: value} if section is None else {f"{name}.{key}": each for key, each in section.items()}
    expected |= {"name": None, "training.lr_scheduler_kwargs": {}}  # what is written, not what it becomes
    required = {"model", "output", "data.train"}
    documented = {row[0].strip("`"): row[1] for row in rows}
    assert list(documented) == list(expected)
    assert {key for key, default in documented.items() if default == "required"} == required
    for key in documented.keys() - required:
        default = yaml.safe_load(documented[key].strip("`"))
        value = expected[key]
        assert default == (list(value) if isinstance(value, tuple) else value), key
    assert {row[0].strip("`"): set(row[2].replace("`", "").split(", ")) - {""} for row in rows} == {
        key: {alias for alias, meant in ALIASES.items() if meant == key} for key in expected
    }


@pytest.mark.parametrize("text", ["[1, 2", "just words", "- a\n- b", "\x00"])
def test_what_is_no_job_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(JobInvalid):
        read_job(file)


def test_a_missing_job_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobInvalid, match="No such file"):
        read_job(tmp_path / "none.yaml")


def test_what_decides_the_bytes() -> None:
    deciding = parse_job(MINIMAL).reproducibility_key()
    data = {**MINIMAL["data"], "eval": "eval.jsonl"}
    same = {"output": "elsewhere", "data": data, "checkpoint": {"save_steps": 5}, "training": {"eval_steps": 3}}
    assert parse_job({**MINIMAL, **same}).reproducibility_key() == deciding
    assert parse_job({**MINIMAL, "lora": {"rank": 8}}).reproducibility_key() == {**deciding, "lora.rank": 8}
    assert parse_job({**MINIMAL, "training": {"seed": 1}}).reproducibility_key() == {**deciding, "training.seed": 1}
