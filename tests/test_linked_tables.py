"""Tables whose rows link their tests: every link names an existing test, and no row is without one. Test files are
parsed, not imported.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"docs/faults.md": "fault", "docs/training.md": "recipe"}  # page -> the first column of its tables of links
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def _rows(page: str) -> list[tuple[str, str]]:
    """(first cell, cell of links) of each row of each such table."""
    rows, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == PAGES[page]:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            rows.append((cells[0], cells[-1]))
    return rows


ROWS = [(page, *row) for page in PAGES for row in _rows(page)]


@cache
def _tests_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds) and node.name.startswith("test_"))


@pytest.mark.parametrize(("page", "row", "links"), ROWS, ids=[f"{page}: {row[:40]}" for page, row, _ in ROWS])
def test_a_row_links_tests_that_exist(page: str, row: str, links: str) -> None:
    found = LINK.findall(links)
    assert found, "no test shows it"
    assert LINK.sub("", links).strip(" ,") == "", "something else than links"
    for name, target in found:
        path = ((ROOT / page).parent / target).resolve()
        assert path.is_relative_to(ROOT / "tests"), target
        assert path.is_file(), f"no file {target}"
        assert name in _tests_of(path), f"no test {name} in {target}"


@pytest.mark.parametrize(("page", "least"), [("docs/faults.md", 40), ("docs/training.md", 18)])
def test_a_page_has_rows_and_names_each_once(page: str, least: int) -> None:
    rows = [row for row, _ in _rows(page)]
    assert len(rows) > least
    assert len(set(rows)) == len(rows)
