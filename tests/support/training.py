"""Training in tests, and watching it."""

import threading
from collections.abc import Sequence

from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import JobFile
from loramux_trainer.progress import FleetProgress, Silent, StepReport
from loramux_trainer.run import FleetOutcome, train_file


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


def train_together(
    jobs: Sequence[TrainConfig], *, resume: bool = False, progress: FleetProgress | None = None
) -> FleetOutcome:
    """In one fleet, by the entry point that users have."""
    return train_file(JobFile(tuple(jobs)), resume=resume, progress=progress)
