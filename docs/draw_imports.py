"""Draws the import graph as Mermaid: `python docs/draw_imports.py --write` puts it into docs/structure.md.

A box is a subpackage or a module directly in a top-level package. An arrow is "imports", left out where a longer way
says the same. Exits with 1 where there is a cycle.
"""

from __future__ import annotations

import graphlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import grimp

PACKAGES = ("loramux_protos", "loramux_adapters", "loramux_server", "loramux_trainer", "loramux")


def box_of(module: str) -> str:
    """The first two components: `loramux_server.engine`, or the top-level package itself for its public API."""
    return ".".join(module.split(".")[:2])


def boxes() -> dict[str, set[str]]:
    """Box -> the boxes it imports."""
    graph = grimp.build_graph(*PACKAGES, include_external_packages=False)
    found: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        if not module.endswith("__main__"):
            found[box_of(module)] |= {box_of(other) for other in graph.find_modules_directly_imported_by(module)}
    return {box: others - {box} for box, others in found.items() if others - {box} or box not in PACKAGES}


def reduce(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way implies (transitive reduction of an acyclic graph)."""
    reach: dict[str, set[str]] = {}
    for box in graphlib.TopologicalSorter(found).static_order():
        reach[box] = {far for other in found.get(box, ()) for far in (other, *reach[other])}
    return {
        box: {other for other in others if not any(other in reach[near] for near in others)}
        for box, others in found.items()
    }


def mermaid(found: dict[str, set[str]]) -> str:
    """Boxes grouped by top-level package."""
    lines = ["graph TD"]
    for package in PACKAGES:
        members = sorted(box for box in found if box.split(".")[0] == package)
        lines.append(f"  subgraph {package}")
        lines += [f'    {box.replace(".", "_")}["{box.partition(".")[2] or "(public API)"}"]' for box in members]
        lines.append("  end")
    lines += [
        f"  {box.replace('.', '_')} --> {other.replace('.', '_')}"
        for box in sorted(found)
        for other in sorted(found[box] & set(found))
    ]
    return "\n".join(lines)


def write(drawing: str, page: Path) -> None:
    """Replaces the drawing in a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(?s)(?<=```mermaid\n).*?(?=\n```)", lambda _: drawing, text), encoding="utf-8")


if __name__ == "__main__":
    drawn = boxes()
    try:
        drawing = mermaid(reduce(drawn))
    except graphlib.CycleError as error:
        sys.exit(f"a cycle: {' -> '.join(error.args[1])}")
    if "--write" in sys.argv:
        write(drawing, Path(__file__).with_name("structure.md"))
    else:
        print(drawing)
