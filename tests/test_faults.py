"""docs/faults.md: every link names an existing test, and no row is without one. Test files are parsed, not imported."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/faults.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def _rows() -> list[tuple[str, str]]:
    """(fault, cell of links) of each row of each table."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0] != "fault" and set(cells[0]) != {"-"}:
            fault, _, links = cells
            rows.append((fault, links))
    return rows


@cache
def _tests_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds) and node.name.startswith("test_"))


@pytest.mark.parametrize(("fault", "links"), _rows(), ids=[fault[:40] for fault, _ in _rows()])
def test_a_fault_links_tests_that_exist(fault: str, links: str) -> None:
    found = LINK.findall(links)
    assert found, "no test shows it"
    assert LINK.sub("", links).strip(" ,") == "", "something else than links"
    for name, target in found:
        path = (PAGE.parent / target).resolve()
        assert path.is_relative_to(ROOT / "tests"), target
        assert path.is_file(), f"no file {target}"
        assert name in _tests_of(path), f"no test {name} in {target}"


def test_the_page_has_rows_and_names_each_fault_once() -> None:
    faults = [fault for fault, _ in _rows()]
    assert len(faults) > 40
    assert len(set(faults)) == len(faults)
