"""One plan as tensors: every token at its place, every row with its slot, logits where they are wanted."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.apply.batch import segments_of
from loramux_adapters.guard.layers import AttentionLayer
from loramux_server.engine.plan import BASE_SLOT, Chunk
from loramux_server.model.cache import PagedCache
from loramux_server.model.forward_batch import ForwardBatch, build_batch
from loramux_server.requests import SamplingParams

SIZE, BLOCKS = 4, 64
SCRATCH = BLOCKS - 1
CACHE = PagedCache([AttentionLayer(1, 2, 2)], BLOCKS, SIZE, torch.float32, torch.device("cpu"))


@st.composite
def plans(draw: st.DrawFn) -> list[Chunk]:
    """Chunks of up to eight requests, each with blocks of its own."""
    free = draw(st.permutations(range(SCRATCH)))
    chunks: list[Chunk] = []
    for index in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, 16))
        count = draw(st.sampled_from([1, 1, 1, 2, 5, 9]))
        tokens = tuple(draw(st.lists(st.integers(0, 99), min_size=count, max_size=count)))
        asks = draw(st.sampled_from([None, None, 3]))
        middle = draw(st.integers(0, start + count + 2)) if asks is None else 0  # where its adapter begins to act
        chunks.append(
            Chunk(
                request_id=f"r{index}",
                tokens=tokens,
                start=start,
                blocks=tuple(free[index * 7 : index * 7 + 7]),
                slot=draw(st.integers(-1, 3)),
                samples=draw(st.booleans()),
                params=SamplingParams(prompt_logprobs=asks),
                prompt_length=draw(st.integers(1, 30)),
                active_from=middle if start < middle < start + count else 0,
            )
        )
    return chunks


def rows_of(batch: ForwardBatch, tiled: bool) -> tuple[int, dict[str, list[int]]]:
    """The number of padding rows, and each chunk's rows by position: found by where their KV goes."""
    padding = len(batch.ids) - sum(len(chunk.tokens) for chunk in batch.chunks)
    assert tiled or not padding
    row_at = {place: row for row, place in enumerate(batch.context.slot_mapping.tolist()) if row >= padding}
    assert len(row_at) == len(batch.ids) - padding  # no two write to one place
    found = {}
    for chunk in batch.chunks:
        positions = range(chunk.start, chunk.start + len(chunk.tokens))
        found[chunk.request_id] = [row_at[chunk.blocks[at // SIZE] * SIZE + at % SIZE] for at in positions]
    return padding, found


@given(plans(), st.booleans())
def test_every_token_has_its_row_position_slot_and_place(chunks: list[Chunk], tiled: bool) -> None:
    batch = build_batch(chunks, CACHE, SCRATCH, tiled=tiled)
    padding, rows = rows_of(batch, tiled)
    assert sorted(chunk.request_id for chunk in batch.chunks) == sorted(chunk.request_id for chunk in chunks)
    assert len(batch.positions) == len(batch.token_slots) == len(batch.context.slot_mapping) == len(batch.ids)
    for chunk in batch.chunks:
        positions = list(range(chunk.start, chunk.start + len(chunk.tokens)))
        assert tuple(batch.ids[rows[chunk.request_id]].tolist()) == chunk.tokens
        assert batch.positions[rows[chunk.request_id]].tolist() == positions
        slots = [batch.token_slots[row] for row in rows[chunk.request_id]]
        assert slots == [chunk.slot if position >= chunk.active_from else BASE_SLOT for position in positions]
    if tiled:
        assert len(batch.ids) % 16 == 0
        assert len(batch.logit_rows) % 16 == 0
    assert batch.token_slots[:padding] == [BASE_SLOT] * padding
    assert {place // SIZE for place in batch.context.slot_mapping[:padding].tolist()} <= {SCRATCH}


@given(plans(), st.booleans())
def test_rows_of_one_adapter_lie_together_base_first(chunks: list[Chunk], tiled: bool) -> None:
    batch = build_batch(chunks, CACHE, SCRATCH, tiled=tiled)
    for slots in (batch.token_slots, batch.logit_slots):
        segments = segments_of(slots)  # raises unless base rows come first
        assert len({segment.slot for segment in segments}) == len(segments)


@given(plans(), st.booleans())
def test_logits_are_computed_where_they_are_wanted_and_nowhere_else(chunks: list[Chunk], tiled: bool) -> None:
    batch = build_batch(chunks, CACHE, SCRATCH, tiled=tiled)
    _, rows = rows_of(batch, tiled)
    wanted = 0
    for chunk, (begin, end) in zip(batch.chunks, batch.logits_of, strict=True):
        found = batch.logit_rows[begin:end].tolist()
        if chunk.params.prompt_logprobs is not None and chunk.start < chunk.prompt_length:
            assert found == rows[chunk.request_id]
        else:
            assert found == (rows[chunk.request_id][-1:] if chunk.samples else [])
        assert [batch.logit_slots[index] for index in range(begin, end)] == [chunk.slot] * (end - begin)
        wanted += end - begin
    if not tiled:
        assert len(batch.logit_rows) == max(1, wanted)
    assert batch.logit_slots == [batch.token_slots[row] for row in batch.logit_rows.tolist()]


@given(plans())
def test_single_tokens_are_attended_together_each_exactly_once(chunks: list[Chunk]) -> None:
    batch = build_batch(chunks, CACHE, SCRATCH, tiled=False)
    _, rows = rows_of(batch, tiled=False)
    attended = [row for segment in batch.context.prefills for row in range(segment.first, segment.last)]
    by_row = {row: chunk for chunk in batch.chunks for row in rows[chunk.request_id]}
    for decode in batch.context.decodes:
        own = list(range(len(batch.ids))) if decode.rows is None else decode.rows.tolist()
        attended += own
        for row, table, position in zip(own, decode.blocks.tolist(), decode.positions.tolist(), strict=True):
            chunk = by_row[row]
            used = position // SIZE + 1
            assert position == batch.positions[row]
            assert tuple(table[:used]) == chunk.blocks[:used]
            assert set(table) <= set(chunk.blocks)  # also where it is padded: nobody else's
        lengths = [position // SIZE + 1 for position in decode.positions.tolist()]
        assert max(lengths) < 2 * min(lengths)
    assert sorted(attended) == list(range(len(batch.ids)))


@given(plans())
def test_the_tiled_form_attends_request_by_request(chunks: list[Chunk]) -> None:
    batch = build_batch(chunks, CACHE, SCRATCH, tiled=True)
    padding, rows = rows_of(batch, tiled=True)
    assert not batch.context.decodes
    attended: list[int] = []
    by_row = {row: chunk for chunk in batch.chunks for row in rows[chunk.request_id]}
    for segment in batch.context.prefills:
        attended += range(segment.first, segment.last)
        (chunk,) = {by_row[row].request_id: by_row[row] for row in range(segment.first, segment.last)}.values()
        assert batch.positions[segment.first : segment.last].tolist() == list(range(segment.start, segment.length))
        assert tuple(segment.blocks.tolist()) == chunk.blocks[: -(-segment.length // SIZE)]
    assert attended == list(range(padding, len(batch.ids)))
    assert padding < 16


@given(plans(), st.booleans())
def test_the_rows_of_a_chunk_that_its_adapter_joins_in_the_middle_attend_once(chunks: list[Chunk], tiled: bool) -> None:
    """Reading a long context twice would take as long as the turn on it; one such chunk a step is the usual case."""
    torn = [chunk for chunk in chunks if chunk.active_from and chunk.slot != BASE_SLOT]
    chunks = [chunk if not torn or chunk is torn[0] else replace(chunk, active_from=0) for chunk in chunks]
    batch = build_batch(chunks, CACHE, SCRATCH, tiled=tiled)
    _, rows = rows_of(batch, tiled)
    segments = [range(segment.first, segment.last) for segment in batch.context.prefills]
    for chunk in chunks:
        if len(chunk.tokens) > 1:
            own = rows[chunk.request_id]
            assert range(own[0], own[-1] + 1) in segments
            assert own == list(range(own[0], own[-1] + 1))
