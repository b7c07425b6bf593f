"""What this server accepts of one request, as GetModel shows it and refusals name it. Knows no wire format."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loramux_adapters.spec import AdapterSpec
from loramux_server.engine.limits import fit_tokens


@dataclass(frozen=True)
class ServerLimits:
    """Counts, tokens and bytes. All but `original_context_tokens` (of a LongRoPE base) are set."""

    context_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queued: int
    kv_tokens: int
    max_rank: int
    max_adapter_bytes: int
    adapter_device_bytes: int
    vocabulary: int
    max_choices: int
    max_logprobs: int
    max_stop_strings: int
    original_context_tokens: int | None = None

    def of(self, adapter: AdapterSpec | None) -> ServerLimits:
        """Those of a request for an adapter, which may know other tokens than the base."""
        return replace(self, vocabulary=adapter.vocabulary) if adapter is not None and adapter.vocabulary else self

    def fit_tokens(self, prompt: int, max_tokens: int | None) -> int:
        """How many tokens may follow a prompt of `prompt` positions; see `engine.limits.fit_tokens`."""
        return fit_tokens(
            prompt,
            max_tokens,
            kv_tokens=self.kv_tokens,
            context_tokens=self.context_tokens,
            original_context_tokens=self.original_context_tokens,
        )
