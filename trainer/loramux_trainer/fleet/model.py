"""The frozen base made ready for many members: its modules compute with each row's own parts while a fleet is open.

The modules stay where they are and are never written: they get another forward, and lose it at the end. Knows
sequences and parts, no loss, no optimizer and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType

import torch
from torch import nn

from loramux_adapters.apply.siblings import frozen_groups
from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.frozen import Nf4Linear
from loramux_adapters.base.load import BaseRefused, LoadedBase
from loramux_adapters.base.weight_formats import WeightFormats, select_weight_formats
from loramux_adapters.guard.examine import Examined
from loramux_adapters.guard.rope import choosing
from loramux_adapters.kernels.select import select_kernels
from loramux_adapters.spec import virtual_token_ids
from loramux_adapters.sublayers import sublayers
from loramux_trainer.data.examples import IGNORE, Example
from loramux_trainer.fleet.attention import register_attention
from loramux_trainer.fleet.head import CHUNK, sample, token_loss
from loramux_trainer.fleet.head import log_probs as head_log_probs
from loramux_trainer.fleet.linear import LinearGroup
from loramux_trainer.fleet.logits import Postprocess, find_postprocess
from loramux_trainer.fleet.memory import keep_freed_memory
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.rounded import RoundedProduct
from loramux_trainer.fleet.rows import Dropout, Span, SpanRows, StepCell
from loramux_trainer.fleet.sites import EmbeddingSite, HeadRows, NormSite
from loramux_trainer.fleet.sublayers import SublayerSite


@dataclass(frozen=True, eq=False)
class MemberRows:
    """Sequences of one member in a micro-batch; `parts` None: the base's own, through which no gradient runs."""

    parts: StepParts | None
    sequences: tuple[Example, ...]
    slot: int
    virtual_tokens: int = 0
    dropout: Dropout | None = None


@dataclass(frozen=True, eq=False)
class Hidden:
    """What a forward gives: hidden states where a label is predicted, in the order of the sequences."""

    states: torch.Tensor  # [N, hidden]
    targets: torch.Tensor  # [N]
    rows: SpanRows  # of the N
    counts: tuple[int, ...]  # of each sequence

    def part(self, start: int, stop: int) -> Hidden:
        """Those of sequences [start, stop)."""
        first, last = sum(self.counts[:start]), sum(self.counts[:stop])
        states, targets, rows = self.states[first:last], self.targets[first:last], self.rows.cut(first, last)
        return Hidden(states, targets, rows, self.counts[start:stop])


class FleetModel:
    """A context manager: within, `base.model` computes for fleets, and only as they ask."""

    def __init__(
        self,
        base: LoadedBase,
        examined: Examined,
        *,
        deterministic: bool = False,
        frozen_products: torch.dtype | None = None,
    ) -> None:
        """`deterministic`: products by fixed tiles of rows, so that a member's bits are its own. `frozen_products`: the
        dtype of products with frozen weights, where it is not the base's compute dtype.

        Raises BaseRefused where the logits are computed in a way that is not known.
        """
        if base.device.type == "cpu":
            keep_freed_memory()
        self.base, self._rope = base, examined.rope
        self.products = frozen_products or base.compute_dtype
        self._model, self._cell = base.model, StepCell()
        formats = _formats(base.device, base.compute_dtype, deterministic=deterministic)
        self._kernels = select_kernels(deterministic=deterministic, device=base.device, dtype=base.compute_dtype)
        self._changed: list[nn.Module] = []
        self._before = base.model.config._attn_implementation
        self._postprocess: Postprocess
        self.groups: list[LinearGroup] = []
        self._sublayers: list[SublayerSite] = []
        try:
            self._take_over(examined, formats, frozen_products)
        except BaseException:
            self.close()
            raise

    def _take_over(self, examined: Examined, formats: WeightFormats, products: torch.dtype | None) -> None:
        base, spec = self.base, self.base.spec
        for frozen in frozen_groups(base, formats):
            _share_storage(frozen.names, frozen.frozen, base)
            if products is not None and products != base.compute_dtype:
                narrow = _formats(base.device, products, deterministic=formats.invariant)
                frozen = RoundedProduct.of(frozen, products, narrow)
            group = LinearGroup(frozen, self._cell)
            self.groups.append(group)
            for member, name in enumerate(group.names):
                if name != spec.head:
                    self._replace(base.model.get_submodule(name), _projection(group, member))
        heads = [group for group in self.groups if group.names[0] == spec.head]
        if not heads:
            raise BaseRefused(f"{spec.model_id} has no output head that losses could be computed from")
        self._head = heads[0]
        norms: dict[str, NormSite] = {}
        for name, module_spec in spec.modules.items():
            module = base.model.get_submodule(name)
            if module_spec.kind == "embedding" and isinstance(module, nn.Embedding):
                self._replace(module, EmbeddingSite(name, module, self._cell).forward)
            elif module_spec.kind == "norm":
                norms[name] = NormSite(name, module, self._cell)
                self._replace(module, norms[name].forward)
        for each in sublayers(spec):
            if each.norm in norms:
                site = SublayerSite(each.name, self._cell)
                norms[each.norm].enter = site.enter
                projection = base.model.get_submodule(each.projection)
                projection.forward = _leaving(projection.forward, site)
                self._sublayers.append(site)
        head = base.model.get_submodule(self._head.names[0])
        self._postprocess = find_postprocess(base, head)
        self._head_rows = HeadRows(self._head.names[0], head)
        self._replace(head, self._keep_hidden)
        names = [spec.attention_name(layer) for layer in range(len(examined.layers))]
        base.model.set_attn_implementation(register_attention(self._cell, examined.layers, names))

    @contextmanager
    def running(self, members: Sequence[MemberRows]) -> Iterator[Hidden]:
        """Computes all sequences, the base's own first; gradients as the caller's mode says.

        The backward pass belongs within: layers may be computed again there.
        """
        cell, device = self._cell, self.base.device
        virtual = [virtual_token_ids(rows.virtual_tokens) for rows in members for _ in rows.sequences]
        sequences = [each for rows in members for each in rows.sequences]
        ids = [(*before, *each.ids) for before, each in zip(virtual, sequences, strict=True)]
        lengths = [len(each) for each in ids]
        kept, targets, counts = _predicted(lengths, sequences)
        flat = torch.tensor([number for each in ids for number in each], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        cell.tokens, cell.lengths, cell.ids = self._rows(members, lengths), tuple(lengths), flat
        try:
            with choosing(self._rope, self._long(lengths)):
                self._model(
                    input_ids=flat[None],
                    position_ids=positions[None],
                    attention_mask=None,
                    use_cache=False,
                    logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device),
                )
                if cell.hidden is None:
                    raise RuntimeError("the model did not reach its head")
                rows = self._rows(members, counts)
                labels = torch.tensor(targets, dtype=torch.long, device=device)
                yield Hidden(cell.hidden, labels, rows, tuple(counts))
        finally:
            self._forget()

    def token_loss(self, hidden: Hidden, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `head.token_loss`."""
        rows = hidden.rows
        chunks, tap = self._chunks(rows), self._tap(rows)
        return token_loss(hidden.states, hidden.targets, weights, rows, self._logits, chunks, tap)

    def log_probs(self, hidden: Hidden) -> torch.Tensor:
        """See `head.log_probs`."""
        rows = hidden.rows
        chunks, tap = self._chunks(rows), self._tap(rows)
        return head_log_probs(hidden.states, hidden.targets, rows, self._logits, chunks, tap)

    @torch.no_grad()
    def logits(self, hidden: Hidden) -> torch.Tensor:
        """[N, vocabulary] in float32, all at once: for few rows."""
        found = [self._logits(hidden.states[p], hidden.rows.cut(p.start, p.stop)) for p in self._chunks(hidden.rows)]
        return torch.cat(found).float()

    def sample(self, hidden: Hidden, generator: torch.Generator) -> Hidden:
        """The same states with targets drawn from the model's own predictions; see `head.sample`."""
        targets = sample(hidden.states.detach(), hidden.rows, self._logits, generator, self._chunks(hidden.rows))
        return replace(hidden, targets=targets)

    def close(self) -> None:
        """The model is the bare base again. Idempotent."""
        for module in self._changed:
            del module.forward
        self._changed.clear()
        self._model.set_attn_implementation(self._before)

    def __enter__(self) -> FleetModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _logits(self, hidden: torch.Tensor, rows: SpanRows) -> torch.Tensor:
        return self._postprocess(self._head_rows.apply(hidden, self._head.apply(hidden, rows)[0], rows))

    def _chunks(self, rows: SpanRows) -> list[slice]:
        """Rows of logits that are computed at a time. Those of a member with parts at the head are alone, so that their
        bits and dropout masks do not depend on who trains beside it.
        """
        cuts = {0, rows.count}
        for span in rows.spans:
            if self._acts_at_head(span):
                cuts |= {span.start, span.stop}
        parts = [range(start, stop, CHUNK) for start, stop in pairwise(sorted(cuts))]
        return [slice(at, min(at + CHUNK, part.stop)) for part in parts for at in part]

    def _tap(self, rows: SpanRows) -> torch.Tensor | None:
        has_gradients = self._head.observer is not None or any(self._acts_at_head(span) for span in rows.spans)
        return self._cell.tap if has_gradients else None

    def _acts_at_head(self, span: Span) -> bool:
        return self._head.bind(span).acts or self._head_rows.acts(span)

    def _keep_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Stands where the head stood: logits are computed later, in chunks. Returns nothing that means something."""
        self._cell.hidden = hidden[0]
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    def _rows(self, members: Sequence[MemberRows], counts: Sequence[int]) -> SpanRows:
        """`counts`: rows of each sequence."""
        spans, at, index = [], 0, 0
        for rows in members:
            count = sum(counts[index : index + len(rows.sequences)])
            index += len(rows.sequences)
            if rows.parts is not None and count:
                spans.append(Span(at, at + count, rows.slot, rows.parts, rows.dropout))
            at += count
        return SpanRows(at, spans, self._kernels, self.base.device)

    def _long(self, lengths: Sequence[int]) -> torch.Tensor:
        """Which tokens are of sequences beyond the original context, on bases of type longrope."""
        rope = self._rope
        long = [rope is not None and rope.is_long(length) for length in lengths]
        counts = torch.tensor(lengths, device=self.base.device)
        return torch.tensor(long, device=self.base.device).repeat_interleave(counts)[None]

    def _replace(self, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward  # type: ignore[method-assign, unused-ignore]
        self._changed.append(module)

    def _forget(self) -> None:
        cell = self._cell
        cell.tokens, cell.lengths, cell.ids, cell.hidden = None, (), None, None
        for group in self.groups:
            group.reset()
        for site in self._sublayers:
            site.reset()


def _formats(device: torch.device, dtype: torch.dtype, *, deterministic: bool) -> WeightFormats:
    """As a server's, but for the packed layout: it takes a copy of the weights, and is for fewer rows than these."""
    return replace(select_weight_formats(device, dtype, dense=False, invariant=deterministic), packed=False)


def _predicted(lengths: Sequence[int], sequences: Sequence[Example]) -> tuple[list[int], list[int], list[int]]:
    """(token rows before a label, the labels, how many of each sequence). Labels are those of the last positions."""
    kept: list[int] = []
    targets: list[int] = []
    counts, end = [], 0
    for length, each in zip(lengths, sequences, strict=True):
        end += length
        first = end - len(each.ids)
        labels = [(first + place, label) for place, label in enumerate(each.labels[1:]) if label != IGNORE]
        kept += [place for place, _ in labels]
        targets += [label for _, label in labels]
        counts.append(len(labels))
    return kept, targets, counts


def _projection(group: LinearGroup, member: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return group.project(x, member)

    return forward


def _leaving(forward: Callable[[torch.Tensor], torch.Tensor], site: SublayerSite) -> Callable[..., torch.Tensor]:
    def leave(x: torch.Tensor) -> torch.Tensor:
        return site.leave(forward(x))

    return leave


def _share_storage(names: Sequence[str], frozen: object, base: LoadedBase) -> None:
    """Lets modules whose codes were stacked point into the stack: the same bytes, held once."""
    if len(names) == 1 or not isinstance(frozen, Nf4Linear):
        return
    begin = 0
    for name in names:
        module = base.model.get_submodule(name)
        if isinstance(module, Linear4bit):
            end = begin + base.spec.modules[name].out_features
            own = module.weight.data
            module.weight.data = frozen.codes[begin:end].view(own.dtype).reshape(own.shape)
            begin = end
