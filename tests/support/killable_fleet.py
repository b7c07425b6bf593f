"""Fleets to be killed by the dozen: `python -m support.killable_fleet JOBS`, one order a line on stdin.

JOBS is a JSON list of jobs. Imports what a trainer imports once, then forks each run, which resumes whatever is there.
An order is the kind of an event and a count, and the run dies by SIGKILL at that one of its kind; or "none 0". A child
says "pid PID", then "step" for every step of a job; "ended CODE" follows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_trainer import checkpoints, export
from loramux_trainer.job import TrainConfig, parse_job
from loramux_trainer.progress import OneJob, Silent, StepReport
from support.training import train_together

EVENTS = (
    "step",
    "half a file of a checkpoint",
    "a checkpoint that has not its name yet",
    "a directory that is to go",
    "a file of an adapter that has not its place yet",
)


class Killer:
    """Counts events and kills at the one that was ordered."""

    def __init__(self, kind: str, number: int) -> None:
        self._kind, self._number = kind, number
        self._seen: Counter[str] = Counter()

    def is_due(self, kind: str) -> bool:
        """Whether this event is the one."""
        self._seen[kind] += 1
        return kind == self._kind and self._seen[kind] == self._number

    def before(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, before which it may die."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.is_due(kind):
                die()
            return function(*args, **kwargs)

        return wrapped


class Loud(Silent):
    """Says each step."""

    def __init__(self, killer: Killer) -> None:
        self._killer = killer

    def stepped(self, report: StepReport) -> None:
        say("step")
        if self._killer.is_due("step"):
            die()


def run(jobs: list[TrainConfig], killer: Killer) -> None:
    """What is not finished yet."""
    write = checkpoints.write_durably

    def write_or_half(path: Path, content: bytes) -> None:
        if killer.is_due(half):
            write(path, content[: len(content) // 2])
            die()
        write(path, content)

    _, half, unnamed, old, unplaced = EVENTS
    with ExitStack() as patches:
        for target, name, value in (
            (checkpoints, "write_durably", write_or_half),
            (Path, "rename", killer.before(unnamed, Path.rename)),
            (shutil, "rmtree", killer.before(old, shutil.rmtree)),
            (export, "move_durably", killer.before(unplaced, export.move_durably)),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        left = [job for job in jobs if not (job.output / CONFIG_FILE).exists()]
        outcome = train_together(left, resume=True, progress=OneJob(Loud(killer)))
    assert not outcome.failures


def die() -> None:
    """Nothing runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def say(line: str) -> None:
    """One write: whole or not there, and no buffer that dies with the process."""
    os.write(1, f"{line}\n".encode())


def main(jobs_file: Path) -> None:
    """Run orders until stdin ends."""
    jobs = [parse_job(values) for values in json.loads(jobs_file.read_text())]
    say("here")
    for line in sys.stdin:
        kind, _, number = line.strip().rpartition(" ")
        pid = os.fork()
        if pid == 0:
            say(f"pid {os.getpid()}")
            try:
                run(jobs, Killer(kind, int(number)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
