"""What a user reads speaks the field's words: README, docs, and the help of every command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loramux.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]

WORDS = {
    r"lorica": "loramux",
    r"materiali[sz]\w*|weight sets?": "merge, merged weights",
    r"wish(es|ed)?": "desired state",
    r"houses?|rooms|doors?": "package, module, entry point",
    r"drafts?": "a step being planned is not a draft model",
    r"hidden positions?": "mask",
    r"codecs?": "tokenizer",
    r"layouts? of slots": "rank rows",
    r"overtak\w+": "skips",
    r"proven|doubtful": "validated, invalidated",
    r"verdicts?": "status",
    r"obeys?|patience|spells?|is told|are told|hears?|whoever": "plain sentences, no personification",
    r"overlong|clip:|accumulation:|schedule:": "the keys of a job as transformers names them",
    r"theorems?|mortal|fault list|row \d+ of": "equivalence, killable, docs/faults.md",
    r"\w*(quanti|tokeni|normali|optimi|seriali|organi|summari|minimi|recogni)s(e|ed|es|er|ing|ation)": "z",
    r"(behavi|col|neighb|fav|flav|hon)our\w*|cancelled|labelled|centre|licence": "US spelling",
}  # fmt: skip
PATTERNS = {re.compile(rf"(?<![\w-])({pattern})(?![\w-])", re.IGNORECASE): better for pattern, better in WORDS.items()}


def helps() -> dict[str, str]:
    """Command line -> its help, of every command."""
    found: dict[str, str] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*path, "--help"])
        assert "--help" in shown.stdout
        found[" ".join(path)] = shown.stdout
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ())
    return found


def words_in(text: str) -> list[str]:
    """Words that have a better one, with it and their lines."""
    prose = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", " ", text)  # names of code and of tests are not prose
    return [
        f"{match[0]!r}, better: {better}: {line.strip()}"
        for line in prose.splitlines()
        for pattern, better in PATTERNS.items()
        for match in pattern.finditer(line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_speaks_the_fields_words(page: Path) -> None:
    assert words_in(page.read_text(encoding="utf-8")) == []


def test_so_does_the_help_of_every_command() -> None:
    shown = helps()
    assert {"serve", "adapters merge", "train", "bench"} <= set(shown)
    assert {path: words for path, text in shown.items() if (words := words_in(text))} == {}


def test_the_words_are_found() -> None:
    for sample in ("a house", "Materialise it", "the codec", "quantised", "Whoever asks", "neighbour"):
        assert words_in(sample), sample


def test_the_glossary_explains_what_lists_show_and_readme_links_it() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = {term.lower() for term in re.findall(r"^- \*\*(.+)\*\*:", text, re.MULTILINE)}
    assert terms >= {"digest", "rank", "tier", "lease", "merged weights"}
    assert 5 <= len(terms) <= 8
    assert [tier for tier in ("registered", "loaded", "resident") if f"`{tier}`" not in text] == []
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
