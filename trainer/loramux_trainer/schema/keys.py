"""Names of keys: former ones, those of other trainers, and the nearest right one for a wrong one. Torch-free.

An alias stands for exactly one key with exactly its meaning. Knows no section's fields but by what it is handed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loramux_trainer.errors import JobInvalid, Problems
from loramux_trainer.schema.presets import PRESETS

RENAMED: Mapping[str, str] = {
    "data.overlong": "data.truncation",
    "lora.targets": "lora.target_modules",
    "lora.rslora": "lora.use_rslora",
    "training.schedule": "training.lr_scheduler_type",
    "training.warmup": "training.warmup_steps",
    "training.epochs": "training.num_train_epochs",
    "training.steps": "training.max_steps",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.clip": "training.max_grad_norm",
    "training.eval_every": "training.eval_steps",
    "checkpoint.every": "checkpoint.save_steps",
    "checkpoint.keep": "checkpoint.save_total_limit",
}
"""Keys as they were called before -> as they are: refused in a job, read in a checkpoint."""

RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {"training.schedule": {"constant": "constant_with_warmup"}}
"""Former key -> its values that are called otherwise under the present one."""

CALLED: Mapping[str, str] = {
    "lora.init_lora_weights": "init",
    "lora.use_dora": "method",
    "training.adam_beta1": "training.betas",
    "training.adam_beta2": "training.betas",
    "training.loss_type": "loss",
    "training.bf16": "training.compute_dtype",
    "training.fp16": "training.compute_dtype",
    "dataset_name": "data.train",
}
"""Names of PEFT, transformers and trl for what is written otherwise here -> the key to write."""

_TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "num_train_epochs", "max_steps", "warmup_steps",
    "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "optim",
    "weight_decay", "seed", "gradient_checkpointing", "eval_steps", "early_stopping_patience",
    "early_stopping_threshold", "load_best_model_at_end",
)  # fmt: skip
_OWN = {
    "warmup_ratio": "training.warmup_steps",
    "per_device_train_batch_size": "training.batch_size",
    "optim": "training.optimizer",
}
ALIASES: Mapping[str, str] = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "out_dir": "output",
    "run_name": "name",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "data.max_seq_length": "data.max_length",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "lora.r": "lora.rank",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    **{name: _OWN.get(name, f"training.{name}") for name in _TRAINING},
    **{f"training.{name}": key for name, key in _OWN.items()},
    "training.lr": "training.learning_rate",
    "bnb_4bit_use_double_quant": "training.double_quant",
    "use_bnb_nested_quant": "training.double_quant",
    "report_to": "tracking.report_to",
    "training.report_to": "tracking.report_to",
    "plot_loss": "tracking.plot",
    "save_steps": "checkpoint.save_steps",
    "save_total_limit": "checkpoint.save_total_limit",
}
"""Names of trl, transformers, PEFT and litgpt -> the key that they mean."""

_LIKE = 0.75  # of two names, from 0 to 1: below, one is not taken for the other mistyped

VALUE_ALIASES: Mapping[str, Mapping[str, str]] = {
    "training.optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw",
        "lion_32bit": "lion",
    },
    "training.lr_scheduler_type": {"wsd": "warmup_stable_decay"},
    "init": {"lora_ga": "lora-ga"},
}
"""Key -> other names of its values."""


def canonical(values: Mapping[str, Any], problems: Problems) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a job under our names, with presets written out, and key -> the alias that it was given by.

    What is not a mapping stays as it is, for the schema to refuse. Adds to `problems`.
    """
    job = {name: dict(section) if isinstance(section, Mapping) else section for name, section in values.items()}
    spelled: dict[str, str] = {}
    for alias, key in ALIASES.items():
        if (place := _place(job, alias)) is None:
            continue
        value = place.pop(alias.rpartition(".")[2])
        section, _, name = key.rpartition(".")
        target = job.setdefault(section, {}) if section else job
        if not isinstance(target, dict):
            continue  # the schema refuses the section
        if name in target:
            problems.add(JobInvalid(alias, f"is another name of {spelled.get(key, key)}, which is given too; keep one"))
        elif alias.endswith("warmup_ratio") and isinstance(value, (int, float)) and value >= 1:
            problems.add(JobInvalid(alias, f"must be below 1, not {value!r}; steps are training.warmup_steps"))
        else:
            target[name], spelled[key] = value, alias
    for key, names in VALUE_ALIASES.items():
        place, name = _place(job, key), key.rpartition(".")[2]
        if place is not None and isinstance(place[name], str):
            place[name] = names.get(place[name], place[name])
    _write_out(job, problems)
    return job, spelled


def _write_out(job: dict[str, Any], problems: Problems) -> None:
    """What a job may give in a shorter form."""
    if isinstance(job.get("loss"), str):
        job["loss"] = {"name": job["loss"]}
    lora = job.get("lora")
    if not isinstance(lora, dict):
        return
    if isinstance(layer := lora.get("layers_to_transform"), int) and not isinstance(layer, bool):
        lora["layers_to_transform"] = [layer]
    if (name := lora.pop("preset", None)) is not None:
        if isinstance(name, str) and name in PRESETS:
            job["lora"] = {**PRESETS[name], **lora}
        else:
            problems.add(JobInvalid("lora.preset", f"must be one of {', '.join(PRESETS)}, not {name!r}"))


def _place(job: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The mapping that holds the dotted `key`, None where none does."""
    section, _, name = key.rpartition(".")
    place = job.get(section) if section else job
    return place if isinstance(place, dict) and name in place else None


def hints(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, str]:
    """What is said of unknown keys of `values` and of former values; `known` are all dotted keys there are."""
    known = tuple(known)
    return {
        **{key: nearest for key in _leaves(values) if key not in known and (nearest := _nearest(key, known))},
        **{key: f"was renamed to {present}" for key, present in RENAMED.items()},
        **{key: f"is called {ours} here" for key, ours in CALLED.items()},
        **{
            f"training.lr_scheduler_type={name}": f"{name!r} follows the loss, not the step; take another schedule"
            for name in ("greedy", "reduce_lr_on_plateau")
        },
    }


def _leaves(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield str(name)
        if isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)


def _nearest(key: str, known: tuple[str, ...]) -> str | None:
    """A message where the likest key is in another section; None where its own has it, or none is like it."""
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> tuple[float, bool]:
        place, _, other = candidate.rpartition(".")
        return difflib.SequenceMatcher(None, name, other).ratio(), place == section

    likest = max((*known, *ALIASES, "lora.preset"), key=likeness)
    if likeness(likest)[0] < _LIKE or (likest in known and likest.rpartition(".")[0] == section):
        return None
    return f"unknown key; did you mean {ALIASES.get(likest, likest)}?"
