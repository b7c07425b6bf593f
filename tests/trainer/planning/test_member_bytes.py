"""Bytes of a base and of members, planned without weights, against those that are built: the same to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.base.unloaded import BaseBytes, base_bytes, read_unloaded
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer.job import parse_job
from loramux_trainer.methods.build import Surroundings, build_method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.optimizers.build import build_optimizer
from loramux_trainer.planning.member_bytes import member_bytes
from loramux_trainer.targets import modules_of

CPU = torch.device("cpu")
METHODS = (
    "lora", "rslora", "dora", "adalora", "vera", "loha", "lokr", "ia3", "bitfit", "prompt", "p-tuning", "prefix",
    "bottleneck", "galore",
)  # fmt: skip


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_base_are_those_of_the_loaded_one(dtype: torch.dtype, double_quant: bool) -> None:
    planned = read_unloaded(tiny_path(), compute_dtype=dtype, device=CPU, double_quant=double_quant)
    assert all(parameter.is_meta for parameter in planned.model.parameters())
    assert base_bytes(planned) == _held(load_base(tiny_path(), compute_dtype=dtype, double_quant=double_quant))


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_a_method_are_those_of_the_built_member(base: LoadedBase, method: str) -> None:
    _compare(base, {"method": method, **({"bitfit": {"biases": False, "norms": True}} if method == "bitfit" else {})})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon", "sophia"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_bytes_of_an_optimizer_are_those_of_the_built_member(base: LoadedBase, method: str, optimizer: str) -> None:
    _compare(base, {"method": method, "training": {"max_steps": 100, "optimizer": optimizer}})


def test_momentum_has_a_state(base: LoadedBase) -> None:
    training = {"max_steps": 100, "optimizer": "sgd"}
    assert _compare(base, {"training": training}) == 0
    assert _compare(base, {"training": {**training, "momentum": 0.9}}) > 0


def _compare(base: LoadedBase, values: dict[str, Any]) -> int:
    """Bytes of the optimizer's state."""
    given = {"model": "loramux-tiny", "output": "out", "data": {"train": "train.jsonl"}, "training": {"max_steps": 100}}
    job = parse_job({**given, **values})
    planned = member_bytes(job, read_unloaded(tiny_path(), compute_dtype=torch.float32, device=CPU), 100)
    around = Surroundings(
        base, BaseValues(base), modules_of(job, base.spec), 100, print, encode=lambda text: [1] * len(text)
    )
    adapter = TrainedAdapter(build_method(job, around), base.spec, CPU)
    groups = adapter.parameters.groups
    optimizer = build_optimizer(job.training, groups)
    if optimizer.needs_hessian:
        optimizer.give_hessian([torch.ones_like(group.flat) for group in groups])
    optimizer.step(1e-4)
    state = sum(_nbytes(each) for name, each in optimizer.tensors().items() if not _is_count(name, each))
    assert (planned.weights, planned.gradients) == (_nbytes(adapter.parameters.weights),) * 2
    assert planned.optimizer == state
    assert planned.method == adapter.constant_bytes + sum(map(_nbytes, adapter.tensors().values()))
    return planned.optimizer


def _is_count(name: str, tensor: torch.Tensor) -> bool:
    """Steps that a library counts as a number, which becomes a tensor only when it is saved."""
    return name.endswith(".step") and tensor.dtype == torch.int64


def _held(base: LoadedBase) -> BaseBytes:
    codes = scales = 0
    four_bit = set()
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            four_bit.add(id(module.weight))
            codes += _nbytes(module.weight)
            scales += _nbytes(state.absmax) + _nbytes(state.code)
            if state.nested:
                scales += _nbytes(state.offset) + _nbytes(state.state2.absmax) + _nbytes(state.state2.code)
    others = [each for each in (*base.model.parameters(), *base.model.buffers()) if id(each) not in four_bit]
    return BaseBytes(codes, scales, sum(map(_nbytes, others)))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
