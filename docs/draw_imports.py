"""Draws the import graph of the houses as Mermaid: `python docs/draw_imports.py` prints what docs/structure.md shows.

A box is a package or a file directly in a house; an arrow is "imports". Exits with 1 where there is a cycle.
"""

from __future__ import annotations

import graphlib
import sys
from collections import defaultdict

import grimp

HOUSES = ("lorica_protos", "lorica_adapters", "lorica_server", "lorica_trainer", "lorica")


def room_of(module: str) -> str:
    """The first two components: `lorica_server.engine`, or the house itself for its face."""
    return ".".join(module.split(".")[:2])


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms it imports."""
    graph = grimp.build_graph(*HOUSES, include_external_packages=False)
    found: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        if not module.endswith("__main__"):
            found[room_of(module)] |= {room_of(other) for other in graph.find_modules_directly_imported_by(module)}
    return {room: others - {room} for room, others in found.items() if room not in HOUSES or others}


def mermaid(found: dict[str, set[str]]) -> str:
    """Rooms grouped by house; several arrows from one room to one house's rooms stay apart."""
    lines = ["graph TD"]
    for house in HOUSES:
        members = sorted(room for room in found if room.split(".")[0] == house)
        lines.append(f"  subgraph {house}")
        lines += [f'    {room.replace(".", "_")}["{room.partition(".")[2] or room}"]' for room in members]
        lines.append("  end")
    known = set(found)
    lines += [
        f"  {room.replace('.', '_')} --> {other.replace('.', '_')}"
        for room in sorted(found)
        for other in sorted(found[room] & known)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    drawn = rooms()
    try:
        graphlib.TopologicalSorter(drawn).prepare()
    except graphlib.CycleError as error:
        sys.exit(f"a cycle: {' -> '.join(error.args[1])}")
    print(mermaid(drawn))
