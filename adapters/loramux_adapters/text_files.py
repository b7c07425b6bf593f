"""YAML and TOML files that a person writes: where they cannot be read, one line with file, line and column, what is
wrong and what to do.

The one place that translates the words of the two parsers. Knows no schema.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

_QUOTE = "put the value in quotes"
_INDENT = "indent the keys of one section by the same number of spaces"
# What PyYAML's `problem` begins with -> what is wrong, the remedy, whether the place is where the thing began.
_YAML: tuple[tuple[str, str, str, bool], ...] = (
    (r"found character '\\t'", "a tab", "indent with spaces", False),
    (r"found character '(?P<what>.+)' that", "a value cannot begin with {what}", _QUOTE, False),
    (
        "mapping values are not allowed",
        "a colon where none fits",
        f"{_INDENT}, write `key: value` with a space, or put a value that contains a colon in quotes",
        False,
    ),
    ("could not find expected ':'", "a line without `:` after its key", "write `key: value`", True),
    ("sequence entries are not allowed", "a list cannot begin behind its key", "put `- ` on a line of its own", False),
    ("expected <block end>, but found '-'", "a list item among the keys of a section", _INDENT, False),
    ("expected <block end>, but found '<scalar>'", "text behind a value in quotes", "put it within the quotes", False),
    ("expected '?<(block end|document start)>", "this line is not indented as those before it", _INDENT, False),
    ("found unexpected end of stream", "the quote that begins here is not closed", "close it", True),
    ("expected ',' or ']'", "the list that begins here lacks a comma or its ]", "close it with ]", True),
    ("expected ',' or '}'", "the mapping that begins here lacks a comma or its }}", "close it with }", True),
    (
        "expected the node content, but found '<stream end>'",
        "the file ends within a list or mapping",
        "close it",
        False,
    ),
    ("expected the node content, but found '(?P<what>[^<].*)'", "a value is missing before {what}", _QUOTE, False),
    ("found unknown escape", "a backslash in double quotes that begins no escape", "use single quotes", False),
    ("could not determine a constructor", "a value that begins with ! is a tag, which is not read", _QUOTE, False),
    ("found undefined alias", "a value that begins with * is an alias, and nothing has that name", _QUOTE, False),
    ("expected alphabetic or numeric", "a value that begins with & or * names an anchor", _QUOTE, False),
    ("found unhashable key", "a list or a mapping as a key", f"{_QUOTE}, where it is text in braces", False),
    ("expected chomping or indentation", "a value that begins with | or > is a block of lines", _QUOTE, False),
    ("looks like a date", "looks like a date or a number and is none", f"correct it, or {_QUOTE}", False),
    ("but found another document", "a second document", "keep one, and remove the line ---", False),
)
_TOML: tuple[tuple[str, str, str], ...] = (
    ("Invalid value", "not a value", "text is in double quotes, and true and false have no capitals"),
    ("Expected '='", "a key without `=` after it", "write `key = value`"),
    ("Cannot (overwrite|declare)", "this key or table is there already", "keep one of them"),
    (r"(Illegal character '\\n'|Unterminated string|Expected \"'')", "a quote is not closed", "close it"),
    ("Unclosed array", "a list lacks a comma or its ]", "close it with ]"),
    ("Unclosed inline table", "an inline table lacks a comma or its } on the same line", "close it with }"),
    ("Expected ']'", "a table's name lacks its ]", "close it with ]"),
    ("Expected newline", "more text behind a value", "one `key = value` a line; text is in double quotes"),
    ("Invalid statement", "a line begins with neither a key nor a table", "write `key = value`, or `[table]`"),
    ("Unescaped", "a backslash in double quotes that begins no escape", "use single quotes"),
)
_TOML_PLACE = re.compile(r"(?P<problem>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.S)
_DEFAULT_REMEDY = "correct this place"
_TOO_DEEP = "lists and mappings within one another, too deep to be read"


class TextFileInvalid(ValueError):
    """A file is not what its kind demands; the message is one line that begins with its name. `remedy`: what to do."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def read_text(path: Path) -> str:
    """The text of the file. Raises TextFileInvalid where it is not UTF-8, OSError where it cannot be read."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise TextFileInvalid(f"{path}:{line}:{column}: not UTF-8 text", remedy="save the file as UTF-8") from error


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, None where it is empty. Raises TextFileInvalid and OSError."""
    text = read_text(path)
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise _of_yaml(error, path) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise TextFileInvalid(
            f"{path}:{line}:{column}: not YAML: the control character U+{ord(text[error.position]):04X}",
            remedy="remove it",
        ) from error
    except RecursionError as error:
        raise TextFileInvalid(f"{path}: {_TOO_DEEP}", remedy="write it flatter") from error


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The plain values of a TOML file's text; `name` is the file's in messages. Raises TextFileInvalid."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _of_toml(str(error), text, name) from error
    except RecursionError as error:
        raise TextFileInvalid(f"{name}: {_TOO_DEEP}", remedy="write it flatter") from error
    except ValueError as error:  # Python's own bound on the digits of an integer
        raise TextFileInvalid(f"{name}: a number with too many digits", remedy="give a number") from error


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A date that does not exist and a number of thousands of digits get the place they stand at."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, "looks like a date", node.start_mark) from error


def _of_yaml(error: yaml.MarkedYAMLError, path: Path) -> TextFileInvalid:
    what, remedy, mark = error.problem or "cannot be read", _DEFAULT_REMEDY, error.problem_mark
    for pattern, words, to_do, is_at_begin in _YAML:
        if found := re.match(pattern, what):
            what, remedy = words.format(**found.groupdict()), to_do
            mark = (error.context_mark if is_at_begin else None) or mark
            break
    place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
    return TextFileInvalid(f"{path}{place}: not YAML: {what}", remedy=remedy)


def _of_toml(said: str, text: str, name: str) -> TextFileInvalid:
    found = _TOML_PLACE.fullmatch(said)
    what = found["problem"] if found else said
    lines = text.splitlines() or [""]
    line, column = (found["line"], found["column"]) if found else (None, None)
    line, column = (line, column) if line else (len(lines), len(lines[-1]) + 1)
    remedy = _DEFAULT_REMEDY
    for pattern, words, to_do in _TOML:
        if re.match(pattern, what):
            what, remedy = words, to_do
            break
    return TextFileInvalid(f"{name}:{line}:{column}: not TOML: {what}", remedy=remedy)
