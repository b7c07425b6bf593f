"""Data files that are not read, recognized by their looks and named with what to do about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_MAGIC: Final[Mapping[bytes, str]] = {
    b"\xff\xfe": "UTF-16, not UTF-8: save it as UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8: save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
}


def name_file_format(head: bytes) -> str | None:
    """What a file is whose first bytes are `head`, if that is not read."""
    return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), None)


def name_line_format(path: Path, line: str) -> str | None:
    """What a file is whose first line with text is `line`, if that is JSON but neither lines nor an array."""
    lines = f"{path.stem}.jsonl" if path.suffix != ".jsonl" else f"{path.stem}.lines.jsonl"
    if line.strip() == "{":
        return (
            "a JSON object over several lines: JSON Lines are needed, one JSON object a line "
            f"(jq -c . {path.name} > {lines})"
        )
    return None
