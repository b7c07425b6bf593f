"""Dense: another weight in place of W for the rows of one adapter, where its effect is no low rank.

Of methods that rotate, permute or scatter (OFT, RoAd, SHiRA, FourierFT and others), and of a whole head. The adapter
keeps what its file has; the weight is made where it is copied to the device, and only there it takes its full size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.parts.part import Kind, Part, PartCost, SiteParts, finite, no_sum
from loramux_adapters.parts.site import Product, Site, StepRows


@dataclass(frozen=True, eq=False)
class WeightChange(ABC):
    """One method's way from the base's weight to its own. Fields that are tensors lie in host memory."""

    @abstractmethod
    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """W [out, in] float32 -> the new one. May write to W; this object's tensors are on W's device."""

    def bias(self, bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """The base's own bias [out] and W, both float32 -> the new bias; called before `apply`."""
        return bias

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of all fields, in order."""
        return tuple(value for value in self._values().values() if isinstance(value, torch.Tensor))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The same change by other copies of its tensors."""
        names = [name for name, value in self._values().items() if isinstance(value, torch.Tensor)]
        return replace(self, **dict(zip(names, tensors, strict=True)))

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Dense(Part):
    """A module's whole effective weight, by what makes it of the base's."""

    change: WeightChange
    out_features: int
    in_features: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of the change."""
        return self.change.tensors


class DenseParts(SiteParts[Dense]):
    """Keeps a dense weight in the compute dtype per slot and member; each segment is multiplied for itself."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.products: list[Mapping[int, Product]] = [{} for _ in site.members]  # slot -> product
        self._written: dict[int, dict[int, Product]] = {}

    def cost(self, part: Dense) -> PartCost:
        """Bytes of the weight."""
        return PartCost(nbytes=part.out_features * part.in_features * self.site.dtype.itemsize)

    def prepare(self, member: int, part: Dense) -> tuple[torch.Tensor, ...]:
        """Those of the change, as the file has them."""
        return tuple(finite(self.site.members[member], tensor) for tensor in part.tensors)

    def work(self, member: int, part: Dense) -> int:
        """The weight itself is written."""
        return part.out_features * part.in_features * self.site.dtype.itemsize

    def write(
        self, slot: int, member: int, part: Dense, prepared: Sequence[torch.Tensor], rank_rows: tuple[int, int] | None
    ) -> None:
        """Makes the weight."""
        change = part.change.with_tensors([tensor.to(self.site.device, non_blocking=True) for tensor in prepared])
        weight, own = self.site.frozen_weight(member), self.site.own_bias(member)
        bias = change.bias(None if own is None else own.to(self.site.device), weight)
        weight = change.apply(weight).to(self.site.dtype)
        if not torch.isfinite(weight).all():
            name = self.site.members[member]
            raise AdapterIncompatible(
                f"{name}: the adapter makes a weight of it that is not finite in {self.site.dtype_name}",
                subject=name,
                remedy="serve with --dtype float32, or check the adapter's tensors",
            )
        product = self.site.multiply(weight, None if bias is None else bias.to(self.site.dtype))
        self._written.setdefault(slot, {})[member] = product

    def bind(self, slot: int) -> None:
        """See SiteParts."""
        for member, product in self._written.get(slot, {}).items():
            self.products[member] = {**self.products[member], slot: product}
        self._written.pop(slot, None)  # last: what met no memory is called again

    def unbind(self, slot: int) -> None:
        """See SiteParts."""
        self._written.pop(slot, None)
        for member, known in enumerate(self.products):
            if slot in known:
                self.products[member] = {key: product for key, product in known.items() if key != slot}

    def has(self, slot: int) -> bool:
        """See SiteParts."""
        return any(slot in known for known in self.products)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts the adapter's own product where the frozen one was."""
        for member, (begin, end) in enumerate(self.site.columns):
            known = self.products[member]
            for start, stop, slot in step.segments if known else ():
                if slot in known:
                    y[start:stop, begin:end] = known[slot](inputs[member][start:stop])


def _fold(weight: torch.Tensor, bias: torch.Tensor, part: Dense) -> None:
    change = part.change.with_tensors([tensor.to(weight.device) for tensor in part.tensors])
    own = change.bias(bias, weight)
    weight.copy_(change.apply(weight.clone()))
    if own is not None:
        bias.copy_(own)


KIND = Kind(Dense, {"linear": DenseParts}, _fold, no_sum, in_weight=True)
