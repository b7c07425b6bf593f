"""`loramux eval`: the base and adapters compared on a file of the user's own."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loramux.cli.arguments import DEFAULT_ADDRESS, Address
from loramux.cli.completion import complete_adapters
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import count_progress, print_json, print_table, say

if TYPE_CHECKING:
    from loramux.client import Client
    from loramux.evaluation.scoring import Judge
    from loramux.evaluation.values import Evaluation, Metric, Row


_JUDGE_REMEDY = "name a function of (prompt, answer, reference) that returns a number"


def command(
    file: Annotated[Path, typer.Argument(help="Records in any form that `loramux train` reads.")],
    address: Address = DEFAULT_ADDRESS,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-A",
            help="Name, alias or name@digest; may be repeated. The base is always a row. With --model: a directory.",
            autocompletion=complete_adapters,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-M",
            help="exact, loss, regex or judge; may be repeated.",
            show_default="what is given, or exact",
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Metric regex: the answer contains it. A record's own key `regex` goes first.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Metric judge: a Python function of (prompt, answer, reference) that returns a number.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first records.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens of an answer.")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at a time.")] = 16,
    model: Annotated[
        str | None,
        typer.Option(help="Start a server with this base for this run alone, in place of asking one at --address."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Where the base's tokenizer is on this machine, for metric loss.",
            show_default="as the server names it",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the means with their errors to this PNG, SVG or PDF file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout instead of a table, with each record's answer and scores.")
    ] = False,
) -> None:
    """Compare the base and any number of adapters on a file of records, by greedy answers and by loss."""
    from loramux.evaluation.run import evaluate

    metrics = cast("tuple[Metric, ...]", _metrics(metric, regex, judge))
    function = None if judge is None else _load(judge)
    if picture is not None:
        from loramux.evaluation.picture import check_picture

        check_picture(picture)
    where = Where(address, model, tuple(dict.fromkeys(adapter or [])), base)
    score = partial(
        evaluate, metrics=metrics, pattern=regex, judge=function, max_tokens=max_tokens, concurrency=concurrency
    )
    evaluation = _evaluated(file, limit, where, score, with_tokens="loss" in metrics)
    if picture is not None:
        from loramux.evaluation.picture import draw

        draw(evaluation, picture)
    if as_json:
        print_json(as_document(evaluation, file))
    else:
        _print(evaluation)
    _say_cuts(evaluation, max_tokens)


@dataclass(frozen=True)
class Where:
    """Who is asked: the server at `address`, or one with `model` for this run alone. `base` has the tokenizer."""

    address: str
    model: str | None
    adapters: tuple[str, ...]
    base: str | None


def _evaluated(
    file: Path, limit: int | None, where: Where, score: Callable[..., Evaluation], *, with_tokens: bool
) -> Evaluation:
    """What `score` makes of the file's records; with their tokens for metric loss."""
    from loramux.evaluation.reading import read_eval_records
    from loramux.evaluation.scoring import EvaluationInvalid

    # Before a server is started or waited for; with tokens again once it said which base it holds.
    records = read_eval_records(file, limit=limit)
    with _connected(where) as (client, names):
        if with_tokens:
            base = where.base or where.model or client.model().model_id
            records = read_eval_records(file, base=base, limit=limit)
        with count_progress() as bar:
            # Not shown before the first score: until then a name may turn out to be unknown.
            task = bar.add_task("records", total=len(records) * (len(names) + 1), visible=False)

            def scored() -> None:
                bar.update(task, advance=1, visible=True)

            try:
                return score(client, records, names, on_scored=scored)
            except EvaluationInvalid as error:
                raise CommandError(str(error), remedy=error.remedy) from error


def _say_cuts(evaluation: Evaluation, max_tokens: int) -> None:
    for row in evaluation.rows.values():
        if row.cut:
            say(f"{_title(row)}: {row.cut} of {len(row.outcomes)} answers were cut at {max_tokens} tokens")


def as_document(evaluation: Evaluation, file: Path) -> dict[str, Any]:
    """What --json prints: rows with means, standard errors and differences to the base, and each record."""
    return {
        "file": str(file),
        "rows": [
            {
                "adapter": name or None,
                "digest": row.digest,
                "records": len(row.outcomes),
                "cut": row.cut,
                "metrics": {
                    metric: {
                        "mean": row.mean(metric),
                        "stderr": row.stderr(metric),
                        **dict(zip(("to_base", "to_base_stderr"), evaluation.difference(name, metric), strict=True)),
                    }
                    for metric in evaluation.metrics
                },
                "outcomes": [
                    {
                        "where": outcome.where,
                        "answer": outcome.answer,
                        "cut": outcome.cut,
                        **{name: score.total / score.weight for name, score in outcome.scores.items()},
                        **({"tokens": int(outcome.scores["loss"].weight)} if "loss" in outcome.scores else {}),
                    }
                    for outcome in row.outcomes
                ],
            }
            for name, row in evaluation.rows.items()
        ],
    }


def _print(evaluation: Evaluation) -> None:
    columns = ["ADAPTER", "DIGEST", "RECORDS"]
    for metric in evaluation.metrics:
        columns += [metric.upper(), "± SE", "TO BASE"]
    rows = []
    for name, row in evaluation.rows.items():
        cells: list[str] = [_title(row), (row.digest or "")[:12], str(len(row.outcomes))]
        for metric in evaluation.metrics:
            by, _ = evaluation.difference(name, metric)
            cells += [_number(row.mean(metric)), _number(row.stderr(metric)), f"{by:+.4f}" if name else ""]
        rows.append(cells)
    print_table(columns, rows, empty="")


def _title(row: Row) -> str:
    return row.name or "base"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _metrics(given: list[str] | None, regex: str | None, judge: str | None) -> tuple[str, ...]:
    """As given, or what the other options imply."""
    from loramux.evaluation.values import METRICS

    implied = [name for name, option in (("regex", regex), ("judge", judge)) if option is not None]
    wanted = given or implied or ["exact"]
    for name in wanted:
        if name not in METRICS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(METRICS)}", param_hint="--metric")
    for name in implied:
        if name not in wanted:
            raise typer.BadParameter(f"needs --metric {name} too", param_hint=f"--{name}")
    if "judge" in wanted and judge is None:
        raise typer.BadParameter("metric judge needs --judge MODULE:FUNCTION", param_hint="--metric")
    return tuple(dict.fromkeys(wanted))


def _load(judge: str) -> Judge:
    """The function, from the current directory too, as `python -m` finds modules."""
    name, separator, attribute = judge.partition(":")
    if not (name and separator and attribute):
        raise typer.BadParameter(f"{judge!r} is not MODULE:FUNCTION", param_hint="--judge")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does while it is imported
        raise CommandError(
            f"--judge {judge} cannot be loaded: {error}",
            remedy=f"have {name}.py in {here}, or on PYTHONPATH, define {attribute}",
            code=ExitCode.USAGE,
        ) from error
    if not callable(function):
        raise CommandError(f"--judge {judge} is no function", remedy=_JUDGE_REMEDY, code=ExitCode.USAGE)
    return cast("Judge", function)


@contextlib.contextmanager
def _connected(where: Where) -> Iterator[tuple[Client, tuple[str, ...]]]:
    """A client and the adapters' references there; to a server for this run alone the directories are pushed under
    their last parts.
    """
    from loramux.cli.connecting import connect

    adapters = where.adapters
    if where.model is None:
        with connect(where.address) as client:
            yield client, adapters
        return
    from loramux.client import Client
    from loramux.local_server import LocalServer

    names = tuple(Path(directory).resolve().name for directory in adapters)
    if len(set(names)) != len(names):
        raise typer.BadParameter("two directories have the same last part", param_hint="--adapter")
    with tempfile.TemporaryDirectory(prefix="loramux-eval-") as directory:
        root = Path(directory)
        options = {"model": where.model, "data_dir": str(root / "data")}
        with LocalServer(options, log=root / "log") as server, Client(server.address) as client:
            for path, name in zip(adapters, names, strict=True):
                client.push(path, name)
            yield client, names
