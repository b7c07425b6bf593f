"""Draws the import graph as Mermaid: `python docs/draw_imports.py --write` puts it into docs/structure.md.

A box is a package or a file directly in a house; an arrow is "imports", left out where a longer way says the same.
Exits with 1 where there is a cycle.
"""

from __future__ import annotations

import graphlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import grimp

HOUSES = ("loramux_protos", "loramux_adapters", "loramux_server", "loramux_trainer", "loramux")


def room_of(module: str) -> str:
    """The first two components: `loramux_server.engine`, or the house itself for its face."""
    return ".".join(module.split(".")[:2])


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms it imports."""
    graph = grimp.build_graph(*HOUSES, include_external_packages=False)
    found: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        if not module.endswith("__main__"):
            found[room_of(module)] |= {room_of(other) for other in graph.find_modules_directly_imported_by(module)}
    return {room: others - {room} for room, others in found.items() if others - {room} or room not in HOUSES}


def reduce(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way implies (transitive reduction of an acyclic graph)."""
    reach: dict[str, set[str]] = {}
    for room in graphlib.TopologicalSorter(found).static_order():
        reach[room] = {far for other in found.get(room, ()) for far in (other, *reach[other])}
    return {
        room: {other for other in others if not any(other in reach[near] for near in others)}
        for room, others in found.items()
    }


def mermaid(found: dict[str, set[str]]) -> str:
    """Rooms grouped by house."""
    lines = ["graph TD"]
    for house in HOUSES:
        members = sorted(room for room in found if room.split(".")[0] == house)
        lines.append(f"  subgraph {house}")
        lines += [f'    {room.replace(".", "_")}["{room.partition(".")[2] or "(face)"}"]' for room in members]
        lines.append("  end")
    lines += [
        f"  {room.replace('.', '_')} --> {other.replace('.', '_')}"
        for room in sorted(found)
        for other in sorted(found[room] & set(found))
    ]
    return "\n".join(lines)


def write(drawing: str, page: Path) -> None:
    """Replaces the drawing in a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(?s)(?<=```mermaid\n).*?(?=\n```)", lambda _: drawing, text), encoding="utf-8")


if __name__ == "__main__":
    drawn = rooms()
    try:
        drawing = mermaid(reduce(drawn))
    except graphlib.CycleError as error:
        sys.exit(f"a cycle: {' -> '.join(error.args[1])}")
    if "--write" in sys.argv:
        write(drawing, Path(__file__).with_name("structure.md"))
    else:
        print(drawing)
