"""Watching a training run in tests."""

import threading

from loramux_trainer.progress import Silent, StepReport


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
