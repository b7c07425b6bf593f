"""Bottlenecks in training against a reference that follows AdapterHub's package, in float64."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.formats.peft.writer import write_files
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.methods.bottlenecks import BottleneckKind, bottleneck
from loramux_trainer.methods.trained import TrainedAdapter
from support.bottlenecks import with_bottlenecks
from support.fleets import dequantize, examples_of, jitter, name_in_file, summed_loss
from support.tiny import load_tiny

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))


@pytest.mark.parametrize("kind", get_args(BottleneckKind))
def test_loss_and_gradients_equal_adapterhub(
    kind: BottleneckKind, model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, tmp_path: Path
) -> None:
    spec = fleet_base.spec
    method = bottleneck(spec, 0, kind=kind, reduction_factor=8, activation="silu")
    adapter = TrainedAdapter(method, spec, fleet_base.device)
    jitter(adapter, 0.05)
    examples = examples_of(tokenizer, TEXTS)
    parts = adapter.parts(with_gradients=True)
    with model.running([MemberRows(parts, tuple(examples), 0)]) as hidden:
        loss, _ = model.token_loss(hidden, torch.ones(len(hidden.targets)))
        loss.backward()  # type: ignore[no-untyped-call]
    parts.backward()
    gradients = {name: g for group in adapter.parameters.groups for name, g in group.gradients.items()}

    config, tensors = adapter.files()
    write_files(tmp_path, config, tensors, spec.fingerprint, weights_file=adapter.layout.weights_file)
    plain = load_tiny().model
    dequantize(plain)
    reference = with_bottlenecks(plain, tmp_path)
    torch.nn.Module.to(reference, torch.float64).requires_grad_(True)
    exact = summed_loss(reference, examples)
    exact.backward()
    torch.testing.assert_close(float(loss.detach()), float(exact.detach()), rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        other = reference.get_parameter(name_in_file(adapter, name)).grad
        torch.testing.assert_close(gradient.double(), other, atol=4e-5 * float(other.abs().max()), rtol=0)
