"""YAML and TOML of people: the place, what is wrong and the remedy, in one line and never in a parser's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.text_files import TextFileInvalid, parse_toml, read_yaml

YAML = {
    "a: 1\n\tb: 2\n": ("2:1", "a tab", "spaces"),
    "model: a: b\n": ("1:9", "a colon where none fits", "quotes"),
    "model: x\noutput\ndata: y\n": ("2:1", "a line without `:`", "write `key: value`"),
    "a:\n    b: x\n  c: y\n": ("3:3", "not indented as those before it", "spaces"),
    " a: x\nb: y\n": ("2:1", "not indented as those before it", "spaces"),
    "a: x\nb: 'y\nc: z\n": ("2:4", "the quote that begins here is not closed", "close it"),
    "a: [1, 2\nb: 3\n": ("1:4", "the list that begins here", "]"),
    "a: {b: 1\nc: 2\n": ("1:4", "the mapping that begins here", "}"),
    'a: "b" c\n': ("1:8", "text behind a value in quotes", "within the quotes"),
    "a: 1\n- b\n": ("2:1", "a list item among the keys", "spaces"),
    "a: - b\n": ("1:4", "a list cannot begin behind its key", "line of its own"),
    "a: *.txt\n": ("1:5", "names an anchor", "quotes"),
    "a: *b\n": ("1:4", "an alias", "quotes"),
    "a: !x y\n": ("1:4", "a tag", "quotes"),
    "a: @x\n": ("1:4", "a value cannot begin with @", "quotes"),
    "a: >-2x\n": ("1:7", "a block of lines", "quotes"),
    'a: "C:\\data"\n': ("1:8", "a backslash", "single quotes"),
    "a: {{ x }}\n": ("1:5", "a list or a mapping as a key", "quotes"),
    "a: ]\n": ("1:4", "a value is missing before ]", "quotes"),
    "a: [": ("1:5", "the file ends within a list or mapping", "close it"),
    "a: 1\n---\nb: 2\n": ("2:1", "a second document", "---"),
    "a: 1\nb: 2026-13-01\n": ("2:4", "looks like a date", "quotes"),
    f"a: {'9' * 5000}\n": ("1:4", "looks like a date or a number", "quotes"),
    "a: 1\nb: \x00\n": ("2:4", "the control character U+0000", "remove it"),
}
TOML = {
    "a = 1\nb = x\n": ("2:5", "not a value", "double quotes"),
    "a: 1\n": ("1:2", "a key without `=`", "write `key = value`"),
    "a = 1\na = 2\n": ("2:6", "there already", "keep one"),
    'a = "x\nb = 1\n': ("1:7", "a quote is not closed", "close it"),
    'a = 1\nb = "x': ("2:7", "a quote is not closed", "close it"),
    "a = [1, 2\nb = 1\n": ("2:1", "a list lacks", "]"),
    "a = {b = 1\n}\n": ("1:11", "an inline table lacks", "}"),
    "[a\n": ("1:3", "a table's name", "]"),
    "a = 1 b = 2\n": ("1:7", "more text behind a value", "a line"),
    "= 1\n": ("1:1", "neither a key nor a table", "key = value"),
    'a = "C:\\data"\n': ("1:10", "a backslash", "single quotes"),
}
PARSERS = ("scanning", "<block", "scalar", "mark", "found character", "yaml", "expected", "tomllib", "at line")


def _check(error: TextFileInvalid, file: str, place: str, words: str, remedy: str) -> None:
    said = str(error)
    assert "\n" not in said
    assert said.startswith(f"{file}:{place}: ")
    assert words in said
    assert remedy in error.remedy
    assert not [word for word in PARSERS if word in said.removeprefix(file).lower().replace("not yaml", "")]


@pytest.mark.parametrize("text", YAML)
def test_a_broken_yaml_file_is_told_by_place_words_and_remedy(tmp_path: Path, text: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(TextFileInvalid) as caught:
        read_yaml(file)
    _check(caught.value, str(file), *YAML[text])


@pytest.mark.parametrize("text", TOML)
def test_a_broken_toml_file_is_told_by_place_words_and_remedy(text: str) -> None:
    with pytest.raises(TextFileInvalid) as caught:
        parse_toml(text, "work.toml")
    _check(caught.value, "work.toml", *TOML[text])


def test_what_is_no_text_and_what_is_too_deep_are_told_too(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(TextFileInvalid, match=r"job\.yaml:2:4: not UTF-8 text"):
        read_yaml(file)
    file.write_text("a: " + "[" * 100_000)
    with pytest.raises(TextFileInvalid, match="too deep to be read"):
        read_yaml(file)
    for text in ("a = " + "[" * 100_000, "a = " + "9" * 5000):
        with pytest.raises(TextFileInvalid, match="work"):
            parse_toml(text, "work")


def test_files_that_are_fine_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"a: 1\r\nb: 2026-11-26\r\nc: |\r\n  x\r\n  y\r\n")
    values = read_yaml(file)
    assert (values["a"], values["b"].isoformat(), values["c"]) == (1, "2026-11-26", "x\ny\n")
    file.write_text("")
    assert read_yaml(file) is None
