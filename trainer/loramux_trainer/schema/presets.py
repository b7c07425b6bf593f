"""Named shapes of an adapter: values of the lora section that a job gets by one word. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What PEFT adapts by default, on every architecture that calls it one of these: the query and value maps, or the one
# map that has both.
QUERY_AND_VALUE = r"(.*\.)?(q_proj|v_proj|qkv_proj|c_attn|query_key_value|Wqkv)"

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "classic-qv-r8": {"target_modules": QUERY_AND_VALUE, "rank": 8, "alpha": 16.0},
    "full-r16": {"target_modules": "all-linear", "rank": 16, "alpha": 32.0},
    "max-r256": {"target_modules": "all-linear", "rank": 256, "alpha": 512.0},
}
"""Name -> values of the lora section; what a job gives beside it wins."""
