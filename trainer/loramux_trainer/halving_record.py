"""What successive halving has decided, on the disk: so that a sweep that is stopped goes on with those that were left.

Written before what loses is removed. Knows names and steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramux_trainer.checkpoints import TEMPORARY, move_durably, write_durably
from loramux_trainer.errors import CheckpointInvalid, JobInvalid
from loramux_trainer.job_file import JobFile

RECORD = "successive_halving.json"
"""In the sweep's output."""
_EVALS = "evals"


class HalvingRecord:
    """`sweep`: what must be the same to go on, JSON values. `path` None: nothing is ever decided."""

    def __init__(self, path: Path | None, sweep: Mapping[str, Any]) -> None:
        self._path, self._sweep = path, dict(sweep)
        self._rungs: dict[int, dict[str, str]] = {}

    @property
    def stopped(self) -> dict[str, str]:
        """Run -> why, of all rungs."""
        return {name: why for losers in self._rungs.values() for name, why in losers.items()}

    def is_decided(self, step: int) -> bool:
        """Whether the rung after this step has been decided."""
        return step in self._rungs

    def decide(self, step: int, losers: Mapping[str, str]) -> None:
        """Keeps it durably: run -> why it stops. Raises OSError."""
        if self._path is None:
            raise ValueError("this sweep has no rungs")
        self._rungs[step] = dict(losers)
        rungs = {str(each): stopped for each, stopped in sorted(self._rungs.items())}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(TEMPORARY + self._path.name)
        try:
            write_durably(partial, json.dumps({"sweep": self._sweep, "rungs": rungs}, indent=2).encode())
        except OSError:  # mostly a full disk, which the partial file would keep full
            partial.unlink(missing_ok=True)
            raise
        move_durably(partial, self._path)

    def read(self) -> None:
        """Takes over what is there, if anything. Raises CheckpointInvalid where it is of another sweep, or torn."""
        if self._path is None or not self._path.exists():
            return
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            sweep = found["sweep"]
            self._rungs = {int(step): dict(losers) for step, losers in found["rungs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointInvalid(f"{self._path} cannot be read ({error}); choose another output") from error
        expected = json.loads(json.dumps(self._sweep))
        if {_EVALS: expected.get(_EVALS), **sweep} != expected:  # a record of an earlier version does not have them
            raise CheckpointInvalid(f"cannot resume: {self._path} is of another sweep; choose another output")


def record_of(file: JobFile) -> HalvingRecord:
    """A sweep is the same by its rungs, by all that decides the bytes of its jobs, and by what these are judged on."""
    halving = None if file.sweep is None else file.sweep.successive_halving
    if halving is None:
        return HalvingRecord(None, {})
    jobs = {job.run_name: job.reproducibility_key() for job in file.jobs}
    evals = {str(path): _sha256(path) for path in {job.data.eval for job in file.jobs} if path is not None}
    sweep = {"successive_halving": asdict(halving), "jobs": jobs, _EVALS: sorted(evals.values())}
    return HalvingRecord(_directory(file) / RECORD, sweep)


def _sha256(path: Path) -> str:
    """Of a file, or of all files of a saved dataset."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def check_record(file: JobFile, *, resume: bool) -> None:
    """Raises JobInvalid where a run before this one has decided something, and this one is not to go on with it."""
    if file.sweep is None or file.sweep.successive_halving is None or resume:
        return
    if (_directory(file) / RECORD).exists():
        raise JobInvalid(
            "output",
            f"{_directory(file)} has the {RECORD} of another run; continue with --resume, or choose another directory",
        )


def _directory(file: JobFile) -> Path:
    """The file's own output, which those of its jobs are in."""
    return file.jobs[0].output.parent
