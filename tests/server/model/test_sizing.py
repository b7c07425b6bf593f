"""Memory is shared out once at start: explicit settings win, the rest are shares of what is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_adapters.guard.layers import AttentionLayer
from loramux_server.model import sizing
from loramux_server.model.cache import PagedCache, bytes_per_token
from loramux_server.model.sizing import DEFAULT_RANK_ROWS, Memory

CPU = torch.device("cpu")
FREE = 16 << 30


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "free_bytes", lambda device: FREE)


def plan(**changes: Any) -> Memory:
    unset = {"kv_bytes": None, "kv_most": 1 << 50, "adapter_bytes": None, "rank_row_bytes": 1 << 30,
             "dense_base_bytes": None, "dense_needed": 1 << 50}  # fmt: skip
    return Memory.plan(CPU, **(unset | changes))


def test_unset_parts_get_their_share() -> None:
    memory = plan()
    assert (memory.kv, memory.adapters, memory.dense_base) == (FREE // 4, FREE // 8, False)
    assert memory.kv + memory.adapters + FREE // 8 < FREE


def test_no_part_takes_more_than_it_can_use() -> None:
    memory = plan(kv_most=1000, rank_row_bytes=10)
    assert (memory.kv, memory.adapters) == (1000, DEFAULT_RANK_ROWS * 10)


def test_explicit_settings_win() -> None:
    memory = plan(kv_bytes=FREE * 2, adapter_bytes=7, dense_base_bytes=100, dense_needed=100)
    assert memory == Memory(kv=FREE * 2, adapters=7, dense_base=True)


@pytest.mark.parametrize(
    ("given", "needed", "expected"),
    [(None, FREE // 8, True), (None, FREE // 8 + 1, False), (0, 1, False), (100, 101, False)],
)
def test_a_dense_base_is_held_where_it_fits(given: int | None, needed: int, expected: bool) -> None:
    assert plan(dense_base_bytes=given, dense_needed=needed).dense_base == expected


def test_bytes_per_token_is_what_the_cache_takes() -> None:
    layers = [AttentionLayer(2, 16, 24), AttentionLayer(4, 8, 8)]
    for dtype in (torch.float32, torch.bfloat16):
        cache = PagedCache(layers, 5, 4, dtype, CPU)
        held = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.keys, *cache.values))
        assert held == bytes_per_token(layers, dtype) * 5 * 4


def read_all(cache: PagedCache, layer: int) -> list[torch.Tensor]:
    heads = cache.layers[layer].heads
    return [part.clone() for part in cache.read(layer, cache.read_blocks(torch.arange(6), heads))]
