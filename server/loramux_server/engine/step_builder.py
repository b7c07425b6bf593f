"""A step in the making: chunks within the token budget.

Cuts requests into chunks and nothing else; who may run is the scheduler's decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.plan import BASE_SLOT, Chunk
from loramux_server.engine.request import Request
from loramux_server.engine.tables import BlockTables
from loramux_server.requests import Route


class StepBuilder:
    """The chunks of one step, at most `max_batch_tokens` tokens of them."""

    def __init__(self, limits: EngineLimits, tables: BlockTables) -> None:
        self.chunks: list[Chunk] = []
        self._left = limits.max_batch_tokens
        self._digests: list[str | None] = []  # of the chunks: None where some row uses the base's weights alone
        self._routes: list[Route] = []  # of the chunks
        self._merged_rows = limits.merged_rows
        self._tables = tables
        self._exact_chunk = limits.prefill_chunk if limits.deterministic else None

    def has_room(self, request: Request) -> bool:
        """Whether a first chunk of `request`, not admitted yet, is sure to fit."""
        least = 1 if self._exact_chunk is None else min(self._exact_chunk, request.prompt_length)
        return self._left >= least

    def add_prefills(self, running: Iterable[Request]) -> None:
        """Chunks of all that have more than one token to compute, in order, while the budget lasts."""
        for request in running:
            # An older one that does not fit is not passed by younger ones: they would keep it out.
            if request.remaining > 1 and not self.add_prefill(request):
                return

    def add_prefill(self, request: Request) -> bool:
        """A chunk of `request` as large as the rules and the budget allow; False when there is none."""
        end = self._find_chunk_end(request)
        if end is None:
            return False
        self.add(request, end)
        return True

    def add(self, request: Request, end: int) -> None:
        """The tokens of `request` from the first not computed up to `end`; their blocks are there."""
        start = request.computed
        tokens = request.tokens
        lease = request.lease
        is_base = lease is None or end <= request.active_from
        is_mixed = start < request.active_from < end
        history = None
        if not request.entered:
            request.entered = request.seen_by_runner = True
            if request.params.needs_history:
                history = tuple(tokens[:start])
        self.chunks.append(
            Chunk(
                request.key,
                tuple(tokens[start:end]),
                start,
                self._tables.get_table(request, end),
                BASE_SLOT if is_base or lease is None else lease.slot,
                end == len(tokens) and request.submission.max_tokens > 0,
                request.params,
                request.prompt_length,
                history,
                request.long_rope,
                request.submission.virtual_tokens,
                active_from=request.active_from if is_mixed else 0,
            )
        )
        self._left -= end - start
        self._digests.append(None if is_base or is_mixed else request.submission.digest)
        self._routes.append(request.submission.route)

    def choose_merged(self, ready: frozenset[str], on_trial: frozenset[str] = frozenset()) -> str | None:
        """The digest of the adapter that uses its merged weights in this step; marks its chunks.

        It has all rows, or more than any other that is ready, and enough that a product of its own costs less than
        sharing the frozen one; or a request insists, which alone may use those that are `on_trial`. Never in exact
        mode: paths must not vary.
        """
        if self._exact_chunk is not None:
            return None
        rows: dict[str, int] = {}
        insists: str | None = None
        for digest, route, chunk in zip(self._digests, self._routes, self.chunks, strict=True):
            if digest is not None and route == "merged" and digest in ready | on_trial:
                insists = digest
            elif digest is not None and route == "any" and digest in ready:
                rows[digest] = rows.get(digest, 0) + len(chunk.tokens)
        if insists is None and not rows:
            return None
        chosen = insists or max(rows, key=lambda digest: (rows[digest], digest))
        routes = ("merged", "any") if chosen in ready else ("merged",)
        uses = [digest == chosen and route in routes for digest, route in zip(self._digests, self._routes, strict=True)]
        if insists is None and not all(uses) and (self._merged_rows is None or rows[chosen] < self._merged_rows):
            return None
        self.chunks = [
            replace(chunk, is_merged=True) if own else chunk for own, chunk in zip(uses, self.chunks, strict=True)
        ]
        return chosen

    def _find_chunk_end(self, request: Request) -> int | None:
        """Where the next chunk ends. Exact mode cuts by the request alone and waits for room rather than cut else."""
        start, known = request.computed, len(request.tokens)
        if start < request.active_from and (
            self._exact_chunk is not None or request.params.prompt_logprobs is not None
        ):
            known = request.active_from  # no such chunk is the base's and the adapter's: its rows lie together
        if self._exact_chunk is None:
            end = min(known, start + self._left)
            return end if end > start else None
        if start < request.prompt_length:
            end = min((start // self._exact_chunk + 1) * self._exact_chunk, request.prompt_length, known)
        else:
            end = start + 1  # output is replayed as it was computed first: one token a step
        return end if end - start <= self._left else None
