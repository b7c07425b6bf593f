"""A file of jobs: one job, a list of jobs, or a sweep, for one fleet on one base. Torch-free.

Each job is the file's common keys under its own. A common key is refused where no job reads it, a job's own key where
that job does not.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loramux_adapters.validation import ValuesInvalid, read
from loramux_trainer.checkpoints import CHECKPOINTS
from loramux_trainer.comparison import differing_key
from loramux_trainer.errors import JobInvalid, KeyRenamed, Problems, SeveralInvalid
from loramux_trainer.job import TrainConfig, parse_job, read_values
from loramux_trainer.schema.effect import without_effect
from loramux_trainer.schema.keys import ALIASES, canonical
from loramux_trainer.schema.sweep_config import FleetConfig, SweepConfig
from loramux_trainer.sweep import MAX_JOBS, combinations, configuration_names

T = TypeVar("T")

# One base in one form, on one device.
_SHARED = (
    "model", "engine", "training.device", "training.compute_dtype", "training.frozen_products", "training.double_quant",
    "training.deterministic", "training.gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class JobFile:
    """Jobs that train together: on one base in one form, with names and outputs of their own.

    `configurations`: job's name -> what it has in common with the jobs that differ from it in the seed only. Raises
    JobInvalid and SeveralInvalid for other jobs.
    """

    jobs: tuple[TrainConfig, ...]
    fleet: FleetConfig = field(default_factory=FleetConfig)
    sweep: SweepConfig | None = None
    configurations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_together(self.jobs)
        if self.jobs[0].engine != "fleet":
            _check_alone(self)
        if self.sweep is not None and self.sweep.successive_halving is not None:
            _check_halving(self.jobs, self.fleet)
            if (key := self.incomparable_by) is not None:
                why = f"compares jobs by their eval losses, which mean another thing with another {key}"
                raise JobInvalid("sweep.successive_halving", why, remedy="give all jobs the same, or remove it")

    @property
    def incomparable_by(self) -> str | None:
        """The key that keeps eval losses of a sweep's configurations from being compared; None where they can be."""
        return differing_key(self.jobs, self.configurations)


@dataclass(frozen=True)
class _Member:
    """A job's own keys. `locate`: dotted key -> where it stands in the file."""

    own: dict[str, Any]
    locate: Callable[[str], str]


def read_job_file(path: Path) -> JobFile:
    """Read a YAML file; relative paths in it are relative to the file. Raises JobInvalid and SeveralInvalid."""
    return parse_job_file(read_values(path), root=path.parent)


def parse_job_file(values: Mapping[str, Any], *, root: Path = Path()) -> JobFile:
    """Jobs of plain values; relative paths are joined to `root`. Raises JobInvalid with the dotted key, and
    SeveralInvalid where there are several.
    """
    common = dict(values)
    fleet = _section(FleetConfig, common.pop("fleet", {}), "fleet")
    jobs, sweep = common.pop("jobs", None), common.pop("sweep", None)
    if jobs is not None and sweep is not None:
        raise JobInvalid("sweep", "cannot go with jobs; write two files")
    for key in ("name", "run_name"):
        if (jobs is not None or sweep is not None) and key in common:
            whose = "give each job its own" if jobs is not None else "jobs of a sweep are named by their values"
            raise JobInvalid(key, f"is of one job: {whose}; remove it")
    if jobs is not None:
        return JobFile(_several(common, list(_listed(jobs, common)), root), fleet)
    if sweep is None:
        return JobFile((parse_job(common, root=root),), fleet)
    config = _section(SweepConfig, sweep, "sweep")
    members, configurations = _swept(config, common)
    swept = _several(common, members, root)
    _check_distinct(swept)
    return JobFile(swept, fleet, config, configurations)


def _section(section: type[T], values: object, at: str) -> T:
    try:
        return read(section, values, at=at)
    except ValuesInvalid as error:
        problems = Problems()
        for key, rule in error.findings:
            problems.add(JobInvalid(key, rule))
        raise problems.whole() from error


def _listed(jobs: object, common: Mapping[str, Any]) -> Iterator[_Member]:
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise JobInvalid("jobs", "must be a list of jobs, each a mapping of the keys in which it differs")
    if len(jobs) > MAX_JOBS:
        raise JobInvalid("jobs", f"has {len(jobs)} jobs; at most {MAX_JOBS} can be in one file")
    problems = Problems()
    for index, job in enumerate(jobs):
        found = Problems()
        own, spelled = canonical(job, found)
        at = f"jobs[{index}]."
        if found:
            for problem in _each(found.whole()):
                problems.add(_moved(problem, f"{at}{problem.field}"))
        name, output = own.get("name"), own.get("output")
        if name is None and output is None:
            problems.add(JobInvalid(f"{at}name", "is required where a job has no output of its own"))
        elif output is None and isinstance(name, str):
            own["output"] = _below(common, name)
        yield _Member(own, lambda key, at=at, spelled=spelled: f"{at}{spelled.get(key, key)}")  # type: ignore[misc]
    problems.raise_any()


def _swept(sweep: SweepConfig, common: Mapping[str, Any]) -> tuple[list[_Member], dict[str, str]]:
    problems = Problems()
    keys = {ALIASES.get(key, key): key for key in sweep.parameters}
    for key, written in keys.items():
        if key in ("name", "output"):
            problems.add(JobInvalid(f"sweep.parameters.{written}", "each job of a sweep has its own already"))
        elif key.count(".") > 1 or (key == "training.seed" and sweep.repeat > 1):
            why = "sweep.repeat gives each job its seed" if key == "training.seed" else "is not a key of a job"
            problems.add(JobInvalid(f"sweep.parameters.{written}", why))
    if len(keys) < len(sweep.parameters):
        problems.add(JobInvalid("sweep.parameters", "two of the keys are names of one; keep one"))
    problems.raise_any()
    configurations = combinations(sweep)
    members, by_name = [], {}
    for values, name in zip(configurations, configuration_names(configurations), strict=True):
        for number in range(sweep.repeat):
            own, _ = canonical(_nested({ALIASES.get(key, key): value for key, value in values.items()}), problems)
            run = name
            if sweep.repeat > 1:
                seed = _first_seed(common) + number
                own.setdefault("training", {})["seed"] = seed
                run = f"{name}-seed-{seed}"
            own |= {"name": run, "output": _below(common, run)}
            members.append(_Member(own, lambda key: f"sweep.parameters.{keys[key]}" if key in keys else key))
            by_name[run] = name
    problems.raise_any()
    return members, by_name


def _several(common: Mapping[str, Any], members: list[_Member], root: Path) -> tuple[TrainConfig, ...]:
    problems = Problems()
    shared, spelled = canonical(common, problems)
    jobs: list[TrainConfig] = []
    without: list[dict[str, str]] = []
    said: set[str] = set()
    for member in members:
        merged = _merged(shared, member.own)
        own = set(_leaves(member.own))
        dropped = {key: why for key, why in without_effect(merged) if key not in own}
        without.append(dropped)
        try:
            jobs.append(parse_job(_less(merged, dropped), root=root))
        except (JobInvalid, SeveralInvalid) as error:
            for problem in _each(error):
                at = member.locate(problem.field) if problem.field in own else spelled.get(problem.field, problem.field)
                moved = _moved(problem, at)
                if str(moved) not in said:
                    said.add(str(moved))
                    problems.add(moved)
    for key in sorted(set(_leaves(shared))):
        if all(key in dropped for dropped in without):
            problems.add(JobInvalid(spelled.get(key, key), without[0][key]))
    problems.raise_any()
    return tuple(jobs)


def _check_together(jobs: Sequence[TrainConfig]) -> None:
    if not jobs:
        raise JobInvalid("jobs", "has no job")
    problems = Problems()
    for key in _SHARED:
        section, _, name = key.rpartition(".")
        values = {str(getattr(getattr(job, section) if section else job, name)) for job in jobs}
        if len(values) > 1:
            problems.add(JobInvalid(key, f"must be the same in all jobs of a file, not {', '.join(sorted(values))}"))
    names: set[str] = set()
    outputs: dict[str, Path] = {}
    for job in jobs:
        if job.run_name in names:
            problems.add(JobInvalid("name", f"two jobs have {job.run_name}; give each its own"))
        names.add(job.run_name)
        place = os.path.realpath(job.output)  # one directory has many names
        if place in outputs:
            also = "" if outputs[place] == job.output else f", one of them as {outputs[place]}"
            problems.add(JobInvalid("output", f"two jobs have {job.output}{also}; give each its own"))
        outputs.setdefault(place, job.output)
    kept = {os.path.join(place, CHECKPOINTS): output for place, output in outputs.items()}
    for place, output in outputs.items():
        for above in (place, *map(str, Path(place).parents)):
            if above in kept:
                problems.add(JobInvalid("output", f"{output} is where the job of {kept[above]} keeps its checkpoints"))
    problems.raise_any()


def _check_distinct(jobs: Sequence[TrainConfig]) -> None:
    """Values may be different words for one thing (8 and 8.0, adamw and adamw_torch, lora with rslora's scale)."""
    seen: dict[str, str] = {}
    for job in jobs:
        facts = {key: value for key, value in job.to_dict().items() if key not in ("name", "output")}
        first = seen.setdefault(json.dumps(facts, sort_keys=True), job.run_name)
        if first != job.run_name:
            why = f"{first} and {job.run_name} are the same job; remove one, or train it with several seeds by repeat"
            raise JobInvalid("sweep.parameters", why)


def _check_alone(file: JobFile) -> None:
    """Of jobs for another engine than the fleet."""
    engine = file.jobs[0].engine
    if len(file.jobs) > 1 or file.sweep is not None:
        raise JobInvalid("engine", f"{engine} trains one job at a time; write a file for each, or use engine: fleet")
    if file.fleet != FleetConfig():
        raise JobInvalid("fleet", f"is not read by engine {engine}; remove it")


def _check_halving(jobs: Sequence[TrainConfig], fleet: FleetConfig) -> None:
    if any(job.data.eval is None and not job.data.eval_fraction for job in jobs):
        raise JobInvalid("sweep.successive_halving", "needs data.eval or data.eval_fraction to compare jobs by")
    if any(job.training.early_stopping_patience is not None for job in jobs):
        why = "successive halving compares jobs after the same steps and stops them itself; remove one of them"
        raise JobInvalid("training.early_stopping_patience", why)
    if fleet.max_members is not None and fleet.max_members < len(jobs):
        why = f"{fleet.max_members} of {len(jobs)} jobs at a time cannot be compared at a rung; remove it"
        raise JobInvalid("fleet.max_members", why)


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Sections key by key; what is no section is replaced."""
    merged = dict(common)
    for name, value in own.items():
        section = common.get(name)
        both = isinstance(section, Mapping) and isinstance(value, Mapping)
        merged[name] = {**section, **value} if both else value  # type: ignore[dict-item]
    return merged


def _less(values: Mapping[str, Any], dropped: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {key: each for key, each in value.items() if f"{name}.{key}" not in dropped}
        if isinstance(value, Mapping)
        else value
        for name, value in values.items()
        if name not in dropped
    }


def _leaves(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)
        else:
            yield str(name)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _below(common: Mapping[str, Any], name: str) -> Any:
    """The output of the job `name` in the file's; what is no path is left for the schema to refuse."""
    output = next((common[key] for key in ("output", "output_dir", "out_dir") if key in common), None)
    return str(Path(output) / name) if isinstance(output, str) and output else output


def _first_seed(common: Mapping[str, Any]) -> int:
    training = common.get("training")
    seed = common.get("seed", training.get("seed", 0) if isinstance(training, Mapping) else 0)
    return seed if isinstance(seed, int) else 0


def _each(error: Exception) -> Iterator[JobInvalid]:
    for problem in error.problems if isinstance(error, SeveralInvalid) else (error,):
        if isinstance(problem, JobInvalid):
            yield problem


def _moved(problem: JobInvalid, at: str) -> JobInvalid:
    if isinstance(problem, KeyRenamed):
        return KeyRenamed(at, problem.message)
    return JobInvalid(at, problem.message, remedy=problem.remedy)
