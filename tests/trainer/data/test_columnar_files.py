"""Parquet, Arrow and saved datasets: rows as they were, or the reason. Without pyarrow, what to install."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.record_types import Conversation
from loramux_trainer.data.records import read_records
from loramux_trainer.errors import DataInvalid, JobInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.preflight import check_job

needs_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
# What datasets' imports and its dill say.
quiet = pytest.mark.filterwarnings("ignore")

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
VALUES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"ä{i}"}, {"role": "assistant", "content": "b"}]} for i in range(600)
]
VALUES[1]["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def _write(path: Path, form: str, values: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(values)
    if form == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    else:
        new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    return path


@needs_pyarrow
@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_rows_are_what_was_written(tmp_path: Path, form: str) -> None:
    records = list(read_records(_write(tmp_path / "t.bin", form, VALUES)))
    assert [row for row, _ in records] == list(range(1, 601))
    messages = [record.messages for _, record in records if isinstance(record, Conversation)]
    assert [list(one) for one in messages[:1] + messages[2:]] == [v["messages"] for v in VALUES[:1] + VALUES[2:]]
    assert messages[1][1] == {"role": "assistant", "tool_calls": [CALL]}  # content without a value is left out


@needs_pyarrow
def test_a_row_is_named_by_its_number(tmp_path: Path) -> None:
    values = [*VALUES[:300], {"messages": []}, *VALUES[:2]]
    with pytest.raises(DataInvalid, match=r"t\.parquet:301: messages must be a non-empty list"):
        list(read_records(_write(tmp_path / "t.parquet", "parquet", values)))


@needs_pyarrow
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["label", "text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataInvalid, match=r"t\.parquet: the column 'text' is there twice"):
        list(read_records(tmp_path / "t.parquet"))


@needs_pyarrow
def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.arrow", "stream", VALUES)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataInvalid, match=r"t\.arrow: an Arrow file that cannot be read after row \d+: "):
        list(read_records(path))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataInvalid, match=r"t\.parquet: a Parquet file that cannot be read after row 0: "):
        list(read_records(tmp_path / "t.parquet"))


@needs_datasets
@quiet
def test_a_saved_dataset_is_read_in_its_order(tmp_path: Path, make_job: Callable[..., TrainConfig]) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(VALUES)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    records = [record for _, record in read_records(tmp_path / "saved")]
    assert [record.messages[0]["content"] for record in records if isinstance(record, Conversation)] == [
        value["messages"][0]["content"] for value in VALUES
    ]
    check_job(make_job(data={"train": "saved"}), resume=False)
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "both")
    with pytest.raises(DataInvalid, match=r"both: a saved dataset with the splits train, test: give one, such as "):
        check_job(make_job(data={"train": "both"}), resume=False)
    assert len(list(read_records(tmp_path / "both" / "test"))) == 600


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("{", "state.json is not JSON"),
        ("[]", "state.json names no data files"),
        (json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}), "state.json names no data files in the dir"),
        (json.dumps({"_data_files": [{"filename": "a"}], "_indices_data_files": [{}]}), "a saved selection of rows"),
        (json.dumps({"_data_files": [{"filename": "a.arrow"}]}), "cannot be read: No such file|needs pyarrow"),
    ],
)
def test_a_broken_saved_dataset_is_named(tmp_path: Path, state: str, says: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataInvalid, match=says):
        list(read_records(tmp_path))


def test_another_directory_is_no_data(tmp_path: Path, make_job: Callable[..., TrainConfig]) -> None:
    with pytest.raises(DataInvalid, match=r"a directory without state\.json: no dataset that save_to_disk wrote"):
        list(read_records(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobInvalid, match=r"data\.train: .*empty is not a readable file"):
        check_job(make_job(data={"train": "empty"}), resume=False)


@pytest.mark.parametrize(("head", "what"), [(b"PAR1", "a Parquet file"), (b"ARROW1", "an Arrow file")])
def test_without_pyarrow_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, what: str
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.bin").write_bytes(head + b"....")
    with pytest.raises(DataInvalid, match=rf"t\.bin: {what}: reading it needs pyarrow, .*: pip install pyarrow, or "):
        list(read_records(tmp_path / "t.bin"))
