"""Parquet and Arrow files, and directories that datasets' save_to_disk wrote, into plain values with their rows.

Read by pyarrow, which is an extra: without it they are refused with the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from loramux_trainer.errors import DataInvalid

_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ROWS: Final = 256  # that are values at a time

_WITHOUT_PYARROW: Final = (
    "reading it needs pyarrow, which is not installed: pip install pyarrow, or write JSON Lines instead "
    "(datasets: to_json(...))"
)


def is_columnar(head: bytes) -> bool:
    """Whether a file begins as one of these."""
    return head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM))


def is_dataset(path: Path) -> bool:
    """Whether a directory is one that save_to_disk wrote."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def read_columnar(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, value) of a file or a saved dataset. A cell or key without a value is left out.

    Raises DataInvalid, and OSError of the files.
    """
    what = "a saved dataset"
    if not path.is_dir():
        with path.open("rb") as file:
            what = "a Parquet file" if file.read(4) == _PARQUET else "an Arrow file"
    files = _shards(path) if path.is_dir() else [path]
    try:
        import pyarrow
    except ImportError as error:
        raise DataInvalid(path, 0, f"{what}: {_WITHOUT_PYARROW}") from error
    row = 0
    for file_path in files:
        try:
            for batch in _batches(file_path):
                names = batch.schema.names
                if len(set(names)) < len(names):
                    raise DataInvalid(path, 0, f"the column {max(names, key=names.count)!r} is there twice")
                for start in range(0, batch.num_rows, _ROWS):
                    for value in batch.slice(start, _ROWS).to_pylist():
                        row += 1
                        yield row, _without_nulls(value)
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file system; a torn file is an OSError of pyarrow without a number
            where = f" ({file_path.name})" if len(files) > 1 else ""
            reason = str(error).partition("\n")[0]
            raise DataInvalid(path, 0, f"{what}{where} that cannot be read after row {row}: {reason}") from error


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith(_PARQUET):
            yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_ROWS)
        elif head.startswith(_ARROW_FILE):
            reader = pyarrow.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            yield from pyarrow.ipc.open_stream(file)


def _shards(directory: Path) -> list[Path]:
    """The files of a saved dataset, in its order."""
    if (directory / _SPLITS).is_file():
        splits = _read_json(directory, _SPLITS).get("splits")
        splits = [str(name) for name in splits] if isinstance(splits, list) and splits else ["train"]
        one = directory / splits[0]
        raise DataInvalid(directory, 0, f"a saved dataset with the splits {', '.join(splits)}: give one, such as {one}")
    if not (directory / _STATE).is_file():
        raise DataInvalid(directory, 0, f"a directory without {_STATE}: no dataset that save_to_disk wrote")
    state = _read_json(directory, _STATE)
    listed = state.get("_data_files")
    shards = listed if isinstance(listed, list) else []
    names = [str(shard.get("filename", "")) for shard in shards if isinstance(shard, dict)]
    if not names or not all(name and Path(name).name == name for name in names):
        raise DataInvalid(directory, 0, f"{_STATE} names no data files in the directory")
    if state.get("_indices_data_files"):
        raise DataInvalid(directory, 0, "a saved selection of rows: save dataset.flatten_indices() instead")
    return [directory / name for name in names]


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataInvalid(directory, 0, f"{name} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _without_nulls(value: Any) -> Any:
    """Columns give every value all keys that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(content) for key, content in value.items() if content is not None}
    return [_without_nulls(content) for content in value] if isinstance(value, list) else value
