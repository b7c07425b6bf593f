"""Keys of a job: which take effect, other trainers' names for them, presets, and the nearest right key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.validation import Section
from loramux_trainer.errors import JobInvalid, SeveralInvalid
from loramux_trainer.job import DataConfig, LoraConfig, OptimConfig, TrainConfig, parse_job, renamed_identity
from loramux_trainer.schema.effect import without_effect
from loramux_trainer.schema.keys import ALIASES, RENAMED

MINIMAL: dict[str, Any] = {"model": "org/name", "output": "out", "data": {"train": "train.jsonl"}}


def parse(**values: Any) -> TrainConfig:
    return parse_job({**MINIMAL, **values})


def value_at(job: TrainConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(job, section) if section else job, name)


# Methods and what they read


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"method": "ia3", "lora": {"rank": 16}}, "lora.rank", "method ia3 does not read it"),
        ({"method": "prompt", "lora": {"target_modules": "all-linear"}}, "lora.target_modules", "method prompt"),
        ({"method": "loha", "lora": {"dropout": 0.1}}, "lora.dropout", "method loha does not read it"),
        ({"method": "galore", "lora": {"rank": 4}}, "lora.rank", "its rank is galore.rank"),
        ({"method": "adalora", "lora": {"use_rslora": True}}, "lora.use_rslora", "read by lora, rslora, dora"),
        ({"lora": {"feedforward_modules": ["w"]}}, "lora.feedforward_modules", "it is read by ia3"),
        ({"prompt": {"num_virtual_tokens": 8}}, "prompt.num_virtual_tokens", "read by prompt, p-tuning, prefix"),
        (
            {"method": "prefix", "prompt": {"prompt_tuning_init_text": "a"}},
            "prompt.prompt_tuning_init_text",
            "it is read by prompt",
        ),
        ({"method": "prefix", "prompt": {"encoder_hidden_size": 4}}, "prompt.encoder_hidden_size", "prefix_projection"),
        ({"method": "p-tuning", "prompt": {"encoder_num_layers": 3}}, "prompt.encoder_num_layers", "LSTM"),
        ({"galore": {"rank": 4}}, "galore.rank", "read by galore"),
        ({"method": "vera", "lora": {"bias": "all"}}, "lora.bias", "method vera does not read it"),
        ({"method": "vera", "init": "A"}, "init", "vera has no factors to initialize"),
        ({"lora": {"rank_budget": 4}}, "lora.rank_budget", "init A exports the rank it trains"),
        ({"training": {"optimizer": "sgd", "betas": [0.9, 0.999]}}, "training.betas", "optimizer sgd does not read it"),
        ({"training": {"momentum": 0.9}}, "training.momentum", "read by sgd, muon"),
        ({"training": {"hessian_update_period": 5}}, "training.hessian_update_period", "read by sophia"),
        (
            {"training": {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}}},
            "training.lr_scheduler_kwargs.num_cycles",
            "linear does not read it",
        ),
        ({"training": {"lr_scheduler_type": "constant", "warmup_steps": 5}}, "training.warmup_steps", "no warm-up"),
        ({"method": "rslora", "lora": {"use_rslora": False}}, "lora.use_rslora", "contradicts method rslora"),
        ({"method": "ia3", "training": {"weight_decay": 0.1}}, "training.weight_decay", "trains vectors"),
        ({"method": "vera", "training": {"weight_decay": 0.1}}, "training.weight_decay", "trains vectors"),
        ({"method": "bitfit", "training": {"weight_decay": 0.1}}, "training.weight_decay", "trains vectors"),
    ],
)  # fmt: skip
def test_a_key_that_would_not_take_effect_is_refused(values: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        parse(**values)
    assert caught.value.field == field
    assert says in caught.value.message


@pytest.mark.parametrize(
    "values",
    [
        {"method": "dora", "init": "pissa", "lora": {"rank_budget": 16, "use_rslora": True, "loraplus_lr_ratio": 16}},
        {"method": "adalora", "adalora": {"init_r": 24}, "lora": {"rank": 16, "alpha": 4, "dropout": 0.1}},
        {"method": "lokr", "lora": {"rank": 8, "rank_pattern": {"q_proj": 4}}},
        {"method": "ia3", "lora": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
        {"method": "bitfit", "bitfit": {"norms": True}},
        {"method": "p-tuning", "prompt": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}},
        {"method": "prefix", "prompt": {"prefix_projection": True, "encoder_hidden_size": 8}},
        {"method": "bottleneck", "bottleneck": {"kind": "houlsby"}},
        {"method": "galore", "galore": {"rank": 4}, "lora": {"target_modules": ["q_proj"]}},
        {"method": "vera", "lora": {"rank": 256}},
        {"training": {"optimizer": "muon", "momentum": 0.9, "betas": [0.8, 0.9]}},
        {"training": {"lr_scheduler_type": "constant"}},
        {"loss": "sft", "init": "B"},
        {"method": "prompt"},
    ],
    ids=str,
)
def test_what_a_method_reads_is_taken_and_the_job_written_out_reads_back_as_itself(values: dict[str, Any]) -> None:
    job = parse(**values)
    again = parse_job(job.to_dict())
    assert again == job
    assert again.reproducibility_key() == job.reproducibility_key()


def test_a_key_that_is_not_given_is_not_refused() -> None:
    assert parse(lora={"feedforward_modules": None, "rank_budget": None}) == parse()


def test_a_job_made_in_python_is_refused_for_the_same() -> None:
    with pytest.raises(SeveralInvalid) as caught:
        TrainConfig(
            "m",
            Path("o"),
            DataConfig(Path("t")),
            method="ia3",
            init="eva",
            lora=LoraConfig(rank=4),
            training=OptimConfig(momentum=0.5),
        )
    assert {problem.field for problem in caught.value.problems if isinstance(problem, JobInvalid)} == {
        "init", "lora.rank", "training.momentum",
    }  # fmt: skip
    with pytest.raises(JobInvalid, match="method: must be one of lora, rslora"):
        TrainConfig("m", Path("o"), DataConfig(Path("t")), method="lorra")  # type: ignore[arg-type]


def test_every_key_of_a_section_of_shape_is_read_by_some_method() -> None:
    """A key that nobody reads could be given and refused only."""
    job = parse()
    for section in ("lora", "adalora", "bitfit", "prompt", "bottleneck", "galore"):
        value: Section = getattr(job, section)
        for key in vars(value):
            reasons = [
                dict(without_effect({"method": method, "init": init, section: {key: 1, **extra}}))
                for method in (
                    "lora",
                    "adalora",
                    "ia3",
                    "bitfit",
                    "prompt",
                    "p-tuning",
                    "prefix",
                    "bottleneck",
                    "galore",
                )
                for init in (None, "pissa")
                for extra in ({}, {"prefix_projection": True}, {"encoder_reparameterization_type": "LSTM"})
            ]
            assert any(f"{section}.{key}" not in reason for reason in reasons), f"{section}.{key}"


# Defaults of the optimizer


@pytest.mark.parametrize(
    ("optimizer", "betas", "momentum", "period"),
    [
        ("adamw", (0.9, 0.999), None, None),
        ("lion", (0.9, 0.99), None, None),
        ("sophia", (0.96, 0.99), None, 10),
        ("muon", (0.9, 0.999), 0.95, None),
        ("sgd", (0.9, 0.999), 0.0, None),
    ],
)
def test_an_optimizer_has_its_own_defaults(optimizer: str, betas: Any, momentum: Any, period: Any) -> None:
    training = parse(training={"optimizer": optimizer}).training
    assert (training.betas, training.momentum, training.hessian_update_period) == (betas, momentum, period)


def test_given_values_win_over_the_defaults_of_the_optimizer() -> None:
    training = parse(training={"optimizer": "sgd", "momentum": 0.9}).training
    assert training.momentum == 0.9


def test_rslora_has_two_names_and_is_one_method() -> None:
    by_method, by_flag = parse(method="rslora"), parse(lora={"use_rslora": True})
    assert by_method == by_flag
    assert by_method.scale == 32 / 16**0.5
    assert parse(method="dora", lora={"use_rslora": True}).method == "dora"


# Aliases and presets

VALUES = {
    "training.lr_scheduler_type": "linear", "training.optimizer": "sgd", "training.gradient_checkpointing": True,
    "training.double_quant": True, "training.load_best_model_at_end": True,
    "lora.target_modules": ["q_proj"], "lora.use_rslora": True, "lora.dropout": 0.1, "training.weight_decay": 0.1,
    "training.warmup_steps": 0.1, "training.lr_scheduler_kwargs": {"num_cycles": 0.25}, "model": "org/other",
    "output": "elsewhere", "name": "n1", "training.learning_rate": 1e-3, "training.max_grad_norm": 0.5,
    "tracking.report_to": ["wandb"], "tracking.plot": True,
}  # fmt: skip


ON_EVALUATIONS = (
    "training.early_stopping_patience", "training.early_stopping_threshold", "training.load_best_model_at_end",
    "training.eval_steps",
)  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_says_the_same_as_the_key(alias: str) -> None:
    key = ALIASES[alias]
    value = VALUES.get(key, 7)

    def job(*names: str) -> TrainConfig:
        values: dict[str, Any] = {"model": "org/name", "output": "out", "data": {"train": "train.jsonl"}}
        if key in ON_EVALUATIONS:
            values |= {"data": {"train": "train.jsonl", "eval_fraction": 0.1}}
        if key == "training.early_stopping_threshold":
            values |= {"training": {"early_stopping_patience": 2}}
        values.pop(key, None)
        for name in names:
            section, _, last = name.rpartition(".")
            (values.setdefault(section, {}) if section else values)[last] = value
        return parse_job(values)

    assert job(alias) == job(key)
    assert job(alias) != parse()
    with pytest.raises(JobInvalid, match="is given too; keep one") as caught:
        job(alias, key)
    assert caught.value.field == alias


def test_aliases_are_no_keys_and_stand_for_keys() -> None:
    known = set(parse_job(MINIMAL).__dict__)
    for alias, key in ALIASES.items():
        assert alias not in RENAMED
        assert key not in ALIASES
        without = ("training.max_steps", "training.eval_steps", "training.early_stopping_patience")
        assert value_at(parse(), key) is not None or key in without, key
        assert "." in alias or alias not in known


def test_two_aliases_of_one_key_are_refused_too() -> None:
    with pytest.raises(JobInvalid, match=r"lora\.r: is another name of lora_r, which is given too"):
        parse(lora_r=4, lora={"r": 4})


def test_a_mistake_is_named_by_the_spelling_in_the_file() -> None:
    with pytest.raises(JobInvalid, match=r"^lora_r: must be at least 1, not 0$"):
        parse(lora_r=0)
    with pytest.raises(JobInvalid, match=r"^lora_r: method ia3 does not read it"):
        parse(method="ia3", lora_r=4)
    with pytest.raises(JobInvalid, match="warmup_ratio: must be below 1, not 3"):
        parse(training={"warmup_ratio": 3})


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"training": {"optim": "paged_adamw_32bit"}}, "training.optimizer", "paged_adamw"),
        ({"training": {"optim": "adamw_torch_fused"}}, "training.optimizer", "adamw"),
        ({"init": "lora_ga"}, "init", "lora-ga"),
        ({"lr_scheduler_type": "wsd"}, "training.lr_scheduler_type", "warmup_stable_decay"),
    ],
)
def test_other_names_of_values(values: dict[str, Any], key: str, value: str) -> None:
    assert value_at(parse(**values), key) == value


def test_presets_are_written_out_and_what_is_given_beside_them_wins() -> None:
    assert parse(lora={"preset": "full-r16"}) == parse()
    largest = parse(lora={"preset": "max-r256"}).lora
    assert (largest.rank, largest.alpha, largest.target_modules) == (256, 512.0, "all-linear")
    classic = parse(lora={"preset": "classic-qv-r8", "alpha": 8}).lora
    assert (classic.rank, classic.alpha) == (8, 8.0)
    with pytest.raises(JobInvalid, match=r"lora\.preset: must be one of classic-qv-r8, full-r16, max-r256, not 'big'"):
        parse(lora={"preset": "big"})


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"lora": {"learning_rate": 1e-3}}, "lora.learning_rate", "did you mean training.learning_rate?"),
        ({"training": {"rank": 4}}, "training.rank", "did you mean lora.rank?"),
        ({"max_grad_nrm": 1.0}, "max_grad_nrm", "did you mean training.max_grad_norm?"),
        ({"lora": {"rnak": 4}}, "lora.rnak", "did you mean rank?"),
        ({"lora": {"presets": "full-r16"}}, "lora.presets", "did you mean lora.preset?"),
        ({"lora": {"lora_alfa": 4}}, "lora.lora_alfa", "did you mean lora.alpha?"),
        ({"jobs": []}, "jobs", "is of a file of several jobs"),
        ({"training": {"lr_scheduler_type": "greedy"}}, "training.lr_scheduler_type", "follows the loss"),
    ],
)
def test_a_wrong_key_names_the_nearest_right_one(values: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        parse(**values)
    assert caught.value.field == field
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"layers_pattern": "h"}, "needs lora.layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "cannot go with a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj must be a whole number from 1 to 512, not 0"),
        ({"rank_pattern": {3: 4}}, "must be a mapping of name patterns to ranks"),
        ({"rank_pattern": ["q_proj"]}, "must be a mapping of name patterns to ranks"),
        ({"alpha_pattern": {"q_proj": "big"}}, "q_proj must be a number above 0"),
        ({"layers_to_transform": []}, "is an empty list"),
        ({"layers_to_transform": [-1]}, "must be at least 0"),
    ],
)
def test_wrong_shapes_are_refused(lora: dict[Any, Any], says: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        parse(lora=lora)
    assert says in caught.value.message


def test_one_layer_needs_no_list() -> None:
    assert parse(lora={"layers_to_transform": 2}).lora.layers_to_transform == (2,)


def test_bitfit_trains_something() -> None:
    with pytest.raises(JobInvalid, match=r"bitfit\.norms: must be true where bitfit\.biases is false"):
        parse(method="bitfit", bitfit={"biases": False})


# Checkpoints of earlier versions

SAVED_BEFORE = {
    "data.eval_fraction": 0.0, "data.max_length": 1024, "data.truncation": "drop", "data.keep_duplicates": False,
    "lora.target_modules": "all-linear", "lora.rank": 16, "lora.alpha": 32.0, "lora.use_rslora": False,
    "lora.dropout": 0.0, "training.learning_rate": 0.0002, "training.lr_scheduler_type": "cosine",
    "training.num_train_epochs": 3, "training.max_steps": None, "training.warmup_steps": 0.03,
    "training.batch_size": 8, "training.gradient_accumulation_steps": 1, "training.max_grad_norm": 1.0,
    "training.weight_decay": 0.0, "training.betas": [0.9, 0.999], "training.seed": 0, "training.device": "auto",
    "training.compute_dtype": "auto", "training.gradient_checkpointing": False,
}  # fmt: skip
"""What a checkpoint had before there were methods, of a job without any key that it may leave out."""


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_checkpoint_from_before_there_were_methods_is_of_the_same_job(use_rslora: bool) -> None:
    job = parse(lora={"use_rslora": use_rslora})
    assert renamed_identity({**SAVED_BEFORE, "lora.use_rslora": use_rslora}) == job.reproducibility_key()


def test_keys_that_decide_the_bytes_are_in_the_identity() -> None:
    plain = parse().reproducibility_key()
    for change in (
        {"method": "dora"}, {"init": "B"}, {"loss": "dpo"}, {"training": {"optimizer": "lion"}},
        {"training": {"frozen_products": "bfloat16"}}, {"training": {"deterministic": True}},
        {"lora": {"rank_pattern": {"q_proj": 4}}}, {"lora": {"loraplus_lr_ratio": 16}},
        {"training": {"lr_scheduler_kwargs": {"num_cycles": 0.4}}},
    ):  # fmt: skip
        assert parse(**change).reproducibility_key() != plain, change
    assert parse(name="another").reproducibility_key() == plain


# What is not built yet
