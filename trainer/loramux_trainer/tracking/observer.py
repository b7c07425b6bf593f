"""A run's reports, passed on as they are, handed to trackers and drawn. What fails of that ends no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from loramux_trainer.data.dataset import DataReport
from loramux_trainer.job import TrainConfig
from loramux_trainer.progress import EvalReport, FleetProgress, Progress, StepReport
from loramux_trainer.schema.tracking_config import TrackerName
from loramux_trainer.tracking.curves import Curve
from loramux_trainer.tracking.packages import open_tracker
from loramux_trainer.tracking.picture import draw_all, draw_one
from loramux_trainer.tracking.tracker import Tracker


class TrackedFleet:
    """A FleetProgress and a context manager: at its end what is open is closed, and what is to be drawn of all jobs
    together is drawn into the directory that has all their outputs.
    """

    def __init__(self, progress: FleetProgress, jobs: Sequence[TrainConfig]) -> None:
        self._progress = progress
        self._jobs = {job.run_name: _TrackedJob(progress.of(job.run_name), job) for job in jobs}

    def of(self, name: str) -> Progress:
        """See FleetProgress."""
        return self._jobs[name]

    def warned(self, message: str) -> None:
        """See FleetProgress."""
        self._progress.warned(message)

    def ended(self, name: str, state: str) -> None:
        """See FleetProgress."""
        self._jobs[name].ended(state)
        self._progress.ended(name, state)

    def __enter__(self) -> TrackedFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self._jobs.values():
            job.close(finished=False)
        if error is None:
            self._draw()

    def _draw(self) -> None:
        curves = [job.curve for job in self._jobs.values() if job.curve.steps]
        directories = {job.output.parent for job in self._jobs.values()}
        if len(curves) > 1 and len(directories) == 1:
            _guard_picture(partial(draw_all, curves, directories.pop()), self._progress.warned)


def _guard_picture(draw: Callable[[], None], warn: Callable[[str], None]) -> None:
    try:
        draw()
    except Exception as error:  # matplotlib may raise anything
        warn(f"the losses were not drawn: {type(error).__name__}: {error}")


class _TrackedJob:
    """A Progress. A job that begins has its trackers opened; the first failure of one is its last call."""

    def __init__(self, progress: Progress, job: TrainConfig) -> None:
        self._progress, self._job = progress, job
        self._open: dict[TrackerName, Tracker] = {}
        self.curve = Curve(job.run_name)

    @property
    def plots(self) -> bool:
        """Whether it is to be drawn."""
        return self._job.tracking.plot

    @property
    def output(self) -> Path:
        """The job's."""
        return self._job.output

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None:
        """See Progress."""
        self._progress.started(total_steps, first_step, data)
        for name in self._job.tracking.report_to:
            self._guarded(name, partial(self._begin, name, first_step))

    def stepped(self, report: StepReport) -> None:
        """See Progress."""
        self._progress.stepped(report)
        if self.plots:  # else its points would be held to the end of all jobs
            self.curve.stepped(report)
        values = {"loss": report.loss, "learning_rate": report.learning_rate, "grad_norm": report.gradient_norm}
        values |= {"num_tokens": report.tokens, **report.metrics}
        self._log(report.step, {f"train/{name}": value for name, value in values.items()})

    def evaluated(self, report: EvalReport) -> None:
        """See Progress."""
        self._progress.evaluated(report)
        if self.plots:
            self.curve.evaluated(report)
        self._log(report.step, {"eval/loss": report.loss})

    def saved(self, checkpoint: Path) -> None:
        """See Progress."""
        self._progress.saved(checkpoint)
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.flush)

    def warned(self, message: str) -> None:
        """See Progress."""
        self._progress.warned(message)

    def ended(self, state: str) -> None:
        """See FleetProgress. A job that leaves nothing in its output has no picture of its own."""
        self.close(finished=state == "finished")
        if self.plots:
            self.curve.ended(state, self._job.output)
            if state in ("finished", "diverged") and self.curve.steps:
                _guard_picture(partial(draw_one, self.curve, self._job.output), self._progress.warned)

    def close(self, *, finished: bool) -> None:
        """Ends what is open. Idempotent."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(tracker.close, finished=finished))
        self._open.clear()

    def _begin(self, name: TrackerName, taken: int) -> None:
        self._open[name] = open_tracker(name, self._job, taken)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(tracker.log, step, values))

    def _guarded(self, name: TrackerName, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # a tracker may raise anything
            self._open.pop(name, None)
            self._progress.warned(f"{name} takes no more of this run: {type(error).__name__}: {error}")
