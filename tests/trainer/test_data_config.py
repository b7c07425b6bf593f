"""The `data` section of a job: names for columns, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from loramux_adapters.validation import ValuesInvalid, read
from loramux_trainer.schema.data_config import DataConfig


def test_columns_and_masks_are_read() -> None:
    given = {
        "columns": {"prompt": "question"},
        "ignore_columns": ["id"],
        "packing": True,
        "completion_only_loss": False,
    }
    data = read(DataConfig, {"train": "t", **given})
    assert (data.columns, data.ignore_columns) == ({"prompt": "question"}, ("id",))
    assert (data.packing, data.completion_only_loss, data.assistant_only_loss) == (True, False, None)
    assert hash(data) == hash(read(DataConfig, {"train": "t", **given}))


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        ({"columns": {"promt": "q"}}, "columns", "promt is not a key of a record; did you mean prompt?"),
        ({"columns": {"prompt": "q", "text": "q"}}, "columns", "gives one column of the file two names"),
        ({"columns": {"prompt": ""}}, "columns.prompt", "must be a non-empty string"),
        ({"columns": ["prompt"]}, "columns", "must be a mapping, not ['prompt']"),
        ({"columns": {"prompt": "q"}, "ignore_columns": ["q"]}, "ignore_columns", "q is also in data.columns"),
        ({"packing": "yes"}, "packing", "must be true or false"),
        ({"instruction_format": "vicuna"}, "instruction_format", "must be one of chat, alpaca"),
    ],
)
def test_a_mistake_is_named(given: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ValuesInvalid) as caught:
        read(DataConfig, {"train": "t", **given})
    [(field, rule)] = caught.value.findings
    assert field == key
    assert says in rule
