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
    of it (or the rest of the prompt), whoever else runs: a request is cut the same way alone and in company.
    """

    kv_blocks: int
    block_tokens: int = 16
    max_batch_tokens: int = 2048
    max_running: int = 64
    max_queued: int = 512
    max_overtakes: int = 16  # later requests with adapters that may pass one whose adapter is not ready
    max_loads_tried: int = 32  # distinct adapters not ready that one step asks the pool for
    prefix_cache: bool = True
    deterministic: bool = False
    prefill_chunk: int = 256
    original_context: int | None = None  # of a longrope base: longer requests use its long factors throughout

    def __post_init__(self) -> None:
        lows = dict.fromkeys(("kv_blocks", "block_tokens", "max_running", "max_loads_tried", "prefill_chunk"), 1)
        for name, low in (lows | {"max_queued": 0, "max_overtakes": 0}).items():
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
        return len(submission.prompt) + submission.stop.max_tokens - 1 > self.original_context

    def check_fits(self, submission: Submission) -> None:
        """Raise InvalidRequest, with the limit in its metadata, for what could never run even alone."""
        if not submission.prompt:
            raise InvalidRequest("input", "the prompt has no tokens")
        # The KV of the last token is never needed: nothing follows it.
        needed = len(submission.prompt) + max(submission.stop.max_tokens - 1, 0)
        if needed > self.kv_tokens:
            field = "input" if len(submission.prompt) > self.kv_tokens else "stopping.max_tokens"
            raise InvalidRequest(
                field,
                f"{len(submission.prompt)} prompt tokens and {submission.stop.max_tokens} new ones"
                f" do not fit the KV cache of {self.kv_tokens} tokens",
                metadata={"kv_cache_tokens": str(self.kv_tokens)},
            )
        if submission.n > self.max_live:
            raise InvalidRequest(
                "sampling.n",
                f"{submission.n} choices are more than the {self.max_live} this server runs and queues",
                metadata={"max_live_choices": str(self.max_live)},
            )
