"""Vocabularies that an adapter resized: how many tokens it knows, and where the rows of those that are new come from.

After `resize_token_embeddings` PEFT writes whatever lies at the embedding and the head with the new number of rows, and
the resized tables themselves where it notices. The canonical form keeps the base's part of each and puts the further
rows into `AddedTokens`; what a file does not hold was drawn at random on another machine, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch.nn.functional import pad

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.base_weight import check_is_base_weight
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.extras import Replace, one_table
from loramux_adapters.formats.peft.tensors import PREFIX, PlacedTensor
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_header import TensorEntry
from loramux_adapters.parts.added_tokens import AddedTokens
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.magnitude import Magnitude
from loramux_adapters.parts.part import Part
from loramux_adapters.parts.token_rows import TokenRows
from loramux_adapters.spec import BaseModelSpec

# The end of a tensor's name -> its axis that has an entry for each token.
_TABLES = (
    ".weight", ".base_layer.weight", ".modules_to_save.weight", ".original_module.weight",
    ".token_adapter.base_layer.weight",
)  # fmt: skip
_AXES = {
    "embedding": dict.fromkeys(_TABLES, 0) | {".lora_embedding_A": 1},
    "head": dict.fromkeys(_TABLES, 0) | {".lora_B.weight": 0, ".lora_magnitude_vector": 0},
}
_SAVE_ROWS = (
    "train the embedding and the head with modules_to_save, or save with save_embedding_layers=True, so that the file "
    "holds the rows of all tokens"
)

Parts = tuple[Part, ...]


def find_vocabulary(
    entries: Iterable[TensorEntry], token_ids: Iterable[int], base: BaseModelSpec, limits: ReadLimits
) -> int:
    """How many tokens the adapter knows, by the shapes of its tensors, else by the tokens whose rows it trained.

    Raises AdapterInvalid where two tensors disagree, AdapterIncompatible where they are too many or the base has other
    tables of tokens.
    """
    sizes: dict[int, str] = {}
    axes = {
        f"{PREFIX}{name}{suffix}": axis
        for end, name in (("embedding", base.embedding), ("head", base.head))
        for suffix, axis in _AXES[end].items()
        if name is not None
    }
    for entry in entries:
        axis = axes.get(entry.name)
        if axis is not None and len(entry.shape) > axis and entry.shape[axis]:
            sizes.setdefault(entry.shape[axis], entry.name)
    if len(sizes) > 1:
        (one, first), (other, second) = sorted(sizes.items())[:2]
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: {quote(first)} is of {one} tokens and {quote(second)} of {other}",
            subject=f"{WEIGHTS_FILE}: {quote(second)}",
            remedy="save all of the adapter together, after resize_token_embeddings",
        )
    size = next(iter(sizes), max(base.vocab_size, 1 + max(token_ids, default=0)))
    if size != base.vocab_size:
        _check_size(size, base, limits)
    return size


def resized(base: BaseModelSpec, size: int) -> BaseModelSpec:
    """The base as the adapter was trained on it: what its tensors are to be compared with."""
    modules = dict(base.modules)
    if base.embedding is not None:
        modules[base.embedding] = replace(modules[base.embedding], in_features=size)
    if base.head is not None:
        modules[base.head] = replace(modules[base.head], out_features=size)
    return replace(base, vocab_size=size, modules=modules)


def check_table(tensor: PlacedTensor, rows: torch.Tensor, base: BaseModelSpec) -> None:
    """Raises AdapterInvalid unless the rows [size, width] are the base's as far as it has as many.

    Whether some of the base's are the base's no hash tells: of a smaller vocabulary the width alone is compared.
    """
    module = base.modules[tensor.module]
    width = module.out_features if module.kind == "embedding" else module.in_features
    if len(rows) > base.vocab_size or rows.shape[1] != width:
        check_is_base_weight(tensor.module, tensor.entry, rows[: base.vocab_size], base)


def fit_vocabulary(
    modules: dict[str, Parts], tables: Mapping[str, torch.Tensor], size: int, base: BaseModelSpec
) -> None:
    """Brings the parts at both ends, which are for `size` tokens, to the base's, in place.

    `tables` are the resized weights [size, hidden] of the embedding and the head that the file holds beside what was
    trained. Raises AdapterInvalid where rows of new tokens are in no tensor, AdapterIncompatible for a part that cannot
    be divided.
    """
    if size == base.vocab_size or base.embedding is None or base.head is None:
        return
    ends = (base.embedding, base.head)
    if base.tied_embeddings:  # one table under two names, either of which may be left out
        known = [tables[end] for end in ends if end in tables]
        if len(known) == 2 and not torch.equal(*known):
            raise one_table(base.head, base.embedding)
        tables = {end: table for end in ends for table in known}
    for end in ends:
        divide = _shrink if size < base.vocab_size else _grow
        modules[end] = divide(end, modules.get(end, ()), tables.get(end), size, base)


def _check_size(size: int, base: BaseModelSpec, limits: ReadLimits) -> None:
    if size - base.vocab_size > limits.max_added_tokens:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: the adapter knows {size} tokens, more than the {base.vocab_size} of the base and the "
            f"{limits.max_added_tokens} that may be added",
            subject=WEIGHTS_FILE,
            remedy="upload an adapter made for this base",
        )
    for name, module in base.modules.items():
        if module.kind == "embedding" and name != base.embedding and module.in_features == base.vocab_size:
            raise AdapterIncompatible(
                f"{WEIGHTS_FILE}: the adapter knows {size} tokens, and this base of {base.vocab_size} also looks token "
                f"ids up in {name}",
                subject=WEIGHTS_FILE,
                remedy="train without resize_token_embeddings",
            )
    if base.embedding is None or base.head is None or base.modules[base.head].has_bias:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: the adapter knows {size} tokens and the base {base.vocab_size}, whose head has a bias or "
            "is none of its modules, so that it cannot be resized",
            subject=WEIGHTS_FILE,
            remedy="train without resize_token_embeddings",
        )


def _grow(end: str, parts: Parts, table: torch.Tensor | None, size: int, base: BaseModelSpec) -> Parts:
    first = base.vocab_size
    rows = None if table is None else table[first:].float()
    fitted: list[Part] = []
    for part in parts:
        if isinstance(part, TokenRows):
            is_new = part.ids >= first
            rows = _with_rows(rows, part.ids[is_new] - first, part.rows[is_new], size - first)
            if not bool(is_new.all()):
                fitted.append(TokenRows(part.ids[~is_new], part.rows[~is_new]))
        elif isinstance(part, Dense) and isinstance(part.change, Replace):
            rows = part.change.weight[first:].float()
            fitted.append(Dense(Replace(part.change.weight[:first]), first, part.in_features))
    if rows is None or bool(rows.isnan().any()):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: the adapter knows {size} tokens, {size - first} more than the base, and the file lacks "
            f"rows of theirs for {quote(end)}",
            subject=f"{WEIGHTS_FILE}: {quote(end)}",
            remedy=_SAVE_ROWS,
        )
    for part in parts:
        match part:
            case TokenRows() | Dense(change=Replace()):
                pass
            case LowRank(on_input=False) if end == base.embedding:
                fitted.append(part)  # its factor has a column for each token, beside whatever table
            case LowRank(on_input=False):
                rows = rows + part.b[first:] @ part.a.float()
                fitted.append(LowRank(part.a, part.b[:first]))
            case Magnitude(low_rank=low_rank) if end == base.head:  # behind its low rank, which is in the rows by now
                rows = rows * (part.length[first:] / rows.norm(dim=1))[:, None]
                fitted.append(Magnitude(part.length[:first], LowRank(low_rank.a, low_rank.b[:first])))
            case _:
                raise _indivisible(end, size, base)
    return (*fitted, AddedTokens(rows))


def _shrink(end: str, parts: Parts, table: torch.Tensor | None, size: int, base: BaseModelSpec) -> Parts:
    missing = base.vocab_size - size
    ids = torch.arange(size)
    fitted: list[Part] = []
    for part in parts:
        match part:
            case TokenRows() if table is not None and len(part.ids) < size:
                fitted.append(TokenRows(ids, table.float().index_copy(0, part.ids, part.rows.float())))
            case TokenRows():
                fitted.append(part)
            case Dense(change=Replace(weight=weight)):
                fitted.append(TokenRows(ids, weight))  # the other columns are the base's, and nobody reads them
            case LowRank(on_input=False) if end == base.embedding:
                fitted.append(part)
            case LowRank(on_input=False):
                fitted.append(LowRank(part.a, pad(part.b, (0, 0, 0, missing))))
            case _:
                raise _indivisible(end, size, base)
    if table is not None and not any(isinstance(part, TokenRows) for part in fitted):
        # No hash tells whether a part of the base's table is the base's: it is served as the file has it.
        fitted.append(TokenRows(ids, table))
    return tuple(fitted)


def _with_rows(rows: torch.Tensor | None, places: torch.Tensor, new: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` with some of them replaced; unknown ones are NaN, which no tensor of a file is."""
    known = torch.full((count, new.shape[1]), torch.nan) if rows is None else rows.clone()
    known[places] = new.float()
    return known


def _indivisible(end: str, size: int, base: BaseModelSpec) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{WEIGHTS_FILE}: the adapter knows {size} tokens and the base {base.vocab_size}, and what it does to "
        f"{quote(end)} cannot be divided by tokens",
        subject=f"{WEIGHTS_FILE}: {quote(end)}",
        remedy="train the embedding and the head with plain LoRA, modules_to_save or trainable_token_indices",
    )
