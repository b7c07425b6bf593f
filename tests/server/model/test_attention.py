"""Paged attention against plain attention in float64 over the same tokens: any mix of chunks, windows, caps, heads."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loramux_adapters.guard.layers import AttentionLayer
from loramux_server.engine.plan import Chunk
from loramux_server.model.attention import paged_attention
from loramux_server.model.attention_metadata import AttentionParams, DecodeAttention, DecodeBatch
from loramux_server.model.cache import PagedCache
from loramux_server.model.decode_attention import attend_rows
from loramux_server.model.forward_batch import build_batch
from loramux_server.model.native_decode import find_native_decode
from loramux_server.requests import SamplingParams

WIDTH, SIZE, BLOCKS = 16, 4, 97
LAYER: Any = SimpleNamespace(layer_idx=0)


@dataclass
class Sequence:
    """One request: where its blocks are and all it has ever attended to."""

    name: str
    blocks: tuple[int, ...]
    keys: list[torch.Tensor] = field(default_factory=list)  # each [KV, D]
    values: list[torch.Tensor] = field(default_factory=list)


class AttentionHarness:
    """Requests in a cache whose free rows hold garbage, stepped with random chunks."""

    def __init__(
        self, heads: int, kv_heads: int, *, value_width: int = WIDTH, dtype: torch.dtype = torch.float32, form: str,
        garbage: float = 1e3, size: int = SIZE,
    ) -> None:  # fmt: skip
        self.heads, self.kv_heads, self.value_width, self.dtype = heads, kv_heads, value_width, dtype
        self.tiled, self.decode = form == "tiled", decode_of(form)
        self.random = random.Random(heads * 10 + kv_heads)
        self.generator = torch.Generator().manual_seed(heads)
        self.cache = PagedCache(
            [AttentionLayer(kv_heads, WIDTH, value_width)], BLOCKS, size, dtype, torch.device("cpu")
        )
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.copy_(torch.randn(tensor.shape, generator=self.generator).sign() * garbage)
        free = list(range(BLOCKS - 1))
        self.random.shuffle(free)
        self.sequences = [Sequence(f"r{index}", tuple(free[index * 12 : index * 12 + 12])) for index in range(8)]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def step(self, counts: dict[int, int], **limits: Any) -> float:
        """Runs chunks of `counts` tokens; returns the largest error over all rows."""
        chunks = []
        for index, count in counts.items():
            one = self.sequences[index]
            slot = self.random.choice([-1, 0, 1])
            chunks.append(Chunk(one.name, (0,) * count, len(one.keys), one.blocks, slot, True, SamplingParams(), 1))
        batch = build_batch(chunks, self.cache, BLOCKS - 1, tiled=self.tiled, decode=self.decode)
        rows = len(batch.ids)
        query, key = self.draw(1, self.heads, rows, WIDTH), self.draw(1, self.kv_heads, rows, WIDTH)
        value = self.draw(1, self.kv_heads, rows, self.value_width)
        window = limits.get("sliding_window")
        self.cache.layers = (self.cache.layers[0]._replace(window=window),)
        # What a layer states of its window is not what counts.
        out, none = paged_attention(LAYER, query, key, value, None, ctx=batch.context, **limits | {"sliding_window": 3})
        assert none is None
        assert out.shape == (1, rows, self.heads, self.value_width)
        worst, row = 0.0, rows - sum(counts.values())
        by_name = {sequence.name: sequence for sequence in self.sequences}
        for chunk in batch.chunks:
            sequence = by_name[chunk.request_id]
            for _ in chunk.tokens:
                sequence.keys.append(key[0, :, row])
                sequence.values.append(value[0, :, row])
                expected = plain(query[0, :, row], sequence, **limits)
                worst = max(worst, float((out[0, row].double() - expected).abs().max()))
                row += 1
        return worst


def plain(
    query: torch.Tensor,
    sequence: Sequence,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The newest position's row [H, Dv], by the definition."""
    first = 0 if sliding_window is None else max(0, len(sequence.keys) - sliding_window)
    keys, values = (torch.stack(part[first:]).double() for part in (sequence.keys, sequence.values))
    group = query.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * (WIDTH**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
LIMITS = pytest.mark.parametrize(
    "limits",
    [{}, {"sliding_window": 5}, {"sliding_window": 1}, {"softcap": 2.0, "scaling": 0.3},
     {"softcap": 1.5, "sliding_window": 7}],
    ids=["plain", "window", "itself", "softcap", "both"],
)  # fmt: skip
FORMS = pytest.mark.parametrize(
    "form",
    ["torch", pytest.param("native", marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")),
     "tiled"],
)  # fmt: skip


def decode_of(form: str) -> DecodeAttention:
    """What attends for decode rows; the tiled form has none."""
    native = find_native_decode() if form == "native" else None
    assert form != "native" or native is not None
    return native or attend_rows


@FORMS
@LIMITS
@HEADS
def test_any_mix_of_chunks(heads: int, kv_heads: int, limits: dict[str, Any], form: str) -> None:
    harness = AttentionHarness(heads, kv_heads, form=form)
    for _ in range(12):
        chosen = harness.random.sample(range(8), harness.random.randint(1, 8))
        counts = {index: harness.random.choice([1, 1, 1, 2, 5, 9]) for index in chosen}
        counts = {i: n for i, n in counts.items() if len(harness.sequences[i].keys) + n <= 48}
        if counts:
            assert harness.step(counts, **limits) < 1e-5


@FORMS
@pytest.mark.parametrize("size", [1, 3, 16, 24, 64, 100])
def test_blocks_of_any_size(size: int, form: str) -> None:
    harness = AttentionHarness(4, 2, form=form, size=size)
    for counts in ({0: 11, 1: 1}, {0: min(12 * size - 12, 120)}, {0: 1, 1: 1}):
        if counts[0] > 0 and len(harness.sequences[0].keys) + counts[0] <= 12 * size:
            assert harness.step(counts, softcap=3.0) < 1e-5


@FORMS
def test_values_of_another_width(form: str) -> None:
    harness = AttentionHarness(4, 2, value_width=24, form=form)
    for counts in ({0: 6, 1: 1}, {0: 1, 1: 1}, {0: 1}):
        assert harness.step(counts) < 1e-5


@FORMS
def test_bfloat16(form: str) -> None:
    harness = AttentionHarness(8, 2, dtype=torch.bfloat16, form=form)
    for counts in ({0: 17, 1: 3}, {0: 1, 1: 1, 2: 4}, {0: 1, 1: 1, 2: 1}):
        assert harness.step(counts) < 0.03


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("garbage", [0.0, 3e38, float("inf"), float("nan")], ids=["zeros", "huge", "inf", "nan"])
def test_what_a_former_owner_left_is_never_seen(form: str, dtype: torch.dtype, garbage: float) -> None:
    """Leftovers of any size and kind: a score against them may be inf or NaN, and 0 * NaN is NaN."""
    harness, clean = (AttentionHarness(8, 2, dtype=dtype, form=form, garbage=value) for value in (garbage, 1.0))
    for counts in ({0: 3, 1: 1, 2: 9}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 4, 2: 1}):
        bound = 1e-5 if dtype == torch.float32 else 0.03
        assert harness.step(counts) < bound
        assert clean.step(counts) < bound


def test_the_tiled_form_gives_a_row_the_same_bits_however_it_is_cut() -> None:
    """Whole, in chunks from its own start, alone or among batch mates, from other blocks."""
    torch.manual_seed(0)
    length, heads, kv_heads = 90, 4, 2
    query, key = torch.randn(1, heads, length, WIDTH), torch.randn(1, kv_heads, length, WIDTH)
    value = torch.randn(1, kv_heads, length, WIDTH)

    def run(cuts: list[int], blocks: tuple[int, ...], neighbor: int) -> torch.Tensor:
        cache = PagedCache([AttentionLayer(kv_heads, WIDTH, WIDTH)], 64, SIZE, torch.float32, torch.device("cpu"))
        rows = []
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            chunks = [Chunk("mine", (0,) * (stop - start), start, blocks, 1, True, SamplingParams(), 1)]
            if neighbor:
                chunks.append(Chunk("other", (0,) * neighbor, 0, tuple(range(56, 63)), 0, True, SamplingParams(), 1))
            batch = build_batch(chunks, cache, 63, tiled=True)
            total, mine = len(batch.ids), slice(len(batch.ids) - (stop - start), None)
            padded = [torch.randn(1, t.shape[1], total, WIDTH) for t in (query, key, value)]
            for each, own in zip(padded, (query, key, value), strict=True):
                each[:, :, mine] = own[:, :, start:stop]
            out, _ = paged_attention(LAYER, *padded, None, ctx=batch.context)
            rows.append(out[0, mine])
        return torch.cat(rows)

    whole = run([], tuple(range(23)), 0)
    for cuts, blocks, neighbor in (
        ([1], tuple(range(30, 53)), 3),
        ([16, 64], tuple(range(23)), 21),
        ([7, 8, 9, 50], tuple(reversed(range(23))), 1),
        (list(range(70, 90)), tuple(range(23)), 5),
    ):
        assert torch.equal(run(cuts, blocks, neighbor), whole), cuts


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_decode_row_is_the_same_alone_and_among_batch_mates(dtype: torch.dtype) -> None:
    """Bit for bit: the compiled kernel pads nothing and gathers nothing."""
    mixed, alone = (AttentionHarness(8, 2, dtype=dtype, form="native") for _ in range(2))
    lengths = {index: 3 * index + 1 for index in range(6)}
    for harness in (mixed, alone):
        harness.step(lengths)
    query, key = torch.randn(1, 8, 6, WIDTH).to(dtype), torch.randn(1, 2, 6, WIDTH).to(dtype)

    def attend(harness: AttentionHarness, indices: list[int]) -> torch.Tensor:
        chunks = [
            Chunk(str(i), (0,), lengths[i], harness.sequences[i].blocks, -1, True, SamplingParams(), 1) for i in indices
        ]
        batch = build_batch(chunks, harness.cache, BLOCKS - 1, tiled=False, decode=harness.decode)
        out, _ = paged_attention(LAYER, query[:, :, indices], key[:, :, indices], key[:, :, indices], None,
                                 ctx=batch.context)  # fmt: skip
        return out[0]

    together = attend(mixed, list(range(6)))
    for index in range(6):
        assert torch.equal(attend(alone, [index])[0], together[index])


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("width", [64, 128, 80, 5])
def test_a_nan_of_its_own_reaches_its_row_and_no_other(width: int) -> None:
    """Logits must tell of it: a kernel that dropped it would serve garbage in silence."""
    native = decode_of("native")
    cache = PagedCache([AttentionLayer(2, width, width)], 8, 16, torch.bfloat16, torch.device("cpu"))
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(generator=torch.Generator().manual_seed(width))
    rows = DecodeBatch(None, torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([20, 31, 16]))
    query = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    sound = native(cache, 0, query, rows, AttentionParams(0.1))
    assert torch.allclose(sound.float(), attend_rows(cache, 0, query, rows, AttentionParams(0.1)).float(), atol=0.02)
    for tensor in (cache.keys[0], cache.values[0]):
        kept = tensor[2, 1, 7, 0].clone()
        tensor[2, 1, 7, 0] = float("nan")
        found = native(cache, 0, query, rows, AttentionParams(0.1))
        assert torch.equal(found[[0, 2]], sound[[0, 2]])
        assert torch.equal(found[1, :2], sound[1, :2])
        assert found[1, 2:].isnan().any(-1).all()
        tensor[2, 1, 7, 0] = kept
