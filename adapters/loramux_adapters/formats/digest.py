"""An adapter's identity: sha256 over its tensors as uploaded and the arithmetic its config asks for.

Torch-free. Every field is preceded by its length, so that no two contents share one byte stream.
How a config was spelled is not in it: key order, list order, defaults, and keys that change no number.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

# The project's former name stays: other bytes here would give every adapter another identity.
_VERSION = b"lorica-adapter-v1"
_TEXT_VERSION = "loramux-text-v1"


class AdapterDigest:
    """Fed with tensors by ascending canonical name, then finished once."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._last = ""
        self._field(_VERSION)

    def add_tensor(self, name: str, dtype: str, shape: Sequence[int], data: bytes | bytearray) -> None:
        """Add one tensor: canonical `name`, safetensors `dtype`, raw little-endian `data` as it was uploaded.

        Raises ValueError when `name` does not come after the one before.
        """
        if name <= self._last:
            raise ValueError(f"tensor {name!r} must come after {self._last!r}")
        self._last = name
        self._field(b"tensor")
        self._field(name.encode())
        self._field(dtype.encode())
        self._field(struct.pack(f"<{len(shape)}Q", *shape))
        self._field(data)

    def finish(self, config: Mapping[str, Any]) -> str:
        """64 hex digits, over the tensors so far and the normalized arithmetic `config`."""
        self._field(b"config")
        self._field(json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
        return self._hash.hexdigest()

    def _field(self, data: bytes | bytearray) -> None:
        self._hash.update(struct.pack("<Q", len(data)))
        self._hash.update(data)


def digest_with_text(digest: str, text_files: Sequence[tuple[str, str]]) -> str:
    """The identity of an adapter that also says what texts mean: `text_files` are (name, sha256), sorted."""
    content = json.dumps([_TEXT_VERSION, digest, *text_files], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def low_rank_config(scales: Mapping[str, float]) -> dict[str, Any]:
    """The normalized config of a low-rank adapter: the factor on B A, per module.

    Ranks, targets and biases are in the tensors' names and shapes already. Two spellings of one scale
    (alpha 16 over rank 8; rank-stabilized 4 over sqrt 4) are one arithmetic and one digest.
    """
    return {"kind": "lora", "scales": {module: scale.hex() for module, scale in scales.items()}}
