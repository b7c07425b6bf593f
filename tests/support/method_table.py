"""The table of docs/training.md that says how far training, PEFT and serving are apart, row by row.

`PYTHONPATH=tests .venv/bin/python -m support.method_table` measures it anew and writes it there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from support.method_rows import NAMES, jobs_of
from support.trained_methods import Row, measure, train_rows

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"
_TITLES = {"qwen2": "Qwen 2", "gpt2": "GPT-2", "llama": "Llama"}
_HEADER = f"| row | {' | '.join(_TITLES[architecture] for architecture in NAMES)} |"


def row_names() -> list[str]:
    """Of all architectures, in order."""
    return list(dict.fromkeys(name for architecture in NAMES for name in jobs_of(architecture)))


def documented() -> dict[str, dict[str, str]]:
    """Row -> architecture -> cell, as the docs have them now."""
    lines = DOCS.read_text(encoding="utf-8").split("\n")
    found = {}
    for line in lines[_place(lines)][2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[name] = dict(zip(NAMES, cells, strict=True))
    return found


def write(measured: Mapping[str, Mapping[str, Row]]) -> None:
    """Replaces the table. `measured`: architecture -> row -> what was measured."""
    lines = DOCS.read_text(encoding="utf-8").split("\n")
    table = [_HEADER, "|---" * (1 + len(NAMES)) + "|"]
    for name in row_names():
        cells = [_cell(measured[architecture].get(name)) for architecture in NAMES]
        table.append(f"| {name} | {' | '.join(cells)} |")
    lines[_place(lines)] = table
    DOCS.write_text("\n".join(lines), encoding="utf-8")


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.training:.1e}, {row.alone:.1e}, {row.mixed:.1e}"


def _place(lines: list[str]) -> slice:
    start = lines.index(_HEADER)
    return slice(start, lines.index("", start))


def main() -> None:
    """Measures on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        write({architecture: measure(train_rows(architecture, Path(scratch) / architecture)) for architecture in NAMES})


if __name__ == "__main__":
    main()
