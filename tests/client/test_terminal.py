"""What commands show: text is text, whatever a user or a server put into it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from loramux.terminal import output
from loramux.terminal.failures import ExitCode, Failure
from loramux.terminal.training_bar import COLUMN, TrainingBar
from loramux_trainer.data.dataset import DataReport


def _shown(bar: Progress) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(bar.get_renderable())
    return stream.getvalue()


def test_names_and_paths_are_no_markup() -> None:
    bar = output.step_progress(COLUMN)
    bar.live.console = Console(file=io.StringIO(), width=200)
    watcher = TrainingBar(bar, "a[lr=3e-4]x[/y]")
    watcher.started(10, 0, DataReport(1, 1, 0, 0, 0, 0, 0, 1, 0, 1))
    watcher.saved(Path("runs/a[lr=3e-4]/x[/y]"))
    watcher.warned("[bold]loud")
    assert "a[lr=3e-4]x[/y]" in _shown(bar)
    said = bar.console.file.getvalue()
    assert "a[lr=3e-4]x[/y]: 1 examples to train, 0 to evaluate; 1 tokens, 0% without loss, longest 1\n" in said
    assert "saved runs/a[lr=3e-4]/x[/y]\n" in said
    assert "warning: [bold]loud\n" in said
    for other in (output.byte_progress(), output.count_progress()):
        other.add_task("push [/x]", total=None)
        assert "push [/x]" in _shown(other)


@pytest.mark.parametrize("make", [output.byte_progress, output.count_progress, lambda: output.step_progress(COLUMN)])
def test_without_a_terminal_a_bar_that_shows_nothing_prints_nothing(
    make: Callable[[], Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    with make() as bar:
        bar.add_task("hidden", total=None, visible=False, loss="", eval_loss="")
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_transfer_prints_nothing_and_work_its_last_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with output.byte_progress() as bar:
        bar.add_task("push x", total=3)
    assert capsys.readouterr().err == ""
    with output.count_progress() as bar:
        bar.add_task("questions", total=3, completed=3)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("questions")
    assert "3/3" in line


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_terminal_of_any_width_shows_whole_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    """`ls` in a narrow window: a digest cut below 8 digits is of no use for NAME@DIGEST."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    row = ("a-name-of-some-length", "0d336bcfe500", 16, "1.1 MiB", "resident", "prod,an-alias-that-is-long")
    output.print_table(("NAME", "DIGEST", "RANK", "SIZE", "TIER", "ALIASES"), [row], empty="")
    shown = capsys.readouterr().out
    for cell in (row[0], row[1], row[4], row[5]):
        assert str(cell) in shown


def test_what_a_server_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2J\x9b1m\nrow\r"
    output.print_table(("LABEL", "OURS"), [(evil, Text("two\nlines"))], empty="")
    output.tell_failure(Failure(f"{evil}\tb", ExitCode.REFUSED))
    shown = capsys.readouterr()
    assert r"a\x1b[2J\x9b1m\nrow\r" in shown.out
    assert "two\n" in shown.out
    assert shown.err == "error: a\\x1b[2J\\x9b1m\nrow\\r\tb\n"
