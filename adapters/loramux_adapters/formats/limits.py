"""What reading an adapter may cost, before anybody has said that the adapter is good.

Torch-free. Every bound is checked before the thing it bounds is allocated or evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_RANK: Final = 512
"""The largest rank that is trained, and served where the operator sets no other limit."""


@dataclass(frozen=True)
class ReadLimits:
    """Bounds on one adapter's files. Bytes, counts, and seconds of processor time."""

    max_rank: int = MAX_RANK
    max_bytes: int = 1 << 30  # of adapter_model.safetensors
    max_config_bytes: int = 1 << 20  # of each JSON file
    max_header_bytes: int = 16 << 20  # of the safetensors header
    max_tensors: int = 65_536
    max_added_tokens: int = 65_536  # beyond the base's vocabulary: every token drawn reads their logits
    # Of one adapter, or what takes as long: some 15 s on one core. No default of PEFT's takes more on 8B.
    max_multiply_adds: int = 1 << 39
    max_canonical_bytes: int = 8 << 30  # of host memory: what the file becomes, and what that takes on the way
    max_pattern_chars: int = 2_000  # of one regular expression
    # All pattern fields of one adapter together: compiling and matching. A refusal must fit in 50 ms with the rest.
    regex_seconds: float = 0.03
