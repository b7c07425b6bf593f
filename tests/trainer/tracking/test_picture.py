"""Losses as a picture: what is drawn of which job, of one and of several, and that drawing ends no training."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from loramux_trainer.dry_run import check_whole_job
from loramux_trainer.errors import Interrupted, JobInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.job_file import JobFile, parse_job_file
from loramux_trainer.progress import EvalReport, OneJob, StepReport
from loramux_trainer.run import train, train_file
from loramux_trainer.tracking import observer, picture
from loramux_trainer.tracking.curves import Curve
from loramux_trainer.tracking.observer import TrackedFleet
from loramux_trainer.tracking.picture import draw_all, draw_one, smoothed, upper_limit
from support.training import StopAt, Watcher, job_values


def values(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {**job_values(tmp_path), "tracking": {"plot": True}, **more}


class Drawn:
    """In place of matplotlib: what was drawn, where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.one: dict[Path, Curve] = {}
        self.all: dict[Path, list[Curve]] = {}
        monkeypatch.setattr(observer, "draw_one", lambda curve, directory: self.one.update({directory: curve}))
        monkeypatch.setattr(observer, "draw_all", lambda curves, directory: self.all.update({directory: curves}))


def steps_of(curve: Curve) -> list[int]:
    return [step for step, _ in curve.steps]


def test_a_smoothed_line_begins_where_the_losses_do_and_follows_them() -> None:
    few = [(step, float(step)) for step in range(1, 20)]
    assert smoothed(few) == few
    flat = [(step, 2.5) for step in range(1, 200)]
    assert [loss for _, loss in smoothed(flat)] == pytest.approx([2.5] * 199)
    falling = [(step, math.exp(-step / 50) + 0.1 * (-1) ** step) for step in range(1, 301)]
    lines = smoothed(falling)
    assert lines[0] == pytest.approx(falling[0])
    jumps = [abs(later - earlier) for (_, earlier), (_, later) in pairwise(lines[1:])]
    assert max(jumps) < 0.1  # of steps that jump by 0.2
    assert lines[-1][1] == pytest.approx(math.exp(-6), abs=0.02)
    wild = [(step, 1e9 if step == 100 else loss) for step, loss in falling]
    assert max(loss for _, loss in smoothed(wild)) < 4


def test_a_few_wild_losses_do_not_decide_the_axis() -> None:
    losses = [1 + 0.01 * step for step in range(100)]
    assert upper_limit(losses) is None
    assert upper_limit([*losses, 1e6]) == pytest.approx(1 + 4 * 0.95, abs=0.05)
    assert upper_limit([*losses, math.inf, math.nan]) is None
    assert upper_limit([1.0, 1.0, 50.0]) is None  # of so few none is wild
    assert upper_limit([]) is None


@pytest.mark.parametrize("count", [1, 2, 8, 18])
@pytest.mark.parametrize("evaluated", [True, False])
def test_pictures_of_any_number_of_jobs(count: int, evaluated: bool, tmp_path: Path) -> None:
    states = ("finished", "stopped", "diverged")
    curves = [
        Curve(
            f"job-{number}-" + "long-" * 12,
            [(step, 3 / step + number) for step in range(1, 41 + number)],
            [(20, 0.2 + number), (40, 0.1 + number)] if evaluated else [],
            states[number % 3],
        )
        for number in range(count)
    ]
    draw_all(curves, tmp_path) if count > 1 else draw_one(curves[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert height > 500
    assert width > (1500 if evaluated and count > 1 else 900)


@pytest.mark.parametrize("name", ["_hidden", r"a$\foo$b", "日本", "50% [x]{y}^z"])
def test_a_name_is_text_in_a_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No formula, and no mark that leaves it out of the legend."""
    figures: list[Figure] = []
    write = picture._write
    monkeypatch.setattr(picture, "_write", lambda figure, directory: figures.append(figure) or write(figure, directory))
    curves = [Curve(name, [(1, 1.0), (2, 0.5)], state="finished"), Curve("other", [(1, 2.0)], state="finished")]
    draw_one(curves[0], tmp_path)
    draw_all(curves, tmp_path)
    alone, together = figures
    assert alone.axes[0].get_title() == name
    assert [text.get_text() for text in together.legends[0].get_texts()] == [f"{name} (0.5)", "other (2)"]


def test_the_legend_has_the_colors_of_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(picture, "_write", lambda figure, directory: figures.append(figure))
    draw_all([Curve(f"job-{n}", [(1, float(n)), (2, float(n))], state="finished") for n in range(12)], tmp_path)
    (figure,) = figures
    colors = {line.get_ydata()[0]: line.get_color() for line in figure.axes[0].get_lines()}
    (legend,) = figure.legends
    texts, lines = legend.get_texts(), legend.get_lines()
    assert [text.get_text() for text in texts] == [*(f"job-{n} ({n})" for n in range(10)), "2 more"]
    assert [line.get_color() for line in lines] == [colors[n] for n in range(11)]


def test_a_single_step_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(picture, "_write", lambda figure, directory: figures.append(figure))
    single = Curve("a", [(1, 1.0)], state="finished")
    draw_one(single, tmp_path)
    draw_all([single, Curve("b", [(1, 1.0), (2, 1.0)], state="finished")], tmp_path)
    alone, together = figures
    assert any(line.get_marker() == "o" for line in alone.axes[0].get_lines())
    assert [line.get_marker() for line in together.axes[0].get_lines()] == ["", "o"]


def test_a_loss_that_is_no_number_is_no_point(tmp_path: Path) -> None:
    curve = Curve("a")
    for step in range(1, 41):
        loss = math.nan if step == 20 else math.inf if step == 21 else 1e9 if step == 22 else 1 / step
        curve.stepped(StepReport(step, loss, 1e-3, 1.0, 1))
        curve.evaluated(EvalReport(step, -loss))
    assert len(curve.steps) == len(curve.evals) == 38
    assert all(math.isfinite(loss) for _, loss in smoothed(curve.steps))
    draw_one(curve, tmp_path)
    draw_all([curve, Curve("b")], tmp_path)
    (tmp_path / "train_report.json").write_text('{"history": [{"step": 1, "loss": NaN}], "evals": []}')
    curve.ended("finished", tmp_path)
    assert curve.steps == []


def test_only_what_is_drawn_is_kept(tmp_path: Path) -> None:
    job = parse_job({**values(tmp_path), "tracking": {}})
    tracked = TrackedFleet(OneJob(StopAt(9)), [job])
    tracked.of("out").stepped(StepReport(1, 1.0, 1e-3, 1.0, 1))
    tracked.of("out").evaluated(EvalReport(1, 1.0))
    assert tracked._jobs["out"].curve == Curve("out")


def test_a_job_has_its_picture_beside_its_report(tmp_path: Path) -> None:
    job = parse_job(values(tmp_path))
    train(job)
    assert imread(job.output / "loss.png").ndim == 3
    assert not (tmp_path / "loss.png").exists()
    assert not list(job.output.glob(".loss*"))


def test_the_curve_of_a_resumed_run_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    job = parse_job(values(tmp_path, training={**job_values(tmp_path)["training"], "eval_steps": 2}))
    watch = StopAt(3)
    with pytest.raises(Interrupted):
        train(job, progress=watch, stop=watch.event)
    assert not drawn.one
    train(job, resume=True)
    (curve,) = drawn.one.values()
    assert steps_of(curve) == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curve.evals] == [2, 4, 6]
    drawn.one.clear()
    train(job, resume=True)  # it was finished before
    assert steps_of(drawn.one[job.output]) == [1, 2, 3, 4, 5, 6]


def test_jobs_of_one_directory_share_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was stopped by halving, which leaves nothing of its own."""
    drawn = Drawn(monkeypatch)
    sweep = {"parameters": {"lora.rank": [2, 4, 8]}, "successive_halving": {"min_steps": 2, "eta": 3}}
    file = parse_job_file(values(tmp_path, sweep=sweep))
    train_file(file, progress=Watcher(file))
    (shared,) = drawn.all
    assert shared == tmp_path / "out"
    states = {curve.name: (curve.state, len(curve.steps)) for curve in drawn.all[shared]}
    assert sorted(states.values()) == [("finished", 6), ("stopped", 2), ("stopped", 2)]
    assert [curve.name for curve in drawn.one.values()] == [
        name for name, (state, _) in states.items() if state == "finished"
    ]


def test_jobs_of_several_directories_share_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    jobs = [parse_job(values(tmp_path, output=str(tmp_path / place / "out"), name=place)) for place in ("a", "b")]
    file = JobFile(tuple(jobs))
    train_file(file, progress=Watcher(file))
    assert drawn.all == {}
    assert set(drawn.one) == {job.output for job in jobs}


def test_a_job_that_diverges_is_drawn_until_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    wild = {**job_values(tmp_path)["training"], "learning_rate": 1.0, "max_grad_norm": None, "max_steps": 60}
    wild |= {"optimizer": "sgd", "momentum": 0.99, "lr_scheduler_type": "constant", "warmup_steps": 0}
    jobs = [
        {"name": "wild", "training": wild, "lora": {"alpha": 1e6}},
        {"name": "calm"},
        {"name": "undrawn", "tracking": {"plot": False}},
    ]
    file = parse_job_file(values(tmp_path, jobs=jobs))
    outcome = train_file(file, progress=Watcher(file))
    assert set(outcome.failures) == {"wild"}
    assert {curve.name: curve.state for curve in drawn.one.values()} == {"wild": "diverged", "calm": "finished"}
    assert {curve.name for curve in drawn.all[tmp_path / "out"]} == {"wild", "calm"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("fonts")])
def test_a_picture_that_fails_ends_nothing(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(curve: Curve, directory: Path) -> None:
        raise error

    monkeypatch.setattr(observer, "draw_one", fail)
    watch = StopAt(10**9)
    job = parse_job(values(tmp_path))
    assert train(job, progress=watch).steps == 6
    said = [text for text in watch.warnings if "drawn" in text]
    assert said == [f"the losses were not drawn: {type(error).__name__}: {error}"]


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        draw_one(Curve("a", [(1, 1.0)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    job = parse_job(values(tmp_path))
    refused = r"tracking\.plot: package matplotlib is not installed: install Loramux with the extra plot"
    for refuse in (train, lambda job: check_whole_job(job, resume=False)):
        with pytest.raises(JobInvalid, match=refused):
            refuse(job)
    assert not (tmp_path / "out").exists()
    plain = parse_job({**values(tmp_path), "tracking": {}})
    assert check_whole_job(plain, resume=False) is not None
