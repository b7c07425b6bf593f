"""`loramux train --plan`, and the plan beside what the run then took."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import decimal_size, duration, print_json, print_table, say

if TYPE_CHECKING:
    from loramux_trainer.job_file import JobFile
    from loramux_trainer.planning.plan import Plan


def plan(job_file: Path, file: JobFile, *, as_json: bool) -> None:
    """Measures, prints and keeps it. Raises CommandError where the run would need more memory than there is."""
    from loramux_trainer.planning.plan import make_plan
    from loramux_trainer.planning.record import write_plan

    say("measuring steps of the run on the first layers of its base ...")
    made = make_plan(job_file)
    values = {**asdict(made), "seconds": made.seconds, "fits": made.fits}
    if as_json:
        print_json(values)
    else:
        _print(made)
    try:
        say(f"kept in {write_plan(job_file, file, values)}, for what the run takes to stand beside it")
    except OSError as error:
        say(f"not kept beside the job file: {error.strerror}")
    if not made.fits:
        raise CommandError(
            f"the run needs {decimal_size(made.peak)} and {made.device} has {decimal_size(made.free)} free",
            remedy="lower fleet.token_budget, training.batch_size, data.max_length, lora.rank or fleet.max_members, "
            "or set training.gradient_checkpointing",
            code=ExitCode.REFUSED,
        )


def compare(job_file: Path, file: JobFile, seconds: float) -> None:
    """After a run: says how its plan fits, where there is one."""
    from loramux_adapters.memory import peak_bytes
    from loramux_trainer.planning.record import Taken, add_taken
    from loramux_trainer.preparation import find_device

    taken = Taken(peak_bytes(find_device(file.jobs[0])), seconds)
    planned: dict[str, Any] | None = None
    with suppress(OSError):
        planned = add_taken(job_file, file, taken)
    if planned is not None:
        say(
            f"peak {decimal_size(taken.peak)} (planned {decimal_size(planned['peak'])}), {duration(taken.seconds)} "
            f"(planned {duration(planned['seconds'])})"
        )


def _print(made: Plan) -> None:
    grown = made.training - made.process - made.base
    rows = [
        ("process", decimal_size(made.process), "Python and its libraries"),
        ("base", decimal_size(made.base), f"{made.layers} layers"),
        ("training", decimal_size(grown), "adapters, optimizer, activations, evaluation, export"),
        ("peak", decimal_size(made.peak), f"{decimal_size(made.free)} free on {made.device}"),
        ("time", duration(made.seconds), _of_time(made)),
    ]
    if made.loading > made.training:
        rows.insert(3, ("loading", decimal_size(made.loading), "at its most, while the base is read"))
    print_table(("PART", "TAKES", ""), rows, empty="")
    measured = " and ".join(map(str, made.measured_layers))
    print(f"measured on {measured} of {made.layers} layers; {made.steps:,} steps, {made.tokens:,} tokens")


def _of_time(made: Plan) -> str:
    parts = {"load": made.load_seconds, "training": made.train_seconds, "evaluation": made.eval_seconds}
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
