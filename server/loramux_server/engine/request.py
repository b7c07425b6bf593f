"""One choice of a submission while it lives: its tokens, its KV blocks, its lease, its times.

A plain record. Only the scheduler and the parts it is made of change it; nobody else sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from loramux_adapters.spec import virtual_token_ids
from loramux_server.engine.blocks import active_hash, root_hash
from loramux_server.engine.leases import Lease
from loramux_server.requests import FinishReason, SamplingParams, Submission, TokenLogprob, Usage


class State(Enum):
    """Where a request is. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Request:
    """See the module. `order` is what it is served by: priority, then arrival, then choice; lower is earlier."""

    key: str  # the chunk's request_id: unique for ever, as a request's own id is not
    ticket: int
    choice: int
    order: tuple[int, int, int]
    submission: Submission
    params: SamplingParams
    arrived: float
    tokens: list[int]  # prompt, then output
    prompt_length: int  # with the virtual tokens
    long_rope: bool = False  # see EngineLimits.uses_long_rope
    leader: Request | None = None  # the choice whose prompt blocks this one waits for

    state: State = State.WAITING
    computed: int = 0  # tokens whose KV is written
    validated: int = 0  # of these, when a token was last drawn from finite logits
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # root, then one for each full block so far
    active_root: bytes = b""  # joins the chain at the block of `active_from`, where that is not 0
    published: int = 0  # blocks already offered to the prefix cache
    table: tuple[int, ...] = ()  # `blocks` as the runner last got them
    lease: Lease | None = None
    entered: bool = False  # has had a chunk since its last admission
    seen_by_runner: bool = False
    skips: int = 0
    preemptions: int = 0
    cached: int = 0  # prompt tokens found in the prefix cache at first admission
    admitted_at: float | None = None
    last_token_at: float | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None: not asked for, or already told

    @property
    def digest(self) -> str | None:
        """The adapter's content, or None for the base."""
        return self.submission.digest

    @property
    def active_from(self) -> int:
        """The first position at which the adapter acts; 0 where it is everywhere."""
        submission = self.submission
        return submission.virtual_tokens + submission.active_from if submission.active_from else 0

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is not written yet; 1 for a request that decodes."""
        return len(self.tokens) - self.computed

    @property
    def produced(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        virtual = self.submission.virtual_tokens
        return Usage(self.prompt_length - virtual, len(self.tokens) - self.prompt_length, max(0, self.cached - virtual))

    @property
    def is_held(self) -> bool:
        """Whether the first choice is still writing the prompt's KV, which this one will share."""
        leader = self.leader
        return leader is not None and leader.state is not State.ENDED and leader.produced == 0

    def find_end(self) -> tuple[FinishReason, int | None] | None:
        """Whether the last token ends the request: the reason and, for STOP, the token. None to go on."""
        stop, token, produced = self.submission.stop, self.tokens[-1], self.produced
        if produced > stop.min_tokens and (
            token in stop.stop_token_ids or (not stop.ignore_eos and token in stop.eos_token_ids)
        ):
            return FinishReason.STOP, token
        if produced >= self.submission.max_tokens:
            return FinishReason.LENGTH, None
        return None


def expand(ticket: int, submission: Submission, arrived: float, *, long_rope: bool = False) -> Iterator[Request]:
    """The choices of a submission, in order. Prompt log-probabilities are told by the first alone."""
    tenant, salt, digest = submission.tenant, submission.cache_salt, submission.digest
    root = root_hash(tenant, salt, digest, long_rope=long_rope)
    active_root = b""
    if submission.active_from:
        # What is before it is the base's, and found by those who use the base.
        active_root = active_hash(root, submission.virtual_tokens + submission.active_from)
        root = root_hash(tenant, salt, None, long_rope=long_rope)
    tokens = (*virtual_token_ids(submission.virtual_tokens), *submission.prompt)
    leader: Request | None = None
    for choice in range(submission.n):
        asked = submission.sampling.prompt_logprobs if choice == 0 else None
        request = Request(
            key=f"{ticket}:{submission.request_id}#{choice}",
            ticket=ticket,
            choice=choice,
            order=(submission.priority, ticket, choice),
            submission=submission,
            params=replace(submission.sampling, choice=choice, prompt_logprobs=asked),
            arrived=arrived,
            tokens=list(tokens),
            prompt_length=len(tokens),
            long_rope=long_rope,
            leader=leader,
            hashes=[root],
            active_root=active_root,
            prompt_logprobs=None if asked is None else [],
        )
        leader = leader or request
        yield request
