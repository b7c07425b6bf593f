"""Data files into plain values with their lines: JSON Lines, a JSON array, CSV; what has columns of its own is read by
columnar_files. A file is recognized by its content, a table by its name.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from loramux_trainer.data.columnar_files import is_columnar, read_columnar
from loramux_trainer.data.foreign_formats import name_file_format, name_line_format
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.errors import DataInvalid, Problems

_TABLES: Final = {".csv": ",", ".tsv": "\t"}
_BLANK: Final = " \t\r\n"
# csv refuses longer cells than 128 KiB by default: a conversation may be longer.
_LONGEST_CELL: Final = 2**31 - 1
_TURNS: Final = ({"role", "content"}, {"from", "value"})
# How a list of messages, or of ShareGPT's turns, begins.
_MESSAGES: Final = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')
_PYTHON_MESSAGES: Final = re.compile(r"\s*\[\s*\{\s*('role'|'content'(?=.*'role')|'from'(?=.*'value'))\s*:", re.DOTALL)


def read_values(path: Path, problems: Problems | None = None) -> Iterator[tuple[int, Any]]:
    """(line, value) of each record; of a file with columns the row, from 1. Raises DataInvalid with file and line.

    A line that is not JSON goes to `problems` where they are given, and reading continues after it.
    """
    seen = False
    try:
        for number, value in _values(path, problems):
            seen = True
            if not isinstance(value, _Passed):
                yield number, value
    except OSError as error:
        raise DataInvalid(path, 0, f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataInvalid(path, 0, f"not UTF-8 at byte {error.start}") from error
    if not seen:
        raise DataInvalid(path, 0, "has no record")


class _Passed:
    """Stands for a line that is among the problems: a file of these alone is not empty."""


def _values(path: Path, problems: Problems | None) -> Iterator[tuple[int, Any]]:
    if path.is_dir():
        return read_columnar(path)
    with path.open("rb") as file:
        head = file.read(8)
    if is_columnar(head):
        return read_columnar(path)
    if (form := name_file_format(head)) is not None:
        raise DataInvalid(path, 0, form)
    if path.suffix.lower() in _TABLES and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return _read_table(path, _TABLES[path.suffix.lower()])
    with path.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
    return _read_array(path) if first.lstrip().startswith("[") else _read_lines(path, problems)


def _read_lines(path: Path, problems: Problems | None) -> Iterator[tuple[int, Any]]:
    first = True
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if first and (form := name_line_format(path, line)) is not None:
                raise DataInvalid(path, number, form)
            first = False
            try:
                value = _located(path, number, line)
            except DataInvalid as error:
                if problems is None:
                    raise
                problems.add(error)
                value = _Passed()
            yield number, value


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    """Each element with the line it begins on. After a mistake in the syntax nothing can be read any more."""
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
    line, at, seen = 1, 0, False

    def skip(begin: int) -> int:
        nonlocal line
        end = begin
        while end < len(text) and text[end] in _BLANK:
            end += 1
        line += text.count("\n", begin, end)
        return end

    at = skip(skip(at) + 1)
    while text[at : at + 1] != "]" or seen:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataInvalid(path, error.lineno, f"not JSON: {error.msg} at column {error.colno}") from error
        except RecordInvalid as error:
            raise DataInvalid(path, line, str(error)) from error
        except (ValueError, RecursionError) as error:
            raise DataInvalid(path, line, f"not JSON that can be read: {error}") from error
        seen = True
        yield line, value
        line += text.count("\n", at, end)
        at = skip(end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise DataInvalid(path, line, "not JSON: a comma, or the ] that ends the array, is missing")
        at = skip(at + 1)
    if not seen:
        raise DataInvalid(path, line, "a JSON array without a record")
    if skip(at + 1) != len(text):
        raise DataInvalid(path, line, "more text after the JSON array: one array, or one JSON object a line, is read")


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        ended = 0  # the line on which the row before ended: a cell may have several
        try:
            for row in rows:
                begin, ended = ended + 1, rows.line_num
                if not row:
                    continue
                if not header:
                    header = _check_header(path, begin, row, delimiter)
                    continue
                if len(row) != len(header):
                    raise DataInvalid(path, begin, f"has {len(row)} cells, the first line names {len(header)} columns")
                yield begin, {name: _opened(path, begin, name, cell) for name, cell in zip(header, row, strict=True)}
        except csv.Error as error:
            raise DataInvalid(path, rows.line_num, f"not a table that can be read: {error}") from error


def _opened(path: Path, line: int, name: str, cell: str) -> Any:
    """Messages in a cell, which can only hold them as JSON; any other text as it is."""
    if _PYTHON_MESSAGES.match(cell):
        raise DataInvalid(path, line, f"{name} has messages as Python prints them: write them with json.dumps")
    if not _MESSAGES.match(cell):
        return cell
    value = _located(path, line, cell)
    are_turns = all(isinstance(turn, dict) and any(pair <= turn.keys() for pair in _TURNS) for turn in value)
    return value if are_turns else cell


def _check_header(path: Path, line: int, header: list[str], delimiter: str) -> list[str]:
    names = [name.strip() for name in header]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice:
        raise DataInvalid(path, line, f"the column {twice!r} is there twice")
    if "" in names:
        raise DataInvalid(
            path, line, f"column {names.index('') + 1} has no name: give it one, or leave it out (pandas: index=False)"
        )
    other = next((sign for sign in ",;\t|" if sign != delimiter and sign in names[0]), None)
    if len(names) == 1 and other is not None:
        rule = f"columns are separated by {delimiter!r} here, not {other!r}"
        raise DataInvalid(path, line, f"one column, {names[0]!r}: {rule}")
    return names


def _located(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataInvalid(path, number, f"not JSON: {error.msg} at column {error.colno}") from error
    except RecordInvalid as error:
        raise DataInvalid(path, number, str(error)) from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond what Python reads
        raise DataInvalid(path, number, f"not JSON that can be read: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RecordInvalid(f"the key {twice!r} is given twice in one object")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise RecordInvalid(f"{name} is neither text nor a number: write null, or leave the record out")
