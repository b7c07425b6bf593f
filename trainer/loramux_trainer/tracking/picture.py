"""Losses as `loss.png`: of one job beside its report, of several in one picture, by matplotlib, which is an extra."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_trainer.tracking.curves import Curve, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "loss.png"

_TRAIN, _EVAL, _GREY = "#1f5fa8", "#d1661c", "#b9b9b9"
_COLORS = (
    "#1f5fa8", "#d1661c", "#2f8f5b", "#b03a6f", "#6a51a3", "#8c6d31", "#17a2b8", "#c0392b", "#5b7553", "#4d4d4d",
)  # fmt: skip
"""Of the best jobs, in their order; the others are grey."""

_SMOOTHED = 30  # parts of a curve, of which one is what a point of the smoothed line looks back on
_MOST_ABOVE = 4.0  # times the range of most points, beyond which single ones do not decide the axis


def is_drawable() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_one(curve: Curve, directory: Path) -> None:
    """Each step's loss, smoothed, with the evaluations. Raises OSError."""
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    axes.plot(*_xy(curve.steps), color=_TRAIN, alpha=0.28, linewidth=0.9)
    smooth = smoothed(curve.steps)
    axes.plot(*_xy(smooth), color=_TRAIN, linewidth=1.8, marker=_marker(smooth), label="training (smoothed)")
    if curve.evals:
        axes.plot(*_xy(curve.evals), color=_EVAL, marker="o", markersize=4, linewidth=1.4, label="evaluation")
        step, best = min(curve.evals, key=lambda point: (point[1], point[0]))
        axes.annotate(
            f"{best:.4f}", (step, best), xytext=(0, 8), textcoords="offset points", ha="center", color=_EVAL, fontsize=8
        )
    title = curve.name if curve.state == "finished" else f"{curve.name} ({curve.state})"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(frameon=False, fontsize=8)
    _dress(axes, [curve.steps, curve.evals])
    _write(figure, directory)


def draw_all(curves: Sequence[Curve], directory: Path) -> None:
    """The best ones in colors, by their last loss, the others in grey; where a job ended early is a cross.

    Raises OSError.
    """
    ordered = sorted(curves, key=lambda curve: (curve.state != "finished", curve.last, curve.name))
    has_evals = any(curve.evals for curve in curves)
    figure = _figure(10.4 if has_evals else 7.0, 4.4)
    panels: Sequence[Axes] = figure.subplots(1, 1 + has_evals, squeeze=False)[0]
    series = [[smoothed(curve.steps) for curve in ordered], [curve.evals for curve in ordered]]
    for axes, title, points_of in zip(panels, ("training loss (smoothed)", "evaluation loss"), series, strict=False):
        for place, (curve, points) in reversed(list(enumerate(zip(ordered, points_of, strict=True)))):
            color = _COLORS[place] if place < len(_COLORS) else _GREY
            marker = "o" if title.startswith("eval") else _marker(points)
            axes.plot(*_xy(points), color=color, linewidth=1.5, marker=marker, markersize=3)
            if points and curve.state != "finished":
                axes.plot(*points[-1], color=color, marker="x", markersize=7)
        axes.set_title(title, fontsize=10)
        _dress(axes, points_of)
    _explain_colors(figure, ordered)
    _write(figure, directory)


def _explain_colors(figure: Any, ordered: Sequence[Curve]) -> None:
    from matplotlib.lines import Line2D

    labels = [_label(curve) for curve in ordered[: len(_COLORS)]]
    lines = [Line2D([], [], color=color, linewidth=1.5) for color in _COLORS[: len(labels)]]
    if rest := len(ordered) - len(labels):
        labels.append(f"{rest} more")
        lines.append(Line2D([], [], color=_GREY, linewidth=1.5))
    legend = figure.legend(
        lines,
        list(map(str, range(len(labels)))),  # a label that begins with an underscore would be left out
        loc="outside right upper",
        frameon=False,
        fontsize=7.5,
        title="by last loss",
        title_fontsize=7.5,
        alignment="left",
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # a name may have dollars
        text.set_text(label)


def smoothed(points: Points) -> Points:
    """Mean that forgets, over a thirtieth of the steps, corrected for its begin: the first point is the first loss.

    What is above `upper_limit` counts as that, or one wild step would lift the line for many.
    """
    limit = upper_limit([loss for _, loss in points])
    limit = math.inf if limit is None else limit
    keep = math.exp(-_SMOOTHED / max(len(points), _SMOOTHED)) if len(points) > _SMOOTHED else 0.0
    total = weight = 0.0
    found: Points = []
    for step, loss in points:
        total, weight = keep * total + min(loss, limit), keep * weight + 1.0
        found.append((step, total / weight))
    return found


def upper_limit(losses: Sequence[float]) -> float | None:
    """Where the axis ends, so that a few wild losses do not flatten all others; None: where the losses do."""
    known = sorted(loss for loss in losses if math.isfinite(loss))
    if not known:
        return None
    lowest, most = known[0], known[int(0.95 * (len(known) - 1))]
    limit = lowest + _MOST_ABOVE * (most - lowest)
    return limit if most > lowest and known[-1] > limit else None


def _label(curve: Curve) -> str:
    ended = "" if curve.state == "finished" else f", {curve.state}"
    name = curve.name if len(curve.name) <= 44 else curve.name[:21] + "…" + curve.name[-22:]
    return f"{name} ({curve.last:.4g}{ended})"


def _marker(points: Points) -> str:
    """A line of one point is not seen."""
    return "o" if len(points) == 1 else ""


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window system, no state of the process

    return Figure(figsize=(width, height), layout="constrained")


def _dress(axes: Axes, series: Sequence[Points]) -> None:
    from matplotlib.ticker import MaxNLocator

    losses = [loss for points in series for _, loss in points]
    limit = upper_limit(losses)
    if limit is not None:
        lowest = min(losses)
        axes.set_ylim(lowest - 0.05 * (limit - lowest), limit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Any, directory: Path) -> None:
    """Whole or not at all."""
    path, partial = directory / PICTURE, directory / f".{PICTURE}.partial.png"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
            figure.savefig(partial, dpi=160)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
