"""Low rank: B A x beside W x, of LoRA and of everything that can be written so (Hu et al., 2021).

At linear maps rank rows of all slots lie in one pool per module and a kernel gathers them; at an embedding A's columns
are gathered by token id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.protocol import LowRankPools
from loramux_adapters.parts.part import Kind, Part, PartCost, Share, SiteParts, finite
from loramux_adapters.parts.site import Site, SiteKind, StepRows


@dataclass(frozen=True, eq=False)
class LowRank(Part):
    """The delta B A of one map y = W x. For an embedding, `in` is the vocabulary.

    With `on_input` the map is W (I + C A) and `b` holds C: B = W C, computed where the adapter is copied to the device.
    """

    a: torch.Tensor  # [r, in], in the dtype it was uploaded in
    b: torch.Tensor  # [out, r], or C [in, r]; float32, the scale (alpha / r or alpha / sqrt(r)) folded in
    on_input: bool = False

    @property
    def rank(self) -> int:
        """r, the true rank."""
        return int(self.a.shape[0])


class PooledLowRank(SiteParts[LowRank]):
    """At linear maps. a: [M, C, in]; b: per member [C, out]; both in the compute dtype, zero where free."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        capacity, dtype, device = site.rank_rows.capacity, site.dtype, site.device
        self.a = torch.zeros(len(site.members), capacity, site.in_features, dtype=dtype, device=device)
        self.b = [torch.zeros(capacity, end - begin, dtype=dtype, device=device) for begin, end in site.columns]
        self.rank_rows = [site.rank_rows.empty for _ in site.members]
        self._pools = LowRankPools(self.a, self.b, site.columns, self.rank_rows)
        self._written: dict[int, dict[int, tuple[int, int]]] = {}  # slot -> member -> its rank rows

    def cost(self, part: LowRank) -> PartCost:
        """Rank rows of its true rank; the pool is there already."""
        return PartCost(rank_rows=part.rank)

    def prepare(self, member: int, part: LowRank) -> tuple[torch.Tensor, ...]:
        """(A [r, in], B^T [r, out], or C [in, r] in float32)"""
        name = self.site.members[member]
        if part.on_input:
            return finite(name, part.a.to(self.site.dtype)), finite(name, part.b)
        # Checked before they reach the pool: in a product over it a foreign rank row of B is multiplied by zero, and
        # 0 * inf is NaN.
        return finite(name, part.a.to(self.site.dtype)), finite(name, part.b.T.to(self.site.dtype))

    def write(
        self, slot: int, member: int, part: LowRank, prepared: Sequence[torch.Tensor], rank_rows: tuple[int, int] | None
    ) -> None:
        """Rank rows beyond the true rank become zero."""
        if rank_rows is None:
            raise ValueError(f"{self.site.members[member]}: a low-rank part was given no rank rows")
        first, count = rank_rows
        if part.on_input:
            prepared = (prepared[0], self._through_base(member, prepared[1]))
        for pool, factor in zip((self.a[member], self.b[member]), prepared, strict=True):
            pool[first : first + len(factor)].copy_(factor, non_blocking=True)
            pool[first + len(factor) : first + count].zero_()
        self._written.setdefault(slot, {})[member] = rank_rows

    def work(self, member: int, part: LowRank) -> int:
        """The codes of the weight, where B is computed from them."""
        begin, end = self.site.columns[member]
        return (end - begin) * self.site.in_features // 2 if part.on_input else 0

    def _through_base(self, member: int, c: torch.Tensor) -> torch.Tensor:
        """C [in, r] -> B^T [r, out]"""
        b = c.to(self.site.device, non_blocking=True).T @ self.site.frozen_weight(member).T
        return finite(self.site.members[member], b.to(self.site.dtype))

    def bind(self, slot: int) -> None:
        """The pool's rows are the slot's from the next step on."""
        for member, place in self._written.get(slot, {}).items():
            self.rank_rows[member] = self.site.rank_rows.changed(self.rank_rows[member], slot, place)
        self._written.pop(slot, None)  # last: what met no memory is called again

    def unbind(self, slot: int) -> None:
        """The pool's rows may be given to another."""
        self._written.pop(slot, None)
        for member, rows in enumerate(self.rank_rows):
            if slot in rows.ranges:
                self.rank_rows[member] = self.site.rank_rows.changed(rows, slot, None)

    def has(self, slot: int) -> bool:
        """See SiteParts."""
        return any(slot in rows.ranges for rows in self.rank_rows)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """One gathered product for all members that read the same input."""
        if not step.changes_inputs:
            step.add_low_rank(y, inputs[0], self._pools)
            return
        for member, x in enumerate(inputs):
            alone = [rows if index == member else None for index, rows in enumerate(self.rank_rows)]
            step.add_low_rank(y, x, replace(self._pools, rank_rows=alone))


class GatheredLowRank(SiteParts[LowRank]):
    """At an embedding, which hands its token ids [T] on as the input. Its output may be scaled (Gemma); the delta is
    scaled alike, as PEFT does.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.slots: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = {}  # slot -> (A^T [vocabulary, r], B^T [r, out])
        self._written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def cost(self, part: LowRank) -> PartCost:
        """Bytes of both factors."""
        if part.on_input:
            raise ValueError(f"{self.site.members[0]}: token ids have no input that a low rank could change")
        return PartCost(nbytes=sum(factor.numel() for factor in part.tensors) * self.site.dtype.itemsize)

    def prepare(self, member: int, part: LowRank) -> tuple[torch.Tensor, ...]:
        """(A^T [vocabulary, r], B^T [r, out])"""
        name = self.site.members[member]
        return tuple(finite(name, factor.T.to(self.site.dtype)).contiguous() for factor in (part.a, part.b))

    def write(
        self, slot: int, member: int, part: LowRank, prepared: Sequence[torch.Tensor], rank_rows: tuple[int, int] | None
    ) -> None:
        """To tensors of their own."""
        a, b = (tensor.to(self.site.device, non_blocking=True) for tensor in prepared)
        self._written[slot] = (a, b)

    def bind(self, slot: int) -> None:
        """See SiteParts."""
        if slot in self._written:
            self.slots = {**self.slots, slot: self._written[slot]}
            del self._written[slot]

    def unbind(self, slot: int) -> None:
        """See SiteParts."""
        self._written.pop(slot, None)
        self.slots = {key: value for key, value in self.slots.items() if key != slot}

    def has(self, slot: int) -> bool:
        """See SiteParts."""
        return slot in self.slots

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Row by row invariant, so that no row depends on its batch mates."""
        for start, stop, slot in step.segments:
            if slot not in self.slots:
                continue
            a, b = self.slots[slot]
            ids = inputs[0][start:stop]
            if step.has_virtual_ids:  # they have rows of their own, whatever is found here
                ids = ids.clamp(min=0)
            delta = invariant.linear(a[ids].float(), b.float().T)
            if self.site.output_scale is not None:
                delta = delta * self.site.output_scale
            y[start:stop] += delta.to(b.dtype)


def _fold(weight: torch.Tensor, _bias: torch.Tensor, part: LowRank) -> None:
    b = part.b.to(weight)
    weight.addmm_(weight @ b if part.on_input else b, part.a.to(weight))


def _combine(shares: Sequence[Share[LowRank]]) -> LowRank | None:
    """Ranks add: [w1 B1, w2 B2, ...] [A1; A2; ...]."""
    if len({share.part.on_input for share in shares}) > 1:
        return None
    dtypes = {share.part.a.dtype for share in shares}
    a = [share.part.a if len(dtypes) == 1 else share.part.a.float() for share in shares]
    b = [share.weight * share.part.b for share in shares]
    return LowRank(torch.cat(a), torch.cat(b, dim=1), shares[0].part.on_input)


_SITES: Mapping[SiteKind, type[SiteParts[LowRank]]] = {"linear": PooledLowRank, "embedding": GatheredLowRank}
KIND = Kind(LowRank, _SITES, _fold, _combine, in_weight=True, is_pooled=True)
