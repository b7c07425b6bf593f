"""The optimizer that a job names, over a member's parameters. One line a family."""

from __future__ import annotations

from collections.abc import Sequence

from loramux_trainer.errors import JobInvalid
from loramux_trainer.optimizers.adamw import adamw
from loramux_trainer.optimizers.devices import check_device
from loramux_trainer.optimizers.eight_bit import eight_bit_or_paged_adamw
from loramux_trainer.optimizers.interface import MemberOptimizer, ParameterGroup
from loramux_trainer.optimizers.library import LibraryOptimizer, torch_groups
from loramux_trainer.optimizers.lion import lion
from loramux_trainer.optimizers.muon import muon
from loramux_trainer.optimizers.sgd import sgd
from loramux_trainer.optimizers.sophia import Sophia
from loramux_trainer.schema.optim_config import OptimConfig

_FAMILIES = {
    "adamw": adamw,
    "adamw_8bit": eight_bit_or_paged_adamw,
    "paged_adamw": eight_bit_or_paged_adamw,
    "paged_adamw_8bit": eight_bit_or_paged_adamw,
    "sgd": sgd,
    "lion": lion,
}


def build_optimizer(
    config: OptimConfig, groups: Sequence[ParameterGroup], *, loraplus_lr_ratio: float | None = None
) -> MemberOptimizer:
    """The optimizer `config.optimizer` over `groups`.

    Raises DeviceInvalid where the groups' device cannot do it, JobInvalid where the optimizer or the ratio of LoRA+
    would act on nothing.
    """
    for group in groups:
        check_device(config.optimizer, group.flat.device.type)
    if loraplus_lr_ratio is not None and not any(group.role == "b" for group in groups):
        raise JobInvalid("lora.loraplus_lr_ratio", "this method trains no factor B, which it would be for; remove it")
    if config.optimizer == "muon":
        return muon(config, groups, loraplus_lr_ratio)
    in_torch = torch_groups(groups, config.weight_decay, loraplus_lr_ratio)
    if config.optimizer == "sophia":
        return Sophia(config, in_torch)
    return LibraryOptimizer(_FAMILIES[config.optimizer](config, in_torch))
