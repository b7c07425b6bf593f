"""How commands speak: tables for people, JSON for programs, progress and errors on stderr.

Knows no command. With `--json`, stdout holds JSON and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.terminal.failures import ExitCode, Failure

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


_UNBOUNDED = 1000  # columns


def plain(value: object) -> Any:
    """`value` as JSON types: dataclasses become objects, times ISO 8601, bytes text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value


def print_json(value: object) -> None:
    """One indented JSON document on stdout."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table on stdout; `empty` says what it means that there are no rows. Cells of `Text` are printed as they are."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in row))
    if table.row_count == 0:
        print(empty)
    else:
        if sys.stdout.isatty():
            # Cells are wrapped between words and never cut: a digest without its end is of no use. What is wider than
            # the terminal then is the terminal's to wrap.
            for column in table.columns:
                words = [word for cell in (column.header, *column.cells) for word in str(cell).split()]
                column.min_width = max(map(cell_len, words), default=None)
            Console().print(table, crop=False)
            return
        console = Console(width=_UNBOUNDED)  # a pipe has no width: nothing is cut, wrapped or filled up there
        with console.capture() as captured:
            console.print(table)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def visible(text: str, *, keep: str = "") -> str:
    """`text` with its control characters spelled out: what others wrote must not steer the reader's terminal."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) == "Cc" and character not in keep
        else character
        for character in text
    )


def say(message: str) -> None:
    """A remark for people, on stderr."""
    print(message, file=sys.stderr)


def tell_failure(failure: Failure) -> None:
    """An expected failure on stderr; an interruption was asked for and is none."""
    message = visible(failure.message, keep="\n\t")
    say(message if failure.code == ExitCode.INTERRUPTED else f"error: {message}")
    if failure.remedy:
        say(f"       {failure.remedy}")


def byte_progress() -> Progress:
    """A progress bar in bytes with rate and time left, on stderr; gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from loramux.terminal.bar import Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def step_progress(state: str) -> Progress:
    """A progress bar in steps; `state` is a format over the task's fields, such as `{task.fields[loss]}`."""
    from rich.progress import TextColumn

    return _counting(TextColumn(state, markup=False))


def count_progress() -> Progress:
    """A progress bar that counts, with time left."""
    return _counting()


def _counting(*more: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from loramux.terminal.bar import Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *more)
    # Rich forgets steps after 30 s: of longer ones it would never know how long the others take.
    return Bar(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=math.inf,
    )


def size(nbytes: int) -> str:
    """Bytes for people: `812 B`, `1.4 MiB`."""
    number = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def decimal_size(nbytes: int) -> str:
    """Memory as its tables are quoted: `812 MB`, `14.18 GB`."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
