"""Adapted modules: a frozen one, the parts of many adapters beside it, and the step's batch that joins them.

Siblings over the same input (q, k, v; gate, up) form one `SiteGroup`: the first call computes all of them, the others
take their columns. Knows slots and parts, not who owns them, and no kind of part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from loramux_adapters.apply.batch import RowMap, StepCell
from loramux_adapters.base.frozen import FrozenLinear
from loramux_adapters.parts.part import Kind, Part, SiteParts
from loramux_adapters.parts.registry import KIND_OF, KINDS
from loramux_adapters.parts.site import Site

RowKind = Literal["tokens", "logits"]


class PartsAtSite:
    """The parts of all kinds at one site, of all slots. A kind takes nothing before its first part comes."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._by_kind: dict[Kind, SiteParts[Any]] = {
            kind: kind.at(site) for kind in KINDS if kind.is_pooled and site.kind in kind.sites
        }

    @property
    def is_empty(self) -> bool:
        """Whether no adapter ever had a part here."""
        return not self._by_kind

    def of(self, part: type[Part]) -> SiteParts[Any]:
        """Those of one kind, made at the first call. Raises AdapterIncompatible where it has no meaning."""
        kind = KIND_OF[part]
        if kind not in self._by_kind:
            # Replaced as a whole: a step may be looking.
            self._by_kind = {**self._by_kind, kind: kind.at(self.site)}
        return self._by_kind[kind]

    def has(self, slot: int) -> bool:
        """Whether an adapter has parts here."""
        return any(parts.has(slot) for parts in self._by_kind.values())

    def inputs(self, x: torch.Tensor, rows: RowMap) -> list[torch.Tensor]:
        """What each member reads in place of x [T, in]."""
        inputs = [x] * len(self.site.members)
        for kind in rows.input_kinds:
            parts = self._by_kind.get(kind)
            if parts is not None:
                inputs = [parts.before(each, member, rows) for member, each in enumerate(inputs)]
        return inputs

    def change(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], rows: RowMap) -> None:
        """Lets all kinds that act in this step change the site's output y [T, out], in place.

        Raises ValueError where T is not the number of rows of the step and one of its adapters has parts here: rows
        would get another's, or none. A model may run a module on some of the rows (experts) that no adapter changes.
        """
        if len(y) != rows.count and any(
            parts.has(segment.slot) for parts in self._by_kind.values() for segment in rows.segments
        ):
            raise ValueError(f"{self.site.members[0]}: {len(y)} rows in a step of {rows.count}")
        for kind in rows.kinds:
            parts = self._by_kind.get(kind)
            if parts is not None:
                parts.after(y, inputs, rows)

    def extend(self, y: torch.Tensor, x: torch.Tensor, rows: RowMap) -> None:
        """Lets them fill what y [T, > out] has beyond the site's output, for x [T, in].

        Raises ValueError as `change` does.
        """
        if len(y) != rows.count:
            raise ValueError(f"{self.site.members[0]}: {len(y)} rows in a step of {rows.count}")
        for kind in rows.kinds:
            parts = self._by_kind.get(kind)
            if parts is not None:
                parts.extend(y, x, rows)


class SiteGroup:
    """One frozen product shared by the members of a site."""

    def __init__(self, frozen: FrozenLinear, site: Site, cell: StepCell, rows: RowKind = "tokens") -> None:
        self.frozen, self.rows = frozen, rows
        self.members, self.columns = site.members, site.columns
        self.parts = PartsAtSite(site)
        self._cell = cell
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._unread = 0

    @property
    def key(self) -> str:
        """Name of the group: its first member's."""
        return self.members[0]

    def project(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """One member's y [..., out] for x [..., in]; siblings called with the same x share one computation."""
        if self._kept is None or self._kept[0] is not x:
            self._kept = (x, self._forward(x.reshape(-1, x.shape[-1])))
            self._unread = len(self.members)
        y = self._kept[1]
        self._unread -= 1
        if not self._unread:
            self._kept = None
        begin, end = self.columns[member]
        return y[:, begin:end].view(*x.shape[:-1], end - begin)

    def reset(self) -> None:
        """Drops what a failed forward may have left behind."""
        self._kept = None

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = self._cell.batch
        if batch is None:
            return self.frozen.forward(x)
        if self.rows == "tokens":
            rows, shared = batch.tokens, batch.shared_tokens
        else:
            rows, shared = batch.logits, batch.shared_logits
        if batch.merged is None:
            return self._shared(x, shared)
        merged = batch.merged.weights.get(self.key)
        product = self.frozen if merged is None else merged
        if not shared.count:
            return product.forward(x)
        if len(x) != rows.count:  # a model may run a module on some of the rows
            if merged is not None:
                raise ValueError(f"{self.key}: {len(x)} rows in a step of {rows.count}, some of which are merged")
            return self._shared(x, shared)
        return torch.cat([self._shared(x[: shared.count], shared), product.forward(x[shared.count :])])

    def _shared(self, x: torch.Tensor, rows: RowMap) -> torch.Tensor:
        """The frozen product of rows that share it, and what their adapters do beside it."""
        if not rows.kinds:
            return self.frozen.forward(x)
        if rows.changes_inputs:
            inputs = self.parts.inputs(x, rows)
            y = self._product(x, inputs)
        else:
            inputs, y = [x] * len(self.members), self.frozen.forward(x)
        self.parts.change(y, inputs, rows)
        return y

    def _product(self, x: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The frozen product of each member's own input."""
        if len(inputs) == 1:
            return self.frozen.forward(inputs[0])
        y = self.frozen.forward(x)
        for (begin, end), own in zip(self.columns, inputs, strict=True):
            if own is not x:
                y[:, begin:end] = self.frozen.forward(own)[:, begin:end]
        return y


class AdaptedLinear(nn.Module):
    """Stands where a Linear, Linear4bit or Conv1D stood; one member of a SiteGroup."""

    def __init__(self, group: SiteGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member
        self.in_features = group.frozen.in_features
        begin, end = group.columns[member]
        self.out_features = end - begin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.group.project(x, self.member)


class AdaptedHead(AdaptedLinear):
    """The output head. Its logits are as wide as the widest vocabulary of the step: whoever reads a row's cuts it to
    that of its own adapter, since what is beyond has no meaning.
    """

    def __init__(self, group: SiteGroup, member: int, cell: StepCell) -> None:
        super().__init__(group, member)
        self._cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, n, in] -> [1, n, vocabulary]."""
        y = self.group.project(x, self.member)
        batch = self._cell.batch
        if batch is None or batch.vocabulary <= self.out_features:
            return y
        wide = y.new_zeros((*y.shape[:-1], batch.vocabulary))
        wide[..., : self.out_features] = y
        self.group.parts.extend(wide.view(-1, batch.vocabulary), x.reshape(-1, x.shape[-1]), batch.logits)
        return wide


class AdaptedSublayer:
    """Where the output of a layer's attention or MLP passes, from the norm that reads the residual stream on.

    In steps without a part for it nothing is kept, and nothing is done.
    """

    def __init__(self, site: Site) -> None:
        self.parts = PartsAtSite(site)
        self.entered: tuple[torch.Tensor, RowMap] | None = None  # from the norm on, where a part may act

    def enter(self, residual: torch.Tensor, rows: RowMap) -> None:
        """Keeps the residual stream [1, T, width] until the output comes."""
        if rows.changes_sublayers:
            self.entered = (residual, rows)

    def leave(self, y: torch.Tensor) -> None:
        """Changes the output [1, T, width], which is added to the residual stream next, in place."""
        if self.entered is not None:
            residual, rows = self.entered
            self.entered = None
            self.parts.change(y.view(-1, y.shape[-1]), [residual.view(-1, residual.shape[-1])], rows)

    def reset(self) -> None:
        """Drops what a failed forward may have left behind."""
        self.entered = None


class SublayerProjection(AdaptedLinear):
    """The projection whose output is that of a sub-layer."""

    def __init__(self, group: SiteGroup, member: int, sublayer: AdaptedSublayer) -> None:
        super().__init__(group, member)
        self._sublayer = sublayer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y = self.group.project(x, self.member)
        if self._sublayer.entered is not None:
            self._sublayer.leave(y)
        return y


class AdaptedEmbedding(nn.Module):
    """An embedding; its parts are given token ids as their input."""

    def __init__(self, frozen: nn.Embedding, site: Site, cell: StepCell) -> None:
        super().__init__()
        self.frozen, self.parts, self._cell = frozen, PartsAtSite(site), cell

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table [vocab, hidden]."""
        return self.frozen.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as torch's, for models that call by keyword
        """[1, T] ids -> [1, T, hidden]."""
        batch = self._cell.batch
        if batch is None or not batch.tokens.kinds:
            y: torch.Tensor = self.frozen(input)
            return y
        # The table has no row for virtual tokens, and none for those that adapters added.
        ids = input.clamp(min=0) if batch.tokens.has_virtual_ids else input
        ids = ids.clamp(max=self.parts.site.in_features - 1) if batch.vocabulary > self.parts.site.in_features else ids
        y = self.frozen(ids)
        self.parts.change(y.view(-1, y.shape[-1]), [input.reshape(-1)], batch.tokens)
        return y


class AdaptedAttention:
    """Where a layer's keys and values are on their way to the cache."""

    def __init__(self, site: Site, cell: StepCell) -> None:
        self.parts, self._cell = PartsAtSite(site), cell

    def replace(self, ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, T, width] of token ids [T] -> those to be written.

        Raises ValueError where the layer's are not as wide as the base's config says.
        """
        batch = self._cell.batch
        if batch is None:
            return key, value
        heads, count, width = key.shape
        split = heads * width
        y = torch.cat([each.transpose(0, 1).reshape(count, -1) for each in (key, value)], dim=1)
        if y.shape[1] != self.parts.site.columns[0][1]:
            raise ValueError(f"{self.parts.site.members[0]}: keys and values of {y.shape[1]} elements a token")
        self.parts.change(y, [ids], batch.tokens)
        return (
            y[:, :split].view(count, heads, width).transpose(0, 1),
            y[:, split:].view(count, heads, value.shape[2]).transpose(0, 1),
        )


class AdaptedNorm(nn.Module):
    """A normalization whose output adapters may change."""

    def __init__(self, frozen: nn.Module, site: Site, cell: StepCell) -> None:
        super().__init__()
        self.frozen, self.parts, self._cell = frozen, PartsAtSite(site), cell
        self.sublayer: AdaptedSublayer | None = None  # that begins here
        self._row_axis: int | None = None  # of [T, heads, width] or [heads, T, width], once a step told them apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, width] -> the same; where heads are normalized each, [1, T, heads, width] or [1, heads, T, width].

        Raises ValueError where rows and heads cannot be told apart: as many of the one as of the other, and no step
        before had another number.
        """
        y: torch.Tensor = self.frozen(x)
        batch = self._cell.batch
        if batch is None or not batch.tokens.kinds:
            return y
        if self.sublayer is not None:
            self.sublayer.enter(x, batch.tokens)
        if self.parts.is_empty:  # of nearly all adapters: this is called as often as a linear map
            return y
        rows, out = x[0], y[0]
        if rows.dim() == 3:
            axis = self._find_rows(rows.shape[0], rows.shape[1], batch.tokens)
            rows, out = rows.movedim(axis, 0), out.movedim(axis, 0)
        self.parts.change(out, [rows], batch.tokens)
        return y

    def _find_rows(self, first: int, second: int, rows: RowMap) -> int:
        if first != second and rows.count in (first, second):
            self._row_axis = 0 if rows.count == first else 1
        if self._row_axis is not None:
            return self._row_axis
        if any(self.parts.has(segment.slot) for segment in rows.segments):
            raise ValueError(f"{self.parts.site.members[0]}: rows and heads cannot be told apart in a step of {first}")
        return 0
