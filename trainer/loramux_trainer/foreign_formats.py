"""Data files of other trainers and tools, recognized by their looks and named with what to do about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_ARE_NEEDED: Final = "JSON Lines are needed, one JSON object a line"

_MAGIC: Final = {
    b"\xff\xfe": "UTF-16, not UTF-8: save it as UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8: save it as UTF-8",
    b"PAR1": f"a Parquet file: {_ARE_NEEDED} (datasets: Dataset.from_parquet(...).to_json(...))",
    b"ARROW1": f"an Arrow file: {_ARE_NEEDED} (datasets: Dataset.from_file(...).to_json(...))",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
}

_RECORDS: Final = (
    (
        {"chosen", "rejected"},
        "a preference record (chosen, rejected): preferences are not trained here, only answers; keep the chosen one, "
        "as completion or as the last message",
    ),
    (
        {"conversations"},
        "a ShareGPT record: rename conversations to messages, from to role, value to content, human to user and gpt to "
        "assistant",
    ),
    (
        {"instruction", "output"},
        "an Alpaca record: write instruction and input into prompt, or into a user message, and output into "
        "completion, or into the assistant's",
    ),
    ({"text"}, 'a record of plain text: write {"prompt": "", "completion": ...} to train all of it'),
)


def name_file_format(path: Path, head: bytes) -> str | None:
    """What a file is whose first bytes are `head`, if that cannot be JSON Lines."""
    if path.suffix.lower() in (".csv", ".tsv") and not head.lstrip().startswith(b"{"):
        return f"a table ({path.suffix}): {_ARE_NEEDED}"
    return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), None)


def name_line_format(path: Path, line: str) -> str | None:
    """What a file is whose first line with text is `line`, if that is JSON but not JSON Lines."""
    lines = f"{path.stem}.jsonl" if path.suffix != ".jsonl" else f"{path.stem}.lines.jsonl"
    if line.lstrip().startswith("["):
        return f"a JSON array: {_ARE_NEEDED} (jq -c '.[]' {path.name} > {lines})"
    if line.strip() == "{":
        return f"a JSON object over several lines: {_ARE_NEEDED} (jq -c . {path.name} > {lines})"
    return None


def name_record_format(record: Mapping[str, Any]) -> str | None:
    """What a record is that another trainer would read."""
    if isinstance(record.get("label"), bool):  # false would be ignored as an empty key, and a bad answer trained
        return (
            "a KTO record (label): good and bad answers are not distinguished here; keep the good ones, without label"
        )
    if "messages" in record or "completion" in record:
        return None
    return next((form for keys, form in _RECORDS if keys <= record.keys()), None)
