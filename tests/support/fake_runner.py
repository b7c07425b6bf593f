"""A runner without a model: tokens are a pure function of what lies in a fake KV memory.

It reads every cell of a request's block table each step and raises on the first that is not the
request's own token at its own position under its own adapter: aliased blocks, stale prefix hits
and missing recomputes cannot go unseen, and what it samples is what a solo run would sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from loramux_server.engine.plan import Chunk, Sampled, StepPlan, StepResult
from loramux_server.requests import FinishReason, RequestFailure, SamplingParams, Submission, TokenLogprob

VOCABULARY = 64

Inject = Callable[[StepPlan], Mapping[str, RequestFailure]]


class KvMismatch(BaseException):
    """The KV memory does not hold what the plan says. No Exception: the engine would contain it as a failed step."""


def next_token(tokens: Sequence[int], digest: str | None, params: SamplingParams) -> int:
    """The token after `tokens`: depends on each of them, the adapter, the seed and the choice."""
    text = repr((list(tokens), digest, params.seed, params.choice)).encode()
    return hashlib.blake2b(text, digest_size=8).digest()[0] % VOCABULARY


def solo(submission: Submission, choice: int = 0) -> tuple[list[int], FinishReason]:
    """What a choice gives when nobody else is there: output tokens and how it ends."""
    params = SamplingParams(**{**vars(submission.sampling), "choice": choice})
    stop = submission.stop
    ends = stop.stop_token_ids | (frozenset() if stop.ignore_eos else stop.eos_token_ids)
    output: list[int] = []
    while len(output) < submission.max_tokens:
        output.append(next_token([*submission.prompt, *output], submission.digest, params))
        if output[-1] in ends and len(output) > stop.min_tokens:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


class FakeRunner:
    """Implements the engine's Worker. `digest_of` tells which adapter lies in a slot.

    `inject` is called before each step: it may raise, or name requests that fail in this step.
    """

    def __init__(self, block_tokens: int, digest_of: Callable[[int], str | None], inject: Inject | None = None) -> None:
        self.plans: list[StepPlan] = []
        self.inject = inject
        self._block_tokens = block_tokens
        self._digest_of = digest_of
        self._cells: dict[
            tuple[int, int], tuple[int, int, str | None]
        ] = {}  # (block, offset) -> position, token, digest
        self._known: dict[str, list[int]] = {}  # tokens by request, until it retires
        self._retired: set[str] = set()
        self._poisoned: set[tuple[int, int]] = set()  # cells that a request that failed left NaN in

    @property
    def known(self) -> frozenset[str]:
        """Ids of requests the runner keeps state of."""
        return frozenset(self._known)

    is_busy = False

    def execute(self, plan: StepPlan) -> StepResult:
        """Check and write the KV of every chunk, then sample."""
        self.plans.append(plan)
        failures = dict(self.inject(plan)) if self.inject is not None else {}
        for key in plan.retired:
            self._retired.add(key)
            self._known.pop(key, None)
        self._check_writers(plan)
        for chunk in plan.chunks:
            self._write(chunk, plan)
        sampled: dict[str, Sampled] = {}
        logprobs: dict[str, tuple[TokenLogprob | None, ...]] = {}
        for chunk in plan.chunks:
            tokens = self._read(chunk)
            if chunk.request_id in failures:
                end = chunk.start + len(chunk.tokens)
                self._poisoned.update(self._cell(chunk, position) for position in range(chunk.start, end))
                continue
            if chunk.samples:
                token = next_token(tokens, self._digest(chunk), chunk.params)
                asked = chunk.params.logprobs is not None
                sampled[chunk.request_id] = Sampled(token, TokenLogprob(token, -1.0) if asked else None)
            if chunk.params.prompt_logprobs is not None:
                logprobs[chunk.request_id] = tuple(
                    None if position == 0 else TokenLogprob(token, -float(position))
                    for position, token in enumerate(chunk.tokens, start=chunk.start)
                )
        return StepResult(plan.step, sampled, logprobs, failures)

    def _digest(self, chunk: Chunk) -> str | None:
        return None if chunk.slot < 0 else self._digest_of(chunk.slot)

    def _check_writers(self, plan: StepPlan) -> None:
        """No cell is written by two chunks, or written by one and read by another, in one step."""
        written: dict[int, str] = {}
        for chunk in plan.chunks:
            for index in range(chunk.start // self._block_tokens, len(chunk.blocks)):
                if chunk.blocks[index] in written:
                    raise KvMismatch(f"block {chunk.blocks[index]} is written by two requests")
                written[chunk.blocks[index]] = chunk.request_id
        for chunk in plan.chunks:
            for block in chunk.blocks:
                if written.get(block, chunk.request_id) != chunk.request_id:
                    raise KvMismatch(f"block {block} is read by {chunk.request_id} while another writes it")

    def _write(self, chunk: Chunk, plan: StepPlan) -> None:
        if not chunk.tokens or chunk.request_id in self._retired:
            raise KvMismatch(f"an empty chunk, or one of a retired request: {chunk.request_id}")
        if chunk.is_merged and plan.merged != self._digest(chunk):
            raise KvMismatch("a row of another adapter on a merged set")
        end = chunk.start + len(chunk.tokens)
        if len(chunk.blocks) != -(-end // self._block_tokens) or len(set(chunk.blocks)) != len(chunk.blocks):
            raise KvMismatch(f"the block table of {chunk.request_id} does not cover {end} tokens exactly")
        for position, token in enumerate(chunk.tokens, start=chunk.start):
            cell = self._cell(chunk, position)
            self._cells[cell] = (position, token, self._digest(chunk))
            self._poisoned.discard(cell)

    def _read(self, chunk: Chunk) -> list[int]:
        """All tokens of the request so far, from the memory, checked against what is known of it."""
        digest = self._digest(chunk)
        tokens: list[int] = []
        for position in range(chunk.start + len(chunk.tokens)):
            where = self._cell(chunk, position)
            if where in self._poisoned:
                raise KvMismatch(f"{chunk.request_id} finds NaN at position {position}")
            cell = self._cells.get(where)
            if cell is None or cell[0] != position or cell[2] != digest:
                raise KvMismatch(f"{chunk.request_id} finds {cell} at position {position} under {digest}")
            tokens.append(cell[1])
        known = self._known.setdefault(chunk.request_id, tokens)
        shared = min(len(known), len(tokens))
        if known[:shared] != tokens[:shared]:
            raise KvMismatch(f"{chunk.request_id} is not what it was")
        if chunk.history is not None and list(chunk.history) != tokens[: chunk.start]:
            raise KvMismatch(f"the history of {chunk.request_id} is not what its KV holds")
        self._known[chunk.request_id] = max(known, tokens, key=len)
        return tokens

    def _cell(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.blocks[position // self._block_tokens], position % self._block_tokens
