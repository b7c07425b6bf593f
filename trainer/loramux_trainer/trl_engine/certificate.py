"""The certificate of what trl trained: PEFT's own logits on the probes, beside the fleet's of the exported files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loramux_adapters.base.load import BaseRefused, LoadedBase
from loramux_adapters.guard.examine import Examined
from loramux_adapters.weights import AdapterWeights
from loramux_trainer.base_reading import BaseReading
from loramux_trainer.certify import Asked, Certified, certify, questions
from loramux_trainer.errors import ModelInvalid, OutputFailed
from loramux_trainer.fleet.model import FleetModel


def certify_peft(
    model: Any, base: LoadedBase, examined: Examined, exported: AdapterWeights, reading: BaseReading
) -> Certified:
    """`model` is PEFT's, around the base; it is the bare base afterwards.

    Raises OutputFailed where what was exported computes other logits than PEFT, and ModelInvalid for a base whose
    logits the fleet does not know.
    """
    asked = questions(exported.spec, base.spec, reading)
    as_trained = _logits(model, asked, base.device)
    _take_off(base.model)
    try:
        with FleetModel(base, examined) as fleet:
            certified = certify(fleet, asked, exported, as_trained)
    except BaseRefused as refusal:
        raise ModelInvalid(str(refusal)) from refusal
    allowed = certified.certificate.tolerance_on(certified.certificate.computed.compute_dtype)
    if not certified.difference <= allowed:
        raise OutputFailed(
            f"the export computes other logits than PEFT's model, {certified.difference:.2g} of their deviation where "
            f"{allowed:g} is allowed; nothing was exported"
        )
    return certified


@torch.no_grad()
def _logits(model: Any, asked: Asked, device: torch.device) -> list[torch.Tensor]:
    model.eval()
    found = []
    for tokens in asked.probes:
        logits = model(input_ids=torch.tensor([tokens], device=device)).logits[0]
        found.append(logits[-len(tokens) : -1].float())  # virtual tokens come first
    return found


def _take_off(model: nn.Module) -> None:
    """PEFT's layers, from around the modules. Its own `unload` refuses that for some methods on 4-bit weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    around = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in around.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    model.eval()
