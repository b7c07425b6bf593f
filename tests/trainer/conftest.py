"""The embedded base once per worker, and small jobs on it."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_trainer.job import TrainConfig, parse_job
from support.tiny import conversation, load_tiny, tiny_tokenizer, write_jsonl

RECORDS = [{"messages": conversation(f"word{i * 7 % 40}", f"drow{i}{'!' * (i % 9)}")} for i in range(40)]


@pytest.fixture(scope="session")
def base() -> LoadedBase:
    return load_tiny()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For deterministic mode: many small products on two wait for each other where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a ten-step job in `tmp_path`; keyword arguments are sections that override its values."""

    def make(output: str = "adapter", model: str = "loramux-tiny", **sections: dict[str, Any]) -> TrainConfig:
        write_jsonl(tmp_path / "train.jsonl", RECORDS)
        values: dict[str, Any] = copy.deepcopy(
            {
                "model": model,
                "output": output,
                "data": {"train": "train.jsonl", "eval_fraction": 0.1},
                "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
                "training": {
                    "learning_rate": 1e-2,
                    "max_steps": 10,
                    "batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "eval_steps": 4,
                },
            }
        )
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        if not (values["data"]["eval_fraction"] or "eval" in values["data"]):
            del values["training"]["eval_steps"]  # nothing is evaluated
        return parse_job(values, root=tmp_path)

    return make
