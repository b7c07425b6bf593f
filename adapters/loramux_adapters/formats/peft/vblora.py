"""VB-LoRA: a low rank put together from the vectors of one bank, each a mean of the few that a module takes
(Li et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.positions import whole_numbers
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import GATHER, SORT, Work, elements, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class VbLoraTarget(ModuleTarget):
    """One module: `taken` of `vectors` vectors of `length` are mixed for each piece of a factor."""

    r: int
    vectors: int
    length: int
    taken: int
    has_choices: bool

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.taken

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        pieces = {"a": (self.r, wide // self.length), "b": (out // self.length, self.r)}
        if not self.has_choices:
            return {f"logits_{factor}": (*each, self.vectors) for factor, each in pieces.items()}
        return {f"choice_{factor}": (*each, self.taken) for factor, each in pieces.items()} | {
            f"share_{factor}": (*each, self.taken - 1) for factor, each in pieces.items()
        }

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: `taken` vectors are added for each piece; the choice is sorted for, or checked by sorting."""
        kept = self.r * sum(self.size)
        sorted_ = elements(self.shapes(found).values())
        return work_of(kept, reading=SORT * sorted_ + GATHER * self.taken * kept, scratch=12 * kept + 32 * sorted_)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        out, wide = self.size
        a, b = self._mixed(tensors, "a"), self._mixed(tensors, "b")
        return (LowRank(a.reshape(self.r, wide), b.transpose(1, 2).reshape(out, self.r)),)

    def _mixed(self, tensors: Mapping[str, torch.Tensor], factor: str) -> torch.Tensor:
        """[pieces, pieces, length]"""
        if self.has_choices:
            choice = whole_numbers(
                tensors[f"choice_{factor}"], self.vectors, self.module.name, f"vblora_logits_{factor.upper()}"
            )
            if bool((choice.sort(dim=-1).values.diff(dim=-1) == 0).any()):
                raise AdapterInvalid(
                    f"{WEIGHTS_FILE}: vblora_logits_{factor.upper()} of module {quote(self.module.name)} takes one "
                    "vector twice",
                    subject=f"{WEIGHTS_FILE}: {quote(self.module.name)}",
                    remedy="save the adapter again with PEFT",
                )
            share = tensors[f"share_{factor}"].float()
            share = torch.cat([share, 1 - share.sum(dim=-1, keepdim=True)], dim=-1)
        else:
            logits, choice = tensors[f"logits_{factor}"].float().topk(self.taken, dim=-1)
            share = logits.softmax(dim=-1)
        mixed = torch.zeros(*choice.shape[:2], self.length)
        for place in range(self.taken):
            mixed += share[..., place, None] * tensors["bank"][choice[..., place]].float()
        return mixed


@dataclass(frozen=True)
class VbLoraTuner(ModuleTuner):
    """See the module."""

    peft_type = "VBLORA"
    kind = "vblora"
    marker = ".vblora_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"num_vectors", "r", "save_only_topk_weights", "topk", "vector_length"},
        ignorable=frozenset({"fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "vblora_dropout"}),
    )
    endings: ClassVar = {
        f"{role}_{factor}": f".vblora_logits_{factor.upper()}{suffix}"
        for role, suffix in (("logits", ""), ("choice", "_topk_indices"), ("share", "_topk_weights"))
        for factor in ("a", "b")
    }
    shared_names: ClassVar = {"bank": "base_model.vblora_vector_bank"}
    index_roles = frozenset({"choice_a", "choice_b"})
    may_be_empty = True  # the shares beside the last, where one vector is taken

    r: int
    vectors: int
    length: int
    taken: int
    has_choices: bool

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        vectors, taken = config.rank("num_vectors", 256), config.rank("topk", 2)
        if taken > vectors:
            raise bad_key("topk", f"{taken} is more than the {vectors} vectors", "save config and weights together")
        return {
            "r": config.rank("r", 4),
            "vectors": vectors,
            "length": config.rank("vector_length", 256),
            "taken": taken,
            "has_choices": config.flag("save_only_topk_weights"),
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        for name, module in modules.items():
            if module.in_features % self.length or module.out_features % self.length:
                raise AdapterIncompatible(
                    f"{CONFIG_FILE}: vector_length {self.length} does not divide the sizes of {quote(name)}",
                    subject=f"{CONFIG_FILE}: vector_length",
                    remedy="upload an adapter made for this base",
                )
        each = {
            name: VbLoraTarget(module, self.r, self.vectors, self.length, self.taken, self.has_choices)
            for name, module in modules.items()
        }
        return Targets(each, {"bank": (self.vectors, self.length)})
