"""Training in tests, and watching it."""

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import JobFile, parse_job_file
from loramux_trainer.progress import FleetProgress, Progress, Silent, StepReport
from loramux_trainer.run import FleetOutcome, train_file
from support.tiny import conversation, write_jsonl


class StopAt(Silent):
    """Sets `event` once `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.event, self.step, self.seen, self.warnings = threading.Event(), step, list[StepReport](), list[str]()

    def stepped(self, report: StepReport) -> None:
        self.seen.append(report)
        if report.step >= self.step:
            self.event.set()

    def warned(self, message: str) -> None:
        self.warnings.append(message)


class Watcher:
    """A FleetProgress that remembers, and sets `event` once a job has done a number of steps: (its name, steps)."""

    def __init__(self, file: JobFile, stop_at: tuple[str, int] = ("", 0)) -> None:
        name, step = stop_at
        self.jobs = {job.run_name: StopAt(step if job.name == name else 10**9) for job in file.jobs}
        self.event = self.jobs[name].event if name else None
        self.states: dict[str, str] = {}

    def of(self, name: str) -> Progress:
        return self.jobs[name]

    def warned(self, message: str) -> None:
        raise AssertionError(message)

    def ended(self, name: str, state: str) -> None:
        self.states[name] = state

    def steps(self, name: str) -> list[int]:
        return [report.step for report in self.jobs[name].seen]


RECORDS = [{"messages": conversation(f"word{i * 7 % 40}", f"drow{i}{'!' * (i % 9)}")} for i in range(24)]


def job_values(directory: Path) -> dict[str, Any]:
    """Of a short job on the embedded base, with its data in `directory`."""
    write_jsonl(directory / "train.jsonl", RECORDS)
    return {
        "model": "loramux-tiny",
        "output": str(directory / "out"),
        "data": {"train": str(directory / "train.jsonl"), "eval_fraction": 0.2},
        "training": {"learning_rate": 5e-3, "max_steps": 6, "batch_size": 4, "warmup_steps": 0},
    }


def job_file(values: dict[str, Any], **more: Any) -> JobFile:
    """`values` with other keys beside or in place of its own."""
    return parse_job_file({**copy.deepcopy(values), **more})


def train_together(
    jobs: Sequence[TrainConfig], *, resume: bool = False, progress: FleetProgress | None = None
) -> FleetOutcome:
    """In one fleet, by the entry point that users have."""
    return train_file(JobFile(tuple(jobs)), resume=resume, progress=progress)
