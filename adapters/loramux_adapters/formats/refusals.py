"""How a refusal quotes what a stranger sent, and what a file that is not safetensors looks like.

Knows nothing of adapters. Quoted text is escaped and cut, so that an error stays one short line.
"""

from __future__ import annotations

import reprlib

_QUOTED_CHARS = 120

_SHORT = reprlib.Repr()  # looks at the beginning of a long value only
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _QUOTED_CHARS
_SHORT.maxlevel = 2

_MAGIC = (
    (b"PK\x03\x04", "a zip archive (a PyTorch .bin or .pt file is one)"),
    (b"GGUF", "a GGUF model"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points at"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
    *((b"\x80" + bytes([protocol]), "a Python pickle") for protocol in range(2, 6)),
)


def quote(text: object) -> str:
    """`text` for an error message: escaped, at most 120 characters of it."""
    shown = _SHORT.repr(text)
    return shown if len(shown) <= _QUOTED_CHARS else f"{shown[:_QUOTED_CHARS]}..."


def looks_like(prefix: bytes) -> str:
    """What a file that begins with `prefix` seems to be, `""` when it resembles nothing known."""
    return next((name for magic, name in _MAGIC if prefix.startswith(magic)), "")
