"""The optimizer step against one written out by hand: clipping, betas and weight decay each take effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loramux_adapters.apply.trainable import TrainableAdapter, attach
from loramux_adapters.base.load import LoadedBase
from loramux_trainer.data import DataReport, DataSet
from loramux_trainer.examples import Unit
from loramux_trainer.job import OptimConfig
from loramux_trainer.loop import Loop
from loramux_trainer.records import parse_record
from support.tiny import conversation, tiny_encoder

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
PLAIN = OptimConfig(
    learning_rate=1e-2,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=0,
    max_steps=4,
    batch_size=2,
    max_grad_norm=None,
)


@pytest.fixture
def data(tokenizer: Any) -> DataSet:
    encoder = tiny_encoder(tokenizer)
    records = [parse_record({"messages": conversation(f"word{i}", "drow" * (i + 1))}) for i in range(4)]
    units = tuple(Unit((example,)) for record in records for example in encoder.encode(record))
    return DataSet(units, (), DataReport(4, 4, 0, 0, 0, 0, 0, 0, 0, 0), "")


@pytest.fixture
def adapter(base: LoadedBase) -> Iterator[TrainableAdapter]:
    ranks, scales = dict.fromkeys(MODULES, 4), dict.fromkeys(MODULES, 2.0)
    with attach(base, ranks, scales=scales) as attached:
        torch.manual_seed(0)
        attached.load_state({n: (a, 0.1 * torch.randn_like(b)) for n, (a, b) in attached.state().items()})
        yield attached


def _by_hand(parameter: torch.Tensor, gradients: list[torch.Tensor], job: OptimConfig) -> torch.Tensor:
    """AdamW as Loshchilov and Hutter write it (2019)."""
    value, (beta1, beta2) = parameter.double(), job.betas
    first = second = torch.zeros_like(value)
    for step, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        value = value * (1 - job.learning_rate * job.weight_decay)
        scaled = (second / (1 - beta2**step)).sqrt() + 1e-8
        value = value - job.learning_rate * first / (1 - beta1**step) / scaled
    return value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.05},
        {"betas": (0.3, 0.9)},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.1, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_a_step_is_adamw_on_the_clipped_gradients(
    base: LoadedBase,
    adapter: TrainableAdapter,
    data: DataSet,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = OptimConfig(**{**PLAIN.__dict__, **options})
    loop = Loop(base.model, adapter, data, job, pad_id=0, device=torch.device("cpu"))
    parameters = adapter.parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    raw: list[list[torch.Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def seen(owned: Any, most: float) -> torch.Tensor:
        raw.append([parameter.grad.detach().double().clone() for parameter in owned])
        return clip(owned, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", seen)
    for number in range(3):
        report = loop.train_step()
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in raw[number]))
        assert report.gradient_norm == pytest.approx(norm, rel=1e-5)
        if job.max_grad_norm is not None:
            assert norm > job.max_grad_norm, "nothing to clip: the case would not notice"
            raw[number] = [gradient * (job.max_grad_norm / norm) for gradient in raw[number]]
    for index, (start, parameter) in enumerate(zip(before, parameters, strict=True)):
        expected = _by_hand(start, [gradients[index] for gradients in raw], job)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=2e-5, rtol=0)
