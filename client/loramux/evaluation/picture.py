"""An evaluation as a picture: one panel a metric, a point with its error a row, the base as a line to compare with.

Drawn by matplotlib, which is an extra: without it the picture is refused with the remedy.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from loramux.evaluation.values import BASE, Evaluation, Metric
from loramux.terminal.failures import CommandError, install_hint

_KINDS: Final = (".png", ".svg", ".pdf")
_BASE_COLOR, _ADAPTER_COLOR = "#7a7a7a", "#1f5fa8"
_TITLES: Final[dict[Metric, str]] = {
    "exact": "exact match (share)",
    "loss": "loss (nats per token, lower is better)",
    "regex": "pattern found (share)",
    "judge": "judge (mean)",
}


def check_picture(path: Path) -> None:
    """Refuse, before anything is computed, what `draw` could not do. Raises CommandError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--picture needs matplotlib, which is not installed", remedy=install_hint("plot"))
    if path.suffix.lower() not in _KINDS:
        raise CommandError(f"--picture {path}: must end with {', '.join(_KINDS)}")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"--picture {path}: there is no directory {path.parent}")


def draw(evaluation: Evaluation, path: Path) -> None:
    """Write the picture, whole or not at all. Raises CommandError where the file cannot be written."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no state of the process

    names = [name for name in evaluation.rows if name != BASE]
    count = len(evaluation.metrics)
    height = 1.3 + 0.34 * (len(names) + 1)
    figure = Figure(figsize=(2.0 + 4.0 * count, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for index, (metric, axes) in enumerate(zip(evaluation.metrics, panels, strict=True)):
        base = evaluation.rows[BASE].mean(metric)
        axes.axvline(base, color=_BASE_COLOR, linewidth=1, linestyle="--", zorder=0)
        for place, name in enumerate([BASE, *names]):
            row = evaluation.rows[name]
            color = _ADAPTER_COLOR if name else _BASE_COLOR
            mean = row.mean(metric)
            axes.errorbar(mean, place, xerr=row.stderr(metric), fmt="o", color=color, capsize=3, markersize=6)
            axes.annotate(
                f"{mean:.3f}",
                (mean, place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=color,
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # the base's line must not cross it
            )
        axes.set_ylim(len(names) + 0.6, -0.7)
        axes.margins(x=0.12)
        axes.set_yticks(range(len(names) + 1), ["base", *names] if index == 0 else [])
        axes.set_title(_TITLES[metric], fontsize=10)
        axes.grid(axis="x", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    count_of_records = len(evaluation.rows[BASE].outcomes)
    figure.supxlabel(f"{count_of_records} records; bars are ± 1 standard error", fontsize=8, color="#555555")
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=160)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CommandError(f"--picture {path}: cannot be written: {error.strerror or error}") from error
