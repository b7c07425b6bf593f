"""A training job as one frozen schema: the YAML file is the job, key for key.

Checks everything that can be checked without the model and the data, and names every mistake by its dotted key.
"""

from __future__ import annotations

import dataclasses
import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from loramux_adapters.formats.limits import MAX_RANK
from loramux_adapters.text_files import TextFileInvalid, read_yaml
from loramux_adapters.validation import (
    FilePath,
    Number,
    OneOrMore,
    Section,
    Text,
    ValuesInvalid,
    Whole,
    YesNo,
    read,
)
from loramux_trainer.data_config import DataConfig
from loramux_trainer.errors import JobInvalid, KeyRenamed, Problems
from loramux_trainer.schedule import warmup_length

T = TypeVar("T")
Targets = str | tuple[str, ...]

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

_RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    "training.lr_scheduler_type": {"constant": "constant_with_warmup"},
}
# Names of PEFT and transformers that are another word here.
_CALLED: Mapping[str, str] = {
    "lora.r": "lora.rank",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "training.per_device_train_batch_size": "training.batch_size",
    "training.warmup_ratio": "training.warmup_steps",
}
# Paths do not decide the trained bytes (what lies there has digests of its own), nor does when to evaluate.
_NOT_IN_KEY = frozenset({"data.train", "data.eval", "training.eval_steps"})


def _two(value: object) -> object:
    if isinstance(value, (list, tuple)) and len(value) != 2:
        raise ValueError(f"must have 2 items, not {len(value)}")
    return value


Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Whole, Field(ge=1)]


@dataclass(frozen=True)
class LoraConfig(Section):
    """The adapter's shape.

    `target_modules`: all-linear, a list of name suffixes, or one regular expression for full names.
    """

    target_modules: OneOrMore = "all-linear"
    rank: Annotated[Count, Field(le=MAX_RANK)] = 16
    alpha: Positive = 32.0
    use_rslora: YesNo = False
    dropout: Share = 0.0

    @field_validator("target_modules")
    @classmethod
    def _is_of_something(cls, targets: Targets) -> Targets:
        if not targets:
            raise ValueError("names no module")
        return targets


@dataclass(frozen=True)
class OptimConfig(Section):
    """The optimization.

    `max_steps` overrides `num_train_epochs`; `warmup_steps` below 1 is a share of all steps, else steps.
    """

    learning_rate: Annotated[Positive, Field(le=1)] = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    num_train_epochs: Count = 3
    max_steps: Count | None = None
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.03
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    max_grad_norm: Positive | None = 1.0
    weight_decay: Share = 0.0
    betas: Annotated[tuple[Share, Share], BeforeValidator(_two)] = (0.9, 0.999)
    seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 elsewhere
    gradient_checkpointing: YesNo = False
    eval_steps: Count | None = None  # None: each epoch

    @field_validator("warmup_steps")
    @classmethod
    def _leaves_steps(cls, warmup: float, others: ValidationInfo) -> float:
        if others.data.get("max_steps") is not None:  # how many steps the epochs are depends on the data
            try:
                warmup_length(warmup, others.data["max_steps"])
            except JobInvalid as error:
                raise ValueError(error.message) from error
        return warmup


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """How often, in steps, the whole state is saved; 0 saves only when the run is stopped or about to export."""

    save_steps: Annotated[Whole, Field(ge=0)] = 200
    save_total_limit: Count = 2


@dataclass(frozen=True)
class TrainConfig(Section):
    """One adapter by supervised fine-tuning. `model`: a hub id, a directory, or `loramux-tiny`, the embedded base."""

    model: Text
    output: FilePath
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    training: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("data", "lora", "training", "checkpoint"):  # made in Python, they have not been looked at
            section = getattr(self, name)
            with problems.collecting():
                _read(type(section), vars(section), at=name)
        problems.raise_any()

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rslora."""
        return self.lora.alpha / (self.lora.rank**0.5 if self.lora.use_rslora else self.lora.rank)

    def reproducibility_key(self) -> dict[str, Any]:
        """Dotted key -> JSON value of everything that decides the trained bytes, data and base aside.

        What a checkpoint is resumed by.
        """
        facts = self.to_dict()
        keys = {f"{part}.{key}": value for part in ("data", "lora", "training") for key, value in facts[part].items()}
        return {key: value for key, value in keys.items() if key not in _NOT_IN_KEY}

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON values, as it is written beside the adapter."""
        facts: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return facts


def _hints() -> dict[str, str]:
    """Messages for former and foreign names of keys and values."""
    return {
        **{key: f"was renamed to {present}" for key, present in RENAMED.items()},
        **{key: f"is called {ours} here" for key, ours in _CALLED.items()},
        **{
            f"{key}={value}": f"{value!r} was renamed to {present}"
            for key, values in _RENAMED_VALUES.items()
            for value, present in values.items()
        },
    }


def renamed_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that a checkpoint was saved with, under the names that keys and values have now."""
    renamed = {RENAMED.get(key, key): value for key, value in identity.items()}
    return {
        key: _RENAMED_VALUES[key].get(value, value) if key in _RENAMED_VALUES else value
        for key, value in renamed.items()
    }


def read_job(path: Path) -> TrainConfig:
    """Read a YAML job; relative paths in it are relative to the file. Raises JobInvalid and SeveralInvalid."""
    try:
        values = read_yaml(path)
    except OSError as error:
        raise JobInvalid("", f"cannot read {path}: {error.strerror}") from error
    except TextFileInvalid as error:
        raise JobInvalid("", str(error), remedy=error.remedy) from error
    if not isinstance(values, dict):
        raise JobInvalid("", f"{path}: not a mapping of keys", remedy="write lines like `model: loramux-tiny`")
    return parse_job(values, root=path.parent)


def parse_job(values: Mapping[str, Any], *, root: Path = Path()) -> TrainConfig:
    """Build a job from plain values; relative paths are joined to `root`. Raises JobInvalid with the dotted
    key, and SeveralInvalid where there are several.
    """
    job = _read(TrainConfig, values)
    data = dataclasses.replace(
        job.data,
        train=_located(root, job.data.train),
        eval=None if job.data.eval is None else _located(root, job.data.eval),
    )
    # A model given as a path is one only if it exists there: "org/name" stays a hub id.
    local = _located(root, job.model)
    model = str(local) if job.model.startswith((".", "/", "~")) or local.is_dir() else job.model
    return dataclasses.replace(job, model=model, output=_located(root, job.output), data=data)


def _read(section: type[T], values: object, at: str = "") -> T:
    try:
        return read(section, values, hints=_hints(), at=at)
    except ValuesInvalid as error:
        problems = Problems()
        for key, rule in error.findings:
            problems.add(KeyRenamed(key, rule) if key in RENAMED or key in _CALLED else JobInvalid(key, rule))
        raise problems.whole() from error


def _located(root: Path, path: Path | str) -> Path:
    return root / os.path.expanduser(path)  # Path.expanduser raises where there is no such user
