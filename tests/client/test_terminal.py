"""What commands show: text is text, whatever a user or a server put into it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from loramux.terminal import output
from loramux.terminal.failures import ExitCode, Failure
from loramux.terminal.training_bar import COLUMN, TrainingBar
from loramux.terminal.training_table import TrainingTable
from loramux_trainer.data.dataset import DataReport
from loramux_trainer.progress import EvalReport, StepReport

DATA = DataReport(1, 1, 0, 0, 0, 0, 0, 1, 0, 1)
SWEEP = [
    f"method={method},learning_rate={rate}" for method in ("lora", "dora", "loha", "lokr") for rate in (0.001, 0.003)
]


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _step(step: int, loss: float = 0.5, tokens: int = 30) -> StepReport:
    return StepReport(step, loss, 1e-3, 1.0, tokens)


def _table(names: list[str], width: int, height: int = 40, *, terminal: bool = True, **more: bool) -> TrainingTable:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, no_color=True)
    return TrainingTable(console, names, clock=Clock(), **more)


def _run(table: TrainingTable, name: str, steps: int, total: int, eval_loss: float | None = None) -> None:
    """One second a step."""
    row = table.of(name)
    row.started(total, 0, DATA)
    for step in range(1, steps + 1):
        table.clock.now += 1.0
        row.stepped(_step(step, loss=2.0 / step))
    if eval_loss is not None:
        row.evaluated(EvalReport(steps, eval_loss))


def _drawn(table: TrainingTable, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table.drawn())
    return stream.getvalue().splitlines()


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


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_fleet_fits_into_the_terminal(width: int) -> None:
    table = _table(SWEEP, width, marks_best=True)
    for number, name in enumerate(SWEEP[:-2]):
        _run(table, name, 20 * (number + 1), 120, eval_loss=0.5 - 0.01 * number)
    table.ended(SWEEP[5], "finished")
    _run(table, SWEEP[6], 3, 120)
    table.ended(SWEEP[6], "diverged")
    head, *rows, total = _drawn(table, width)
    assert head.split() == ["job", "step", "loss", "eval", "left", "state"]
    assert all(len(line) <= width for line in (head, *rows, total))
    begins = {row.split()[0] for row in rows}
    assert len(begins) == len(SWEEP)  # shortened or not, no two are alike
    assert rows[0].split()[-5:] == ["20/120", "0.1000", "0.5000", "0:37:01", "running"]
    assert rows[5].split()[-4:] == ["120/120", "0.0167", "0.4500*", "finished"]
    assert rows[6].split()[-3:] == ["3/120", "0.6667", "diverged"]
    assert rows[7].split()[-1] == "waiting"
    assert total == "8 jobs: 5 running, 1 waiting, 1 finished, 1 diverged; 30 tokens/s; * best eval"


@pytest.mark.parametrize("width", range(1, 80, 4))
@pytest.mark.parametrize("height", [0, 1, 7, 9, 24])
def test_a_small_terminal_has_whole_cells_and_the_line_of_all(width: int, height: int) -> None:
    """What has no place is left out, not cut: rows, then the bar, the time left, the losses, the state."""
    table = _table(SWEEP, width, height=height, marks_best=True)
    for number, name in enumerate(SWEEP[:-2]):
        _run(table, name, 20 * (number + 1), 120, eval_loss=0.5 - 0.01 * number)
    lines = _drawn(table, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join("".join(lines).split()).endswith(("*besteval", "morenotshown"))
    if width >= 20:
        head = lines[0].split()
        rows = [line for line in lines[1:] if "120" in line or "waiting" in line]
        assert head[:2] == ["job", "step"]
        assert rows
        assert not any("…" in cell for row in rows for cell in row.split()[1:])
        if height >= 9:
            assert len(lines) < height  # one more is the cursor's
        step = rows[0].split()
        assert "20/120" in step
        assert ("0:36:45" in step) == ("left" in head)


@pytest.mark.parametrize("name", ["日本語のとても長い名前のジョブ", "a" * 300, "e\u0301" * 40, "\x1b[2Jred\nline" * 3])
def test_a_name_of_any_letters_is_one_line(name: str) -> None:
    table = _table([name, "b"], 62)
    _run(table, name, 2, 4)
    _, first, second, _ = _drawn(table, 62)
    assert max(map(cell_len, (first, second))) <= 62
    assert first.split()[-1] == "running"
    assert first.split()[-4:-1] == ["2/4", "1.0000", "0:00:02"]
    assert "\x1b" not in first


def test_a_job_that_could_not_begin_is_not_said_to_have_ended_before() -> None:
    table = _table(["a", "b"], 300, terminal=False)
    table.ended("a", "refused")
    table.ended("b", "stopped")
    assert table._console.file.getvalue().splitlines() == ["a: refused", "b: stopped before this run"]


def test_a_loss_on_its_way_to_diverge_takes_no_more_place() -> None:
    table = _table(["a"], 80)
    table.of("a").started(9, 0, DATA)
    for loss, shown in ((1e30, "1.00e+30"), (math.nan, "nan"), (-math.inf, "-inf"), (-99999.0, "-99999.0000")):
        table.of("a").stepped(_step(1, loss=loss))
        assert _drawn(table, 80)[1].split()[-2] == shown


def test_a_terminal_that_cannot_move_its_cursor_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of emacs and of some CI: rich draws nothing there before the end."""
    monkeypatch.setenv("TERM", "dumb")
    table = _table(["a"], 80)
    bar = output.step_progress(COLUMN)
    bar.live.console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with table, bar:
        _run(table, "a", 1, 3, eval_loss=0.5)
        watcher = TrainingBar(bar, "a")
        watcher.started(3, 0, DATA)
        watcher.stepped(_step(1))
        watcher.evaluated(EvalReport(1, 0.5))
    assert "a: step 1/3, loss 2.0000, eval loss 0.5000\n" in table._console.file.getvalue()
    assert "a: step 1/3, loss 0.5000, eval 0.5000\n" in bar.console.file.getvalue()


def test_of_steps_that_take_minutes_a_bar_knows_how_long_the_others_take() -> None:
    bar = output.step_progress(COLUMN)
    clock = Clock()
    bar.get_time = clock
    bar.live.console = Console(file=io.StringIO(), width=200)
    watcher = TrainingBar(bar, "a")
    watcher.started(10, 4, DATA)  # resumed
    for step in (5, 6, 7):
        clock.now += 120.0
        watcher.stepped(_step(step))
    assert bar.tasks[0].time_remaining == pytest.approx(360.0)


def test_the_best_is_marked_only_where_losses_can_be_compared() -> None:
    for marks, marked in ((True, 1), (False, 0)):
        table = _table(["a", "b"], 80, marks_best=marks)
        _run(table, "a", 2, 9, eval_loss=0.5)
        assert not any("*" in line for line in _drawn(table, 80))  # of one there is no best
        _run(table, "b", 2, 9, eval_loss=0.4)
        _, first, second, total = _drawn(table, 80)
        assert ["*" in line for line in (first, second, total)] == [False, bool(marked), bool(marked)]


def test_the_time_left_is_that_of_the_last_one() -> None:
    table = _table(["a", "b"], 80)
    _run(table, "a", 2, 3)
    assert "left" not in table.total()  # b waits, and nobody knows for how long
    _run(table, "b", 1, 11)
    assert "left" not in table.total()
    table.of("b").stepped(_step(2))
    table.clock.now += 4.0
    table.of("b").stepped(_step(3))
    assert table.total() == "2 jobs: 2 running; 20 tokens/s; 0:00:16 left"
    table.ended("b", "finished")
    assert table.total() == "2 jobs: 1 running, 1 finished; 20 tokens/s; 0:00:06 left"


def test_of_more_jobs_than_lines_those_that_run_are_shown() -> None:
    names = [f"job-{number}" for number in range(30)]
    table = _table(names, 80, height=12)
    for name in names[10:14]:
        _run(table, name, 2, 9)
    for name in names[:4]:
        _run(table, name, 2, 2)
        table.ended(name, "finished")
    _, *rows, total = _drawn(table, 80)
    assert [row.split()[0] for row in rows] == [*names[10:14], *names[:4]]
    assert total.endswith("; 22 more not shown")


def test_a_live_table_is_drawn_and_left_as_it_ended() -> None:
    table = _table(["a", "[b]"], 80)
    assert table._live.refresh_per_second == 1  # the training thread waits for it
    with table:
        _run(table, "[b]", 3, 3, eval_loss=0.25)
        table.of("[b]").warned("[bold]loud")
        table.ended("[b]", "finished")
    said = table._console.file.getvalue()
    assert "warning: [b]: [bold]loud" in said
    last = said[said.rindex("step") :]
    assert "[b]" in last
    assert "3/3" in last
    assert "0.2500" in last
    assert "2 jobs: 1 waiting, 1 finished" in last


def test_without_a_terminal_a_fleet_is_lines() -> None:
    table = _table(["a", "b"], 300, terminal=False)
    with table:
        _run(table, "a", 2, 4, eval_loss=0.5)
        table.clock.now = 61.0
        table.of("a").stepped(_step(3))
        table.of("a").stepped(_step(4, loss=0.125))
        table.of("a").evaluated(EvalReport(4, 0.25))
        table.ended("a", "finished")
        table.ended("b", "finished")
    begun, *rest = table._console.file.getvalue().splitlines()
    assert begun.startswith("a: 1 examples to train")
    assert rest == [
        "a: step 2/4, loss 1.0000, eval loss 0.5000",
        "2 jobs: 1 running, 1 waiting; 1 tokens/s",
        "a: finished at step 4/4, loss 0.1250, eval loss 0.2500",
        "b: finished before this run",
    ]


def test_without_a_terminal_one_run_is_lines_too() -> None:
    bar = output.step_progress(COLUMN)
    bar.live.console = Console(file=io.StringIO(), width=200)
    clock = Clock()
    watcher = TrainingBar(bar, "a", clock=clock)
    watcher.started(5, 0, DATA)
    watcher.stepped(_step(1, loss=2.0))
    watcher.evaluated(EvalReport(1, 1.5))
    clock.now = 60.0
    watcher.stepped(_step(2, loss=1.0))
    watcher.stepped(_step(3, loss=0.5))
    watcher.stepped(_step(5, loss=0.25))
    watcher.evaluated(EvalReport(5, 0.125))
    _, *lines = bar.console.file.getvalue().splitlines()
    assert lines == ["a: step 1/5, loss 2.0000, eval 1.5000", "a: step 2/5, loss 1.0000, eval 1.5000"]
    assert "eval 0.1250" in _shown(bar)
