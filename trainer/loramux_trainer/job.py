"""A training job as one frozen schema: the YAML file is the job, key for key.

Checks everything that can be checked without the model and the data, and names every mistake by its dotted key.
"""

from __future__ import annotations

import dataclasses
import json
import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from loramux_adapters.formats.limits import MAX_RANK
from loramux_trainer.errors import JobInvalid, Problems
from loramux_trainer.schedule import warmup_length
from loramux_trainer.schema import Bounds, build

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


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are and how they become tokens."""

    train: Path
    eval: Path | None = None
    eval_fraction: float = field(default=0.0, metadata=Bounds(low=0.0, high=0.5).metadata)
    max_length: int = field(default=1024, metadata=Bounds(low=2).metadata)  # tokens per example
    truncation: Literal["drop", "truncate"] = "drop"
    keep_duplicates: bool = False

    @classmethod
    def contradictions(cls, values: Mapping[str, Any]) -> Iterator[JobInvalid]:
        """Eval examples from two places."""
        if values.get("eval") is not None and values.get("eval_fraction"):
            yield JobInvalid("data.eval_fraction", "give either an eval file or an eval fraction, not both")


@dataclass(frozen=True)
class LoraConfig:
    """The adapter's shape.

    `target_modules`: all-linear, a list of name suffixes, or one regular expression for full names.
    """

    target_modules: Targets = "all-linear"
    rank: int = field(default=16, metadata=Bounds(low=1, high=MAX_RANK).metadata)
    alpha: float = field(default=32.0, metadata=Bounds(above=0.0).metadata)
    use_rslora: bool = False
    dropout: float = field(default=0.0, metadata=Bounds(low=0.0, below=1.0).metadata)

    @classmethod
    def contradictions(cls, values: Mapping[str, Any]) -> Iterator[JobInvalid]:
        """An adapter of nothing."""
        if "target_modules" in values and not values["target_modules"]:
            yield JobInvalid("lora.target_modules", "names no module")


@dataclass(frozen=True)
class OptimConfig:
    """The optimization.

    `max_steps` overrides `num_train_epochs`; `warmup_steps` below 1 is a share of all steps, else steps.
    """

    learning_rate: float = field(default=2e-4, metadata=Bounds(above=0.0, high=1.0).metadata)
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: float = field(default=0.03, metadata=Bounds(low=0.0).metadata)
    num_train_epochs: int = field(default=3, metadata=Bounds(low=1).metadata)
    max_steps: int | None = field(default=None, metadata=Bounds(low=1).metadata)
    batch_size: int = field(default=8, metadata=Bounds(low=1).metadata)
    gradient_accumulation_steps: int = field(default=1, metadata=Bounds(low=1).metadata)
    max_grad_norm: float | None = field(default=1.0, metadata=Bounds(above=0.0).metadata)
    weight_decay: float = field(default=0.0, metadata=Bounds(low=0.0, below=1.0).metadata)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=Bounds(low=0.0, below=1.0).metadata)
    seed: int = field(default=0, metadata=Bounds(low=0, high=2**31 - 1).metadata)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 elsewhere
    gradient_checkpointing: bool = False
    eval_steps: int | None = field(default=None, metadata=Bounds(low=1).metadata)  # steps; None: each epoch

    @classmethod
    def contradictions(cls, values: Mapping[str, Any]) -> Iterator[JobInvalid]:
        """A warm-up that leaves no step; of epochs the run alone knows how many steps they are."""
        if values.get("max_steps") is not None and "warmup_steps" in values:
            try:
                warmup_length(values["warmup_steps"], values["max_steps"])
            except JobInvalid as error:
                yield error


@dataclass(frozen=True)
class CheckpointConfig:
    """How often, in steps, the whole state is saved; 0 saves only when the run is stopped or about to export."""

    save_steps: int = field(default=200, metadata=Bounds(low=0).metadata)
    save_total_limit: int = field(default=2, metadata=Bounds(low=1).metadata)


@dataclass(frozen=True)
class TrainConfig:
    """One adapter by supervised fine-tuning. `model`: a hub id, a directory, or `loramux-tiny`, the embedded base."""

    model: str
    output: Path
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    training: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        problems = Problems()
        for section in (self.data, self.lora, self.training):
            for problem in section.contradictions(vars(section)):
                problems.add(problem)
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
    """What is said of names that are not keys, or not values, of a job."""
    return {
        **{key: f"is now {present}" for key, present in RENAMED.items()},
        **{key: f"is called {ours} here" for key, ours in _CALLED.items()},
        **{
            f"{key}={value}": f"{value!r} is now {present}"
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobInvalid("", f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobInvalid("", f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_job(values, root=path.parent)


def parse_job(values: Mapping[str, Any], *, root: Path = Path()) -> TrainConfig:
    """Build a job from plain values; relative paths are joined to `root`. Raises JobInvalid with the dotted
    key, and SeveralInvalid where there are several.
    """
    job: TrainConfig = build(TrainConfig, values, "", _hints())
    data = dataclasses.replace(
        job.data,
        train=_located(root, job.data.train),
        eval=None if job.data.eval is None else _located(root, job.data.eval),
    )
    # A model given as a path is one only if it exists there: "org/name" stays a hub id.
    local = _located(root, job.model)
    model = str(local) if job.model.startswith((".", "/", "~")) or local.is_dir() else job.model
    return dataclasses.replace(job, model=model, output=_located(root, job.output), data=data)


def _located(root: Path, path: Path | str) -> Path:
    return root / os.path.expanduser(path)  # Path.expanduser raises where there is no such user
