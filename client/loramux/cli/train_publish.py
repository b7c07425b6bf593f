"""`loramux train --publish`: what is refused before the training, and the publish after it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import say

if TYPE_CHECKING:
    from loramux.client import Client
    from loramux.evaluation.gate import BetterThan
    from loramux.publishing import Gate
    from loramux.types import Adapter
    from loramux_trainer.job_file import JobFile

_METRICS = ("loss", "exact")
_NUMBER: Final = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?")


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
    """Looks at all that would fail after hours of training: the name, the jobs, the gate's data, the server."""
    from loramux.cli.connecting import connect
    from loramux.errors import LoramuxError
    from loramux_adapters.names import NAME

    if not NAME.allows(name):
        raise CommandError(f"--publish {name!r} is no name of an adapter", remedy=f"use {NAME.words}")
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
            room = client.model().limits.context_tokens - max(job.virtual_tokens for job in file.jobs) - 1
            _check_names(client, name, if_better_than, None if gate is None else gate.other)
            if gate is not None:
                _check_records(client, gate, room)
    except LoramuxError as error:
        raise CommandError(
            f"not trained, since nothing could be published afterwards: {error}",
            remedy="start the server, give its --address, or train without --publish and push the adapter later",
            code=ExitCode.UNAVAILABLE,
        ) from error
    return Publishing(name, address, gate)


def _check_names(client: Client, name: str, if_better_than: str | None, other: str | float | None) -> None:
    """What the names mean at the server now. Raises CommandError, and LoramuxError where it cannot be asked."""
    if (serving := _found(client, name)) is not None and serving.name != name:
        raise CommandError(
            f"--publish {name} is an alias of {serving.name}", remedy="give the name, or remove the alias first"
        )
    if isinstance(other, str) and other and _found(client, other) is None:
        raise CommandError(
            f"--if-better-than {other} is no adapter of the server",
            remedy="name one, or give current, base or a number",
            code=ExitCode.NOT_FOUND,
        )
    if isinstance(other, float) and (named := _found(client, str(if_better_than))) is not None:
        raise CommandError(
            f"--if-better-than {if_better_than} is a number, and an adapter of the server has that name",
            remedy=f"write {if_better_than}@{named.digest[:12]} for the adapter, or write the number otherwise",
        )


def _check_records(client: Client, gate: BetterThan, room: int) -> None:
    """Whether the server can be asked for all of them: `room` is in tokens. Raises CommandError."""
    from loramux.evaluation.scoring import EvaluationInvalid, Scorer

    scorer = Scorer(client, (gate.metric,), 1)
    for record in gate.records:
        try:
            scorer.check(record)
        except EvaluationInvalid as error:
            raise CommandError(f"--if-better-than: {error}", remedy=error.remedy) from error
        longest = max(len(sequence.ids) for sequence in record.sequences)
        if longest > room:
            raise CommandError(
                f"--if-better-than: {record.where}: {longest} tokens, the server has room for {room}",
                remedy="leave the record out, or lower data.max_length",
            )


def _found(client: Client, reference: str) -> Adapter | None:
    from loramux.errors import InvalidArgument, NotFound

    try:
        return client.adapter(reference)
    except (NotFound, InvalidArgument):
        return None


def _gate(file: JobFile, if_better_than: str, metric: str) -> BetterThan:
    """The job's own eval records, read as it reads them."""
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
    if job.loss.name != "sft":
        raise CommandError(
            f"--if-better-than compares answers, and the records of loss {job.loss.name} have no single right one",
            remedy="publish it under another name, and compare the two by loramux eval",
        )
    records = read_eval_records(job.data.eval, base=job.model, data=job.data)
    if not records:
        raise CommandError(
            f"{job.data.eval} has no record of at most data.max_length tokens to compare on",
            remedy="raise data.max_length, or give shorter records",
        )
    other: str | float | None = {"current": None, "base": BASE}.get(if_better_than, if_better_than)
    if isinstance(other, str) and other and _NUMBER.fullmatch(other):  # nan and inf are names
        other = float(other)
    return BetterThan(records, "exact" if metric == "exact" else "loss", other)
