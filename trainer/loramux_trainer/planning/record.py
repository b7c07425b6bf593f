"""A plan kept beside its job file, so that what the run then took stands beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramux_trainer.job_file import JobFile


@dataclass(frozen=True)
class Taken:
    """What a run took: the most memory of its process on its device, in bytes, and seconds."""

    peak: int
    seconds: float


def plan_path(job_file: Path) -> Path:
    """`job.yaml` -> `job.plan.json`."""
    return job_file.with_suffix(".plan.json")


def write_plan(job_file: Path, file: JobFile, plan: dict[str, Any]) -> Path:
    """Returns where it is. Raises OSError."""
    path = plan_path(job_file)
    path.write_text(json.dumps({"jobs": _digest(file), "plan": plan}, indent=2) + "\n", encoding="utf-8")
    return path


def add_taken(job_file: Path, file: JobFile, taken: Taken) -> dict[str, Any] | None:
    """Writes what a run took into the plan of the same jobs, and returns the plan; None where there is no such plan.

    Raises OSError.
    """
    path = plan_path(job_file)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        plan: dict[str, Any] = values["plan"]
        if values["jobs"] != _digest(file):
            return None
        int(plan["peak"]), float(plan["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path.write_text(json.dumps({**values, "taken": asdict(taken)}, indent=2) + "\n", encoding="utf-8")
    return plan


def _digest(file: JobFile) -> str:
    """Of what decides how much a run takes."""
    jobs = [[job.model, str(job.data.train), str(job.data.eval), job.reproducibility_key()] for job in file.jobs]
    said = json.dumps([jobs, asdict(file.fleet)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()
