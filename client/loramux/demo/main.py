"""The demo from end to end: train, serve, push, ask, burst. Leaves nothing running unless asked to.

Everything it does could be done by hand with `loramux train`, `serve`, `adapters push` and `generate`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loramux.aio import AsyncClient
from loramux.demo import asking
from loramux.demo.values import Ask, DemoOutcome, TaskOutcome, interleave
from loramux.local_server import LocalServer
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import count_progress
from loramux.terminal.training_table import TrainingTable
from loramux_trainer.demo_tasks import DEMO_TASKS, DemoTask, demo_job, held_out_questions
from loramux_trainer.errors import TrainerError
from loramux_trainer.job_file import JobFile
from loramux_trainer.run import train_file


@dataclass(frozen=True)
class DemoOptions:
    """How much of it; `tasks` empty means all."""

    tasks: tuple[str, ...] = ()
    questions: int = 200
    burst_requests: int = 64
    burst_tokens: int = 32
    burst_rounds: int = 5
    keep: bool = False


@dataclass(frozen=True)
class Kept:
    """What `keep` leaves behind."""

    address: str
    pid: int
    directory: Path


def choose_tasks(names: tuple[str, ...]) -> tuple[DemoTask, ...]:
    """The tasks of these names, in the demo's order. Raises CommandError."""
    known = {task.name: task for task in DEMO_TASKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CommandError(f"no demo task {unknown[0]!r}", remedy=f"known: {', '.join(known)}", code=ExitCode.USAGE)
    return tuple(task for name, task in known.items() if not names or name in names)


def run(options: DemoOptions, console: Console) -> tuple[DemoOutcome, Kept | None]:
    """Do all of it; progress goes to stderr, remarks to `console`."""
    started = time.monotonic()
    tasks = choose_tasks(options.tasks)
    directory = Path(tempfile.mkdtemp(prefix="loramux-demo-"))
    kept = False
    try:
        noun = "adapter" if len(tasks) == 1 else "adapters"
        console.print(f"training {len(tasks)} {noun} of rank 8 on the frozen NF4 base loramux-tiny")
        seconds = train_adapters(tasks, directory)
        trained = time.monotonic()
        # Half the cores compute, the others speak: the model is too small to share a step among many threads.
        server_options = {"data_dir": str(directory / "data"), "threads": str(max(1, (os.cpu_count() or 1) // 2))}
        with LocalServer(server_options, log=directory / "server.log") as server:
            console.print(f"serving at {server.address}")
            outcome = asyncio.run(_ask(options, tasks, seconds, directory, server.address, started, trained))
            if options.keep:
                left = Kept(server.address, server.pid, directory)
                server.keep()
                kept = True
                return outcome, left
        return outcome, None
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def train_adapters(tasks: tuple[DemoTask, ...], directory: Path) -> dict[str, float]:
    """Train one adapter per task, all in one fleet, into `directory`/<name>/adapter; seconds by name."""
    jobs = tuple(demo_job(task, directory / task.name) for task in tasks)
    with TrainingTable(Console(stderr=True), [task.name for task in tasks]) as table:
        try:
            outcome = train_file(JobFile(jobs), progress=table)
        except TrainerError as error:
            raise CommandError(f"training failed: {error}") from error
    for name, why in outcome.failures.items():
        raise CommandError(f"training {name} failed: {why}")
    return {name: result.seconds for name, result in outcome.results.items()}


async def _ask(
    options: DemoOptions,
    tasks: tuple[DemoTask, ...],
    seconds: dict[str, float],
    directory: Path,
    address: str,
    started: float,
    trained: float,
) -> DemoOutcome:
    async with AsyncClient(address) as client:
        for task in tasks:
            await client.push(directory / task.name / "adapter", task.name, labels={"demo": task.skill})
        asks = {task.name: _questions(task, options.questions) for task in tasks}
        outcomes = []
        with count_progress() as bar:
            bar_task = bar.add_task("held-out questions", total=2 * sum(len(group) for group in asks.values()))
            for task in tasks:
                accuracy = await asking.measure_accuracy(client, asks[task.name], lambda: bar.advance(bar_task))
                outcomes.append(
                    TaskOutcome(
                        name=task.name,
                        title=task.title,
                        example=task.sample,
                        base_says=await asking.answer(client, task.sample, ""),
                        adapter_says=await asking.answer(client, task.sample, task.name),
                        train_seconds=seconds[task.name],
                        accuracy=accuracy,
                    )
                )
        burst = await asking.measure_burst(
            client,
            interleave(list(asks.values()), options.burst_requests),
            tokens=options.burst_tokens,
            rounds=options.burst_rounds,
        )
        model = await client.model()
    return DemoOutcome(model.model_id, tuple(outcomes), burst, trained - started, time.monotonic() - started)


def _questions(task: DemoTask, count: int) -> list[Ask]:
    return [Ask(task.name, question.prompt, question.answer) for question in held_out_questions(task, count)]
