"""The header of a safetensors file, believed only where it is consistent with the file's size.

Stricter than the library, which takes duplicate names and spends 570 MB on a header of 330,000 tensors.
Torch-free; reads no tensor. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import looks_like, quote

# F64 is left out on purpose: no trainer writes it, and rounding it to float32 would change an adapter in silence.
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Positions and choices, of the few methods whose files hold some.
INTEGER_BYTES = {"U8": 1, "I16": 2, "I32": 4, "I64": 8}

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 1 << 48
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_REMEDY = "save the adapter again with PEFT's save_pretrained"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` is counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors cover the rest of the file exactly once."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, size: int, subject: str, limits: ReadLimits, *, integers: bool = False) -> Header:
    """Read and check the header of `file`, which is `size` bytes long and stands at its beginning.

    Tensors of integers are refused unless `integers`.

    Raises AdapterInvalid naming `subject` and the tensor; AdapterIncompatible when the file is over `max_bytes`.
    """
    if size > limits.max_bytes:
        raise AdapterIncompatible(
            f"{subject} is {size} bytes long, this server takes at most {limits.max_bytes}", subject=subject
        )
    prefix = file.read(64)
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if size <= _LENGTH_BYTES or length > min(limits.max_header_bytes, size - _LENGTH_BYTES):
        raise _not_safetensors(prefix, f"its header claims {length} bytes", subject)
    if not prefix.startswith(b"{", _LENGTH_BYTES):
        raise _not_safetensors(prefix, "its header is not JSON", subject)
    file.seek(_LENGTH_BYTES)
    raw = file.read(length)
    # One count over the bytes is cheap; parsing so many entries is not.
    if raw.count(b'"data_offsets"') > limits.max_tensors:
        raise _too_many(subject, limits)
    entries = strict_json.parse(raw, f"the header of {subject}")
    metadata = _metadata(entries.pop(_METADATA, {}), subject)
    if len(entries) > limits.max_tensors:
        raise _too_many(subject, limits)
    data_start = _LENGTH_BYTES + length
    item_bytes = ITEM_BYTES | (INTEGER_BYTES if integers else {})
    tensors = {name: _entry(name, value, data_start, subject, item_bytes) for name, value in entries.items()}
    _check_cover(tensors, data_start, size, subject)
    return Header(tensors, metadata)


def _metadata(value: object, subject: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise AdapterInvalid(
            f"{subject}: {_METADATA} must hold strings only", subject=f"{subject}: {_METADATA}", remedy=_REMEDY
        )
    if not all(_is_unicode(text) for item in value.items() for text in item):
        raise AdapterInvalid(
            f"{subject}: {_METADATA} holds half a surrogate pair", subject=f"{subject}: {_METADATA}", remedy=_REMEDY
        )
    return value


def _entry(name: str, value: object, data_start: int, subject: str, item_bytes: Mapping[str, int]) -> TensorEntry:
    if not _is_unicode(name):
        raise _bad(subject, name, "its name holds half a surrogate pair")
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise _bad(subject, name, "its entry must hold dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise _bad(subject, name, f"dtype {quote(dtype)} is not F32, F16 or BF16", "cast it before saving")
    if not _is_naturals(shape, _MAX_DIMENSIONS) or any(size > _MAX_DIMENSION for size in shape):
        raise _bad(subject, name, f"shape {quote(shape)} is not a list of at most {_MAX_DIMENSIONS} sizes")
    if not _is_naturals(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(subject, name, f"data_offsets {quote(offsets)} are not a range")
    start, end = offsets
    nbytes = math.prod(shape) * item_bytes[dtype]
    if nbytes != end - start:
        raise _bad(subject, name, f"shape {shape} of {dtype} needs {nbytes} bytes, data_offsets give {end - start}")
    return TensorEntry(name, dtype, tuple(shape), data_start + start, nbytes)


def _check_cover(tensors: Mapping[str, TensorEntry], data_start: int, size: int, subject: str) -> None:
    position = data_start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise _bad(subject, entry.name, f"its data {kind}")
        position += entry.nbytes
        if position > size:
            raise _bad(subject, entry.name, f"its data ends at byte {position}, the file at {size}")
    if position != size:
        raise AdapterInvalid(
            f"{subject} has {size - position} bytes after the last tensor", subject=subject, remedy=_REMEDY
        )


def _is_naturals(value: object, most: int) -> bool:
    """Whether it is a list of at most `most` whole numbers; a longer one is not looked through."""
    # bool is an int to isinstance, and not to the format
    return isinstance(value, list) and len(value) <= most and all(type(item) is int and item >= 0 for item in value)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _bad(subject: str, name: str, what: str, remedy: str = _REMEDY) -> AdapterInvalid:
    return AdapterInvalid(
        f"{subject}: tensor {quote(name)}: {what}", subject=f"{subject}: {quote(name)}", remedy=remedy
    )


def _too_many(subject: str, limits: ReadLimits) -> AdapterError:
    return AdapterInvalid(f"{subject} names more than {limits.max_tensors} tensors", subject=subject, remedy=_REMEDY)


def _not_safetensors(prefix: bytes, why: str, subject: str) -> AdapterInvalid:
    kind = looks_like(prefix)
    seems = f"it looks like {kind}" if kind else why
    return AdapterInvalid(f"{subject} is not a safetensors file: {seems}", subject=subject, remedy=_REMEDY)
