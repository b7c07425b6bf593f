"""One plan as tensors: ids, positions, cache rows, attention prefills, rows that need logits.

Rows are ordered by slot, those without an adapter first, so that rows of one adapter lie together; a chunk of which an
adapter acts on the end alone has rows in both places. Built on the host once per step and copied once. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from loramux_server.engine.plan import BASE_SLOT, Chunk
from loramux_server.model.attention_metadata import AttentionMetadata, DecodeAttention, DecodeBatch, PrefillSegment
from loramux_server.model.cache import PagedCache
from loramux_server.model.decode_attention import attend_rows

ROW_MULTIPLE = 16
"""Rows of a deterministic step are padded to this, so that elementwise operations have no scalar tail of their own."""


class _Piece(NamedTuple):
    """Rows of one chunk that lie together: positions start .. stop - 1. `is_last` where the chunk ends with them."""

    chunk: Chunk
    tokens: tuple[int, ...]
    start: int
    stop: int
    slot: int
    is_last: bool


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """`chunks` in the order of their last rows, merged ones last; `logit_rows` [n] are the rows that get logits.

    `shared_rows` and `shared_logits` are the numbers of rows before the first merged one.

    Logit row ranges by chunk: `logits_of[i]` = (first, last) in the logits for chunks[i], empty where it needs none.
    """

    chunks: tuple[Chunk, ...]
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    token_slots: list[int]  # T
    logit_rows: torch.Tensor  # [n]
    logit_slots: list[int]  # n
    logits_of: tuple[tuple[int, int], ...]
    context: AttentionMetadata
    long_rope: torch.Tensor  # [T] bool: rows of requests that use the long rotary factors
    shared_rows: int
    shared_logits: int


def build_batch(
    chunks: Sequence[Chunk],
    cache: PagedCache,
    scratch_block: int,
    *,
    tiled: bool,
    decode: DecodeAttention = attend_rows,
) -> ForwardBatch:
    """Lays out a step. `scratch_block` receives the KV of padding rows; `tiled` pads and attends row-invariantly."""
    pieces = _in_order(chunks)
    size = cache.block_size
    count = sum(len(chunk.tokens) for chunk in chunks)
    padding = -count % ROW_MULTIPLE if tiled else 0
    ids = [0] * padding
    positions = [0] * padding
    slots = [BASE_SLOT] * padding
    long_rope = [False] * padding
    slot_mapping = [scratch_block * size + row % size for row in range(padding)]
    firsts: list[int] = []
    for piece in pieces:
        firsts.append(len(ids))
        ids.extend(piece.tokens)
        places, blocks = range(piece.start, piece.stop), piece.chunk.blocks
        positions.extend(places)
        slots.extend([piece.slot] * len(places))
        long_rope.extend([piece.chunk.long_rope] * len(places))
        slot_mapping.extend(blocks[place // size] * size + place % size for place in places)
    logit_rows, logits_of = _logit_rows(pieces, firsts, tiled=tiled)
    ordered = tuple(piece.chunk for piece in pieces if piece.is_last)
    device = cache.keys[0].device
    prefills, decodes = _attend(pieces, firsts, len(ids), size, device, tiled=tiled)
    return ForwardBatch(
        chunks=ordered,
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        token_slots=slots,
        logit_rows=torch.tensor(logit_rows, device=device),
        logit_slots=[slots[row] for row in logit_rows],
        logits_of=logits_of,
        context=AttentionMetadata(
            cache, torch.tensor(slot_mapping, device=device), decode, prefills, decodes, tiled=tiled
        ),
        long_rope=torch.tensor(long_rope, device=device),
        shared_rows=len(ids) - sum(len(chunk.tokens) for chunk in ordered if chunk.is_merged),
        shared_logits=next(
            (first for chunk, (first, _) in zip(ordered, logits_of, strict=True) if chunk.is_merged), len(logit_rows)
        ),
    )


def _in_order(chunks: Sequence[Chunk]) -> list[_Piece]:
    """All pieces, by slot; of a chunk in two pieces, the longest if there are several, one follows the other: they
    attend as one.
    """
    torn = [chunk for chunk in chunks if _is_torn(chunk)]
    if not torn:
        pieces = [_Piece(c, c.tokens, c.start, c.start + len(c.tokens), c.slot, True) for c in chunks]
        return sorted(pieces, key=lambda piece: (piece.chunk.is_merged, piece.slot))
    joined = max(torn, key=lambda chunk: chunk.start)

    def place(piece: _Piece) -> tuple[bool, bool, bool, int, bool]:
        is_joined = piece.chunk is joined
        is_last = is_joined if piece.slot == BASE_SLOT else not is_joined
        return piece.chunk.is_merged, piece.slot != BASE_SLOT, piece.slot != joined.slot, piece.slot, is_last

    return sorted((piece for chunk in chunks for piece in _cut(chunk)), key=place)


def _is_torn(chunk: Chunk) -> bool:
    return chunk.start < chunk.active_from < chunk.start + len(chunk.tokens)


def _cut(chunk: Chunk) -> list[_Piece]:
    """By what acts on its rows: the base's before `active_from`, then those of its slot."""
    start, stop = chunk.start, chunk.start + len(chunk.tokens)
    if not _is_torn(chunk):
        return [_Piece(chunk, chunk.tokens, start, stop, chunk.slot, True)]
    middle, count = chunk.active_from, chunk.active_from - start
    return [
        _Piece(chunk, chunk.tokens[:count], start, middle, BASE_SLOT, False),
        _Piece(chunk, chunk.tokens[count:], middle, stop, chunk.slot, True),
    ]


def _logit_rows(
    pieces: Sequence[_Piece], firsts: Sequence[int], *, tiled: bool
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Rows that get logits, and where each chunk's are; never none at all, and padded where `tiled`."""
    wanted: list[int] = []
    ranges: list[tuple[int, int]] = []
    for piece, first in zip(pieces, firsts, strict=True):
        chunk, before, last = piece.chunk, len(wanted), first + len(piece.tokens)
        if not piece.is_last:
            continue
        if chunk.params.prompt_logprobs is not None and chunk.start < chunk.prompt_length:
            wanted.extend(range(first, last))
        elif chunk.samples:
            wanted.append(last - 1)
        ranges.append((before, len(wanted)))
    missing = -len(wanted) % ROW_MULTIPLE if tiled else 0
    if not wanted:
        missing = ROW_MULTIPLE if tiled else 1
    if missing:  # row 0 is the first of all: no adapter's, where any row has none
        wanted = [0] * missing + wanted
        ranges = [(first + missing, last + missing) for first, last in ranges]
    return wanted, tuple(ranges)


def _attend(
    pieces: Sequence[_Piece], firsts: Sequence[int], rows: int, size: int, device: torch.device, *, tiled: bool
) -> tuple[list[PrefillSegment], list[DecodeBatch]]:
    """Sorts the pieces into prefills and batches of decode rows of similar length (within a factor of two).

    A piece sees what is before it in its chunk: keys and values of all rows are written before any row attends.
    """
    prefills: list[PrefillSegment] = []
    by_length: dict[int, list[tuple[int, _Piece]]] = {}
    spans = zip(firsts, pieces, strict=True) if all(piece.is_last for piece in pieces) else _joined(pieces, firsts)
    for first, piece in spans:
        used, count = -(-piece.stop // size), piece.stop - piece.start
        if count == 1 and not tiled:
            by_length.setdefault(used.bit_length(), []).append((first, piece))
        else:
            blocks = torch.tensor(piece.chunk.blocks[:used], device=device)
            prefills.append(PrefillSegment(first, first + count, piece.start, blocks))
    return prefills, [_decode_rows(members, rows, size, device) for members in by_length.values()]


def _joined(pieces: Sequence[_Piece], firsts: Sequence[int]) -> list[tuple[int, _Piece]]:
    """Pieces with their first rows, those that follow each other in one chunk as one."""
    spans: list[tuple[int, _Piece]] = []
    for piece, first in zip(pieces, firsts, strict=True):
        if spans and spans[-1][1].chunk is piece.chunk:
            spans[-1] = spans[-1][0], spans[-1][1]._replace(stop=piece.stop)
        else:
            spans.append((first, piece))
    return spans


def _decode_rows(members: Sequence[tuple[int, _Piece]], rows: int, size: int, device: torch.device) -> DecodeBatch:
    longest = max(piece.start for _, piece in members) // size + 1
    tables = [piece.chunk.blocks for _, piece in members]
    table = [(*blocks[:longest], *[blocks[0]] * (longest - len(blocks))) for blocks in tables]
    everything = len(members) == rows and [first for first, _ in members] == list(range(rows))
    return DecodeBatch(
        rows=None if everything else torch.tensor([first for first, _ in members], device=device),
        blocks=torch.tensor(table, device=device),
        positions=torch.tensor([piece.start for _, piece in members], device=device),
    )
