"""`loramux train --publish`: what is refused before the training, and the publish after it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import say

if TYPE_CHECKING:
    from loramux.publishing import Gate
    from loramux_trainer.job_file import JobFile

_METRICS = ("loss", "exact")


@dataclass(frozen=True)
class Publishing:
    """Where what is trained goes, and under which condition."""

    name: str
    address: str
    gate: Gate | None

    def publish(self, output: Path) -> bool:
        """Publishes the adapter in `output`; False where the gate did not let it pass. Raises CommandError."""
        from loramux.cli.connecting import connect
        from loramux.errors import LoramuxError
        from loramux.evaluation.scoring import EvaluationInvalid
        from loramux.publishing import publish

        try:
            with connect(self.address) as client:
                done = publish(client, output, self.name, gate=self.gate)
        except (LoramuxError, EvaluationInvalid) as error:
            raise CommandError(
                f"{output} is trained, and was not published: {error}",
                remedy=f"publish it with: loramux adapters push {output} {self.name}",
                code=ExitCode.UNAVAILABLE if getattr(error, "code", "") == "UNAVAILABLE" else ExitCode.REFUSED,
            ) from error
        if done.verdict is not None:
            say(done.verdict.says)
        if not done.is_switched:
            serves = f"{self.name} still serves {done.before[:12]}" if done.before else f"there is still no {self.name}"
            say(f"{serves}; {output} was not published")
            return False
        before = f"{done.before[:12]} -> " if done.before and done.before != done.digest else ""
        print(f"published {self.name}: {before}{done.digest[:12]}")
        return True


def prepare(file: JobFile, name: str, if_better_than: str | None, metric: str, address: str) -> Publishing:
    """Looks at all that would fail after hours of training: the jobs, the gate's data, the server."""
    from loramux.cli.connecting import connect
    from loramux.errors import LoramuxError

    if len(file.jobs) > 1 and file.sweep is None:
        raise CommandError(
            "--publish takes one job, or a sweep, of which it publishes the best",
            remedy="push the others with loramux adapters push",
        )
    if file.jobs[0].loss.name == "reward":
        raise CommandError(
            "a reward adapter scores texts and generates none: no server takes it", remedy="leave out --publish"
        )
    gate = None if if_better_than is None else _gate(file, if_better_than, metric)
    try:
        with connect(address) as client:
            client.model()
    except LoramuxError as error:
        raise CommandError(
            f"not trained, since nothing could be published afterwards: {error}",
            remedy="start the server, give its --address, or train without --publish and push the adapter later",
            code=ExitCode.UNAVAILABLE,
        ) from error
    return Publishing(name, address, gate)


def _gate(file: JobFile, if_better_than: str, metric: str) -> Gate:
    from loramux.evaluation.gate import BetterThan
    from loramux.evaluation.reading import read_eval_records
    from loramux.evaluation.values import BASE

    if metric not in _METRICS:
        raise CommandError(f"--metric {metric} is none of {', '.join(_METRICS)}")
    job = file.jobs[0]
    if job.data.eval is None or any(each.data.eval != job.data.eval for each in file.jobs):
        raise CommandError(
            "--if-better-than compares on data.eval, and the job has none",
            remedy="give a file of held-out records as data.eval; data.eval_fraction is not compared on",
        )
    records = read_eval_records(job.data.eval, base=job.model if metric == "loss" else None)
    other: str | float | None = {"current": None, "base": BASE}.get(if_better_than, if_better_than)
    if isinstance(other, str) and other:
        with suppress(ValueError):  # else it is an adapter's name
            other = float(other)
    return BetterThan(records, "exact" if metric == "exact" else "loss", other)
