"""What a job will train, counted without weights, against the adapter that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.unloaded import read_unloaded
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer.job import parse_job
from loramux_trainer.methods.build import Surroundings, build_method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.parameter_count import count_parameters
from loramux_trainer.targets import modules_of

CPU = torch.device("cpu")
METHODS = (
    "lora", "rslora", "dora", "adalora", "vera", "loha", "lokr", "ia3", "bitfit", "prompt", "p-tuning", "prefix",
    "bottleneck", "galore",
)  # fmt: skip
GIVEN = {"model": "loramux-tiny", "output": "out", "data": {"train": "train.jsonl"}, "training": {"max_steps": 100}}


@pytest.fixture(scope="module")
def unloaded() -> LoadedBase:
    return read_unloaded(tiny_path(), compute_dtype=torch.float32, device=CPU)


def test_nothing_of_the_base_takes_memory(unloaded: LoadedBase, base: LoadedBase) -> None:
    assert all(parameter.is_meta for parameter in unloaded.model.parameters())
    assert unloaded.spec.modules == base.spec.modules


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_that_of_the_built_adapter(base: LoadedBase, unloaded: LoadedBase, method: str) -> None:
    own: dict[str, Any] = {"bitfit": {"biases": False, "norms": True}} if method == "bitfit" else {}
    job = parse_job({**GIVEN, "method": method, **own})
    around = Surroundings(
        base, BaseValues(base), modules_of(job, base.spec), 100, print, encode=lambda text: [1] * len(text)
    )
    built = TrainedAdapter(build_method(job, around), base.spec, CPU)
    assert count_parameters(job, unloaded, 100) == built.parameters.weights.numel() > 0
