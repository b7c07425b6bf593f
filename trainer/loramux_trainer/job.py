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
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import Field, field_validator

from loramux_adapters.names import NAME
from loramux_adapters.text_files import TextFileInvalid, read_yaml
from loramux_adapters.validation import FilePath, Section, Text, ValuesInvalid, Whole, read
from loramux_trainer.errors import JobInvalid, KeyRenamed, Problems, SeveralInvalid
from loramux_trainer.schema.adapter_config import (
    SHAPES,
    AdaloraConfig,
    BitfitConfig,
    BottleneckConfig,
    GaloreConfig,
    LoraConfig,
    PromptConfig,
    Targets,
)
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.effect import Init, Method, without_effect
from loramux_trainer.schema.engine import Engine, unread_by_engine
from loramux_trainer.schema.fields import Count
from loramux_trainer.schema.keys import CALLED, RENAMED, RENAMED_VALUES, canonical, hints
from loramux_trainer.schema.loss_config import LossChoice, LossConfig
from loramux_trainer.schema.optim_config import OptimConfig
from loramux_trainer.schema.tracking_config import TrackingConfig

__all__ = [
    "RENAMED",
    "CheckpointConfig",
    "DataConfig",
    "Init",
    "LoraConfig",
    "Method",
    "OptimConfig",
    "Targets",
    "TrainConfig",
    "parse_job",
    "read_job",
    "read_values",
    "recorded_key",
    "renamed_identity",
]

T = TypeVar("T")

# Paths do not decide the trained bytes (what lies there has digests of its own), nor does when to evaluate.
_NO_SECTION_OF_KEY = ("model", "output", "name", "checkpoint", "tracking")
_NOT_IN_KEY = frozenset({"data.train", "data.eval", "training.eval_steps"})


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """How often, in steps, the whole state is saved; 0 saves only when the run is stopped or about to export."""

    save_steps: Annotated[Whole, Field(ge=0)] = 200
    save_total_limit: Count = 2


@dataclass(frozen=True)
class TrainConfig(Section):
    """One adapter. `model`: a hub id, a directory, or `loramux-tiny`, the embedded base.

    `name` is what the run is called, by default its output's last part. Method rslora and `lora.use_rslora` say the
    same: one job has both.
    """

    model: Text
    output: FilePath
    data: DataConfig
    name: Text | None = None
    engine: Engine = "fleet"
    method: Method = "lora"
    init: Init = "A"
    loss: LossChoice = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    adalora: AdaloraConfig = field(default_factory=AdaloraConfig)
    bitfit: BitfitConfig = field(default_factory=BitfitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    training: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        problems = Problems()
        for name, section in _SECTIONS.items():  # made in Python, they have not been looked at
            with problems.collecting():
                _read(section, vars(getattr(self, name)), at=name)
        for key, choices in (
            ("engine", get_args(Engine)),
            ("method", get_args(Method)),
            ("init", get_args(Init)),
        ):
            if getattr(self, key) not in choices:
                value = getattr(self, key)
                problems.add(JobInvalid(key, f"must be one of {', '.join(choices)}, not {value!r}"))
        problems.raise_any()
        changed = self._changed()
        for key, why in (*without_effect(changed), *unread_by_engine(changed)):
            problems.add(JobInvalid(key, why))
        problems.raise_any()
        if self.data.eval is None and not self.data.eval_fraction:
            for key in ("load_best_model_at_end", "early_stopping_patience", "eval_steps"):
                if getattr(self.training, key):
                    rule = "needs an eval loss; set data.eval or data.eval_fraction, or remove it"
                    problems.add(JobInvalid(f"training.{key}", rule))
        problems.raise_any()
        if self.name is None:
            object.__setattr__(self, "name", self.output.name)
        if self.method == "rslora":
            object.__setattr__(self, "lora", dataclasses.replace(self.lora, use_rslora=True))
        elif self.method == "lora" and self.lora.use_rslora:
            object.__setattr__(self, "method", "rslora")

    @field_validator("name")
    @classmethod
    def _names_an_adapter(cls, name: str | None) -> str | None:
        if name is not None and not NAME.allows(name):
            raise ValueError(f"must be {NAME.words}, not {name!r}")
        return name

    @property
    def run_name(self) -> str:
        """`name`, which every job has once it is made."""
        return cast("str", self.name)

    @property
    def scale(self) -> float:
        """What B A is multiplied by where no pattern gives a module its own rank or alpha."""
        return self.lora.scale(self.lora.rank, self.lora.alpha)

    @property
    def virtual_tokens(self) -> int:
        """Positions that the method puts before every example."""
        return self.prompt.num_virtual_tokens if self.method in ("prompt", "p-tuning", "prefix") else 0

    def reproducibility_key(self) -> dict[str, Any]:
        """Dotted key -> JSON value of everything that decides the trained bytes, data and base aside.

        What a checkpoint is resumed by.
        """
        return _key_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON values, as it is written beside the adapter: every key that takes effect."""
        facts: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        facts["training"]["lr_scheduler_kwargs"] = self.training.lr_scheduler_kwargs.given()
        for key in [key for key, _ in without_effect(facts)]:
            section, _, name = key.rpartition(".")
            del (facts[section] if section else facts)[name]
        unread = [name for name in SHAPES if not any(value not in (None, {}) for value in facts[name].values())]
        return {name: value for name, value in facts.items() if name not in unread}

    def _changed(self) -> dict[str, Any]:
        """The values that are not the defaults, by section, and those that say which others take effect."""
        init = None if self.init == "A" else self.init
        changed: dict[str, Any] = {"engine": self.engine, "method": self.method, "init": init}
        sections: dict[str, type[Any]] = {
            **SHAPES, "training": OptimConfig, "loss": LossConfig, "checkpoint": CheckpointConfig,
        }  # fmt: skip
        plain = {name: section() for name, section in sections.items()}
        for name, default in {**plain, "data": DataConfig(self.data.train)}.items():
            values, defaults = vars(getattr(self, name)), vars(default)
            changed[name] = {key: value for key, value in values.items() if value != defaults[key]}
        changed["training"]["optimizer"] = self.training.optimizer
        return changed


_SECTIONS: Mapping[str, type[Any]] = {
    "data": DataConfig,
    "loss": LossConfig,
    **SHAPES,
    "training": OptimConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
}

_SEVERAL = ("jobs", "sweep", "fleet")


def read_job(path: Path) -> TrainConfig:
    """Read a YAML job; relative paths in it are relative to the file. Raises JobInvalid and SeveralInvalid."""
    return parse_job(read_values(path), root=path.parent)


def read_values(path: Path) -> dict[Any, Any]:
    """The plain values of a YAML file. Raises JobInvalid where it cannot be read or is not a mapping."""
    try:
        values = read_yaml(path)
    except OSError as error:
        raise JobInvalid("", f"cannot read {path}: {error.strerror}") from error
    except TextFileInvalid as error:
        raise JobInvalid("", str(error), remedy=error.remedy) from error
    if not isinstance(values, dict):
        raise JobInvalid("", f"{path}: not a mapping of keys", remedy="write lines like `model: loramux-tiny`")
    return values


def parse_job(values: Mapping[str, Any], *, root: Path = Path()) -> TrainConfig:
    """Build a job from plain values; relative paths are joined to `root`. Raises JobInvalid with the dotted
    key, and SeveralInvalid where there are several.
    """
    job = _parse(values)
    data = dataclasses.replace(
        job.data,
        train=_located(root, job.data.train),
        eval=None if job.data.eval is None else _located(root, job.data.eval),
    )
    # A model given as a path is one only if it exists there: "org/name" stays a hub id.
    local = _located(root, job.model)
    model = str(local) if job.model.startswith((".", "/", "~")) or local.is_dir() else job.model
    loss = job.loss
    if loss.reward_function is not None:
        loss = dataclasses.replace(loss, reward_function=_beside(root, loss.reward_function))
    return dataclasses.replace(job, model=model, output=_located(root, job.output), data=data, loss=loss)


def _parse(values: Mapping[str, Any]) -> TrainConfig:
    problems = Problems()
    ours, spelled = canonical(values, problems)
    ineffective = dict(without_effect(ours))
    for key, why in ineffective.items():
        problems.add(JobInvalid(spelled.get(key, key), why))
    try:
        job = _read(TrainConfig, ours, spelled=spelled)
    except (JobInvalid, SeveralInvalid) as error:
        for problem in error.problems if isinstance(error, SeveralInvalid) else (error,):
            if not (isinstance(problem, JobInvalid) and problem.field in ineffective):  # once is enough
                problems.add(problem)
        raise problems.whole() from error
    problems.raise_any()
    return job


def renamed_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that a checkpoint was saved with, under the names that keys and values have now.

    A key that there was not yet has the value that it is now without: its default.
    """
    renamed = {
        RENAMED.get(key, key): RENAMED_VALUES[key].get(value, value) if key in RENAMED_VALUES else value
        for key, value in identity.items()
    }
    added = TrainConfig("", Path(), DataConfig(Path())).reproducibility_key()
    if renamed.get("lora.use_rslora") is True:
        added["method"] = "rslora"
    return {**added, **renamed}


def recorded_key(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The reproducibility key of a job as it was written beside its adapter, under the names that keys have now."""
    return renamed_identity(_key_of(facts))


def _key_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in facts.items() if name not in _NO_SECTION_OF_KEY}
    training = kept.get("training") or {}
    # When to evaluate decides the bytes where the eval loss does.
    is_guarded = training.get("early_stopping_patience") is not None or training.get("load_best_model_at_end")
    left_out = _NOT_IN_KEY - {"training.eval_steps"} if is_guarded else _NOT_IN_KEY
    return {key: value for key, value in _flat(kept) if key not in left_out}


def _known_keys() -> Iterator[str]:
    """Every dotted key there is."""
    for each in dataclasses.fields(TrainConfig):
        yield each.name
        if each.name in _SECTIONS:
            yield from (f"{each.name}.{key.name}" for key in dataclasses.fields(_SECTIONS[each.name]))


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if name in _SECTIONS:
            yield from ((f"{name}.{key}", each) for key, each in value.items())
        else:
            yield name, value


def _read(section: type[T], values: object, at: str = "", spelled: Mapping[str, str] | None = None) -> T:
    known = hints(values, _known_keys()) if isinstance(values, Mapping) and not at else hints({}, ())
    known |= dict.fromkeys(_SEVERAL, "is of a file of several jobs, which begins with it")
    try:
        return read(section, values, hints=known, at=at)
    except ValuesInvalid as error:
        problems = Problems()
        for key, rule in error.findings:
            key = (spelled or {}).get(key, key)
            problems.add(KeyRenamed(key, rule) if key in RENAMED or key in CALLED else JobInvalid(key, rule))
        raise problems.whole() from error


def _beside(root: Path, entry_point: str) -> str:
    """With the path of the module where it lies beside the job; another one is imported from the environment."""
    module, _, name = entry_point.rpartition(":")
    file = _located(root, module if module.endswith(".py") else module.replace(".", "/") + ".py")
    return f"{file}:{name}" if file.is_file() else entry_point


def _located(root: Path, path: Path | str) -> Path:
    return root / os.path.expanduser(path)  # Path.expanduser raises where there is no such user
