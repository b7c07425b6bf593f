"""What each mix may cost, in a checked-in file that may only fall; and how a measurement compares with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.fake_cuda.ledger import Ledger, Place

FILE = Path(__file__).parents[2] / "server/model/fake_cuda_budgets.json"
UPDATE = "PYTHONPATH=tests python -m support.fake_cuda --update"

Counts = dict[str, Any]
"""`kernels`, of them `kernels_per_layer`, `to_device` (copies) and `syncs` of one mix; `at` has them by file and
function, `lines` (of a measurement) by file and line."""


def counts_of(ledger: Ledger, layers: int) -> Counts:
    """A measurement."""
    kinds = {"kernels": ledger.kernels, "to_device": ledger.to_device, "syncs": ledger.syncs}
    return {
        "kernels_per_layer": ledger.layer_kernels.total() / layers,
        **{kind: counter.total() for kind, counter in kinds.items()},
        "at": _by(kinds, lambda spot: f"{spot[0]} {spot[2]}"),
        "lines": _by(kinds, lambda spot: f"{spot[0]}:{spot[1]}"),
    }


def _by(kinds: dict[str, Counter[Place]], key: Callable[[Place], str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for kind, counter in kinds.items():
        for spot, count in counter.items():
            entry = found.setdefault(key(spot), {})
            entry[kind] = entry.get(kind, 0) + count
    return {spot: found[spot] for spot in sorted(found)}


def totals(counts: Counts) -> dict[str, float]:
    """Without the places."""
    return {kind: value for kind, value in counts.items() if kind not in ("at", "lines")}


def risen(budget: Counts, measured: Counts) -> list[str]:
    """What costs more than it may, then the functions in which it grew and their lines; empty where nothing does."""
    found = [f"{kind} rose from {was} to {now}" for kind, was, now in _grown(totals(budget), totals(measured))]
    if not found:
        return []
    files = set()
    for spot in sorted(measured["at"]):
        for kind, was, now in _grown(budget["at"].get(spot, {}), measured["at"][spot]):
            found.append(f"  {spot}: {kind} rose from {was} to {now}")
            files.add(spot.partition(" ")[0])
    lines = measured["lines"].items()
    return found + [f"  {line}: {counts}" for line, counts in lines if line.partition(":")[0] in files]


def _grown(was: Mapping[str, float], now: Mapping[str, float]) -> list[tuple[str, float, float]]:
    return [(kind, was.get(kind, 0), count) for kind, count in now.items() if count > was.get(kind, 0)]


def is_current(budget: Counts, measured: Counts) -> bool:
    """Whether the file says what is."""
    return totals(budget) == totals(measured) and budget["at"] == measured["at"]


def read() -> dict[str, Counts]:
    """By mix."""
    found: dict[str, Counts] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def write(measured: dict[str, Counts]) -> None:
    """A line a place. Line numbers are left out: every change of a file moves them."""
    mixes = []
    for mix, counts in measured.items():
        entries = [f"{json.dumps(kind)}: {json.dumps(value)}" for kind, value in totals(counts).items()]
        places = [f"   {json.dumps(spot)}: {json.dumps(entry)}" for spot, entry in counts["at"].items()]
        at = ",\n".join(places)
        mixes.append(f' {json.dumps(mix)}: {{\n  {", ".join(entries)},\n  "at": {{\n{at}\n  }}\n }}')
    FILE.write_text("{\n" + ",\n".join(mixes) + "\n}\n", encoding="utf-8")
