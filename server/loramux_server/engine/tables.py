"""Which blocks each request's tokens lie in, and what of them the prefix cache may give or keep.

Joins `Request` and `BlockPool`; knows nothing of queues, budgets or adapters' leases.
"""

from __future__ import annotations

from collections.abc import Sequence

from loramux_server.engine.blocks import BlockPool, block_hash
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.plan import Chunk
from loramux_server.engine.request import Request


class BlockTables:
    """The KV side of scheduling. Blocks of all known tokens are taken at admission, later ones as tokens come."""

    def __init__(self, limits: EngineLimits) -> None:
        self.pool = BlockPool(limits.kv_blocks)
        self._size = limits.block_tokens
        self._caching = limits.prefix_cache
        # Cached KV is bit-equal to one's own only if the same chunk wrote it, so exact mode shares whole chunks.
        self._grain = limits.prefill_chunk if limits.deterministic else limits.block_tokens
        self._exact = limits.deterministic

    def find_cached(self, request: Request) -> Sequence[int]:
        """Blocks of the prefix cache that `request` can begin with; at least its last token is left to compute."""
        if not self._caching or request.params.prompt_logprobs is not None:
            return ()
        tokens = len(request.tokens) - 1
        if self._exact:  # output was computed token by token, and is again after a preemption
            tokens = min(tokens, request.prompt_length)
        usable = tokens // self._grain * self._grain // self._size
        if usable == 0:
            return ()
        self._extend_hashes(request, usable)
        found = self.pool.find_prefix(request.hashes[1 : usable + 1])
        return found[: len(found) * self._size // self._grain * self._grain // self._size]

    def can_admit(self, request: Request, cached: Sequence[int], reserve: int) -> bool:
        """Whether the blocks of all known tokens can be had and `reserve` more are left."""
        needed = self._count_blocks(len(request.tokens)) - len(cached) + len(self.pool.find_idle(cached))
        return needed + reserve <= self.pool.available

    def admit(self, request: Request, cached: Sequence[int]) -> None:
        """Give `request` its table, beginning with `cached`; `can_admit` has said yes."""
        self.pool.share(cached)
        fresh = self.pool.allocate(self._count_blocks(len(request.tokens)) - len(cached))
        if fresh is None:
            raise RuntimeError(f"no KV blocks for {request.key}, which can_admit let in")
        request.blocks = [*cached, *fresh]
        request.table = ()
        request.published = len(cached)
        request.computed = request.validated = len(cached) * self._size

    def grow(self, request: Request) -> bool:
        """Make room for the next token; False and no change when the pool has no block."""
        if request.computed < len(request.blocks) * self._size:
            return True
        fresh = self.pool.allocate(1)
        if fresh is None:
            return False
        request.blocks += fresh
        return True

    def get_table(self, request: Request, end: int) -> tuple[int, ...]:
        """The blocks that hold tokens 0 .. end - 1."""
        count = (end - 1) // self._size + 1
        if len(request.table) != count:
            request.table = tuple(request.blocks[:count])
        return request.table

    def record(self, request: Request, chunk: Chunk) -> None:
        """Note that `chunk`'s KV is written and let the prefix cache know of blocks it filled."""
        request.computed = chunk.start + len(chunk.tokens)
        full = request.computed // self._size
        if full <= request.published or not self._caching:
            return
        if self._exact and len(chunk.tokens) != self._grain:
            request.published = full  # written in another shape than a whole chunk: never shared
            return
        self._extend_hashes(request, full)
        for index in range(request.published, full):
            self.pool.publish(request.blocks[index], request.hashes[index + 1], request.digest)
        request.published = full

    def release(self, request: Request, *, invalidate: bool = False) -> None:
        """Take all blocks back.

        Content is in doubt when a step failed the request, or when no token was drawn from it yet: NaN shows
        only in logits. Such blocks are never found again; who gets them overwrites whatever it reads.
        """
        blocks, request.blocks = request.blocks, []
        if invalidate or request.computed > request.validated:
            self.pool.invalidate(blocks)
        self.pool.release(blocks)
        request.table = ()
        request.published = request.computed = request.validated = 0

    def _count_blocks(self, tokens: int) -> int:
        return (tokens - 1) // self._size + 1

    def _extend_hashes(self, request: Request, blocks: int) -> None:
        hashes, size = request.hashes, self._size
        for index in range(len(hashes) - 1, blocks):
            parent = hashes[-1]
            if request.active_root and index == request.active_from // size:
                parent += request.active_root
            hashes.append(block_hash(parent, request.tokens[index * size : (index + 1) * size]))
