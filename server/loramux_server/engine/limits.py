"""How much the engine takes on at once: one frozen value, checked when it is made.

Knows no device and no model; whoever sized the KV cache says how many blocks it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux_server.errors import InvalidRequest
from loramux_server.requests import Submission


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine. `ValueError` when they contradict each other.

    With `deterministic`, a prefill chunk is always the `prefill_chunk` tokens that start at a multiple
    of it (or the rest of the prompt), whoever else runs: a request is cut the same way alone and among batch mates.
    """

    kv_blocks: int
    block_tokens: int = 16
    max_batch_tokens: int = 2048
    max_running: int = 64
    max_queued: int = 512
    max_skips: int = 16  # later requests with adapters that may pass one whose adapter is not ready
    max_loads_tried: int = 32  # distinct adapters not ready that one step asks the pool for
    prefix_cache: bool = True
    deterministic: bool = False
    prefill_chunk: int = 256
    original_context: int | None = None  # of a longrope base: longer requests use its long factors throughout
    merged_rows: int | None = None  # as many rows of one adapter use its merged weights beside others; None: alone only

    def __post_init__(self) -> None:
        lows = dict.fromkeys(("kv_blocks", "block_tokens", "max_running", "max_loads_tried", "prefill_chunk"), 1)
        for name, low in (lows | {"max_queued": 0, "max_skips": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        # Every running request but one may decode; the one that prefills must still get its chunk.
        chunk = self.prefill_chunk if self.deterministic else 1
        least = self.max_running - 1 + chunk
        if self.max_batch_tokens < least:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} cannot hold {self.max_running - 1} decoding requests"
                f" and a prefill chunk of {chunk}: raise it to {least} or lower max_running"
            )
        if self.deterministic and self.prefill_chunk % self.block_tokens:
            raise ValueError(f"prefill_chunk {self.prefill_chunk} is no multiple of block_tokens {self.block_tokens}")

    @property
    def max_live(self) -> int:
        """Choices running or waiting at once; one more is refused."""
        return self.max_running + self.max_queued

    @property
    def kv_tokens(self) -> int:
        """Tokens the empty KV pool holds."""
        return self.kv_blocks * self.block_tokens

    def uses_long_rope(self, submission: Submission) -> bool:
        """Whether the sequence may become longer than the original context. Decided once for the whole request, as a
        training sequence of that length is computed."""
        if self.original_context is None:
            return False
        return submission.prompt_positions + submission.max_tokens - 1 > self.original_context

    def check_fits(self, submission: Submission) -> None:
        """Raise InvalidRequest, with the limit in its metadata, for what could never run even alone."""
        if not submission.prompt:
            raise InvalidRequest("input", "the prompt has no tokens")
        fit_tokens(submission.prompt_positions, submission.max_tokens, kv_tokens=self.kv_tokens)
        if submission.n > self.max_live:
            raise InvalidRequest(
                "sampling.n",
                f"{submission.n} choices are more than the {self.max_live} this server runs and queues",
                metadata={"max_live_choices": str(self.max_live)},
            )


def fit_tokens(
    prompt: int,
    max_tokens: int | None,
    *,
    kv_tokens: int,
    context_tokens: int | None = None,
    original_context_tokens: int | None = None,
) -> int:
    """How many tokens may follow a prompt of `prompt` tokens: the one judgement of what fits context and KV cache.

    `max_tokens` None means what is left, and on a LongRoPE base no more than its original context where the prompt is
    within it: longer sequences compute by other factors. Raises InvalidRequest, with the limit in its metadata, when
    the prompt leaves no room or `max_tokens` is more than there is.
    """
    # The KV of the last token is never needed, since nothing follows it: a text may have one token more.
    rooms = [("kv_cache_tokens", kv_tokens, kv_tokens + 1, "the whole KV cache")]
    if context_tokens is not None:
        rooms.insert(0, ("context_tokens", context_tokens, context_tokens, "the context"))
    for name, limit, room, what in rooms:
        facts = {name: str(limit), "prompt_tokens": str(prompt)}
        if prompt >= room:
            why = f"the prompt of {prompt} tokens leaves no room in {what} of {limit}"
            raise InvalidRequest("input", why, metadata=facts)
        if max_tokens is not None and prompt + max_tokens > room:
            why = f"{prompt} prompt tokens and {max_tokens} more are over {what} of {limit}"
            raise InvalidRequest("stopping.max_tokens", why, metadata=facts)
    if max_tokens is not None:
        return max_tokens
    room = min(room for _, _, room, _ in rooms)
    original = original_context_tokens
    return (room if original is None or prompt > original else min(room, original + 1)) - prompt
