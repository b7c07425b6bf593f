"""Adapter files made to hurt: weights that lie and configs that trap, each with what a refusal must name."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from support.tiny_adapters import CONFIG, WEIGHTS, tiny_files

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
_SLOW = r"(?:a|[a-z_.0-9]|.)+[!%]"


@dataclass(frozen=True)
class Hostile:
    """Files, the subject that the refusal names (a part of it), and whether 50 milliseconds must be enough."""

    case: str
    files: dict[str, bytes]
    subject: str
    quick: bool = True


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of `header` (bytes, or an object to be written as JSON) that claims to be `length` long."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class _Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


def renamed(trace: Path) -> Iterator[Hostile]:
    """Row 28: other formats under the name of safetensors. `trace` appears if one is ever unpickled."""
    bomb = pickle.dumps(_Bomb(trace))
    torch.save({FIRST: torch.zeros(4, 256)}, archive := trace.with_suffix(".zip"))
    for case, data in (
        ("pickle", bomb),
        ("old pickle", pickle.dumps(_Bomb(trace), protocol=0)),
        ("torch.save", archive.read_bytes()),
        ("zip", b"PK\x03\x04" + b"x" * 5000),
        ("gguf", b"GGUF\x03\0\0\0" + b"\0" * 5000),
        ("hdf5", b"\x89HDF\r\n\x1a\n" + b"\0" * 5000),
        ("git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ("html", b"<!DOCTYPE html><html>404</html>"),
        ("empty", b""),
    ):
        yield Hostile(case, {**tiny_files(1), WEIGHTS: data}, WEIGHTS)
    archive.unlink()


def lying_headers() -> Iterator[Hostile]:
    """Rows 29 and 30: headers that lie about themselves or about the data."""
    good = tiny_files(1)[WEIGHTS]
    size = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    span = len(data)

    def changed(**fields: Any) -> bytes:
        return safetensors(header | {FIRST: header[FIRST] | fields}, data)

    one, two = _entry([1], 0, 4), _entry([1], 8, 12)
    cases: dict[str, tuple[bytes, str]] = {
        "length of 2^63": (safetensors(b"{}", length=1 << 63), WEIGHTS),
        "length of 200 MB": (safetensors(b"{}", length=200_000_000), WEIGHTS),
        "length of the file": (safetensors(b"{}", length=10), WEIGHTS),
        "truncated header": (good[: size // 2], WEIGHTS),
        "truncated data": (good[:-10], WEIGHTS),
        "not JSON": (safetensors(b"{" + b"x" * 1000), WEIGHTS),
        "no object": (safetensors(b"[1]"), WEIGHTS),
        "deep": (safetensors(b'{"t":' + b"[" * 100_000), WEIGHTS),
        "shape overflow": (changed(shape=[1 << 40, 1 << 40]), FIRST),
        "shape that wraps to fit": (safetensors({"t": _entry([1 << 32, 1 << 32], 0, 0)}), "'t'"),
        "negative size": (changed(shape=[-4, -256]), FIRST),
        "negative offset": (changed(data_offsets=[-4, 4092]), FIRST),
        "offsets beyond the file": (changed(data_offsets=[span, span + 4096]), WEIGHTS),
        "overlap": (safetensors({"t": one, "u": one}, b"\0" * 4), "'u'"),
        "hole": (safetensors({"t": one, "u": two}, b"\0" * 12), "'u'"),
        "trailing bytes": (good + b"\0", WEIGHTS),
        "unknown dtype": (changed(dtype="F33"), FIRST),
        "integers": (changed(dtype="I32"), FIRST),
    }
    for case, (weights, subject) in cases.items():
        yield Hostile(case, {**tiny_files(1), WEIGHTS: weights}, subject)


def accepted_by_the_library() -> Iterator[Hostile]:
    """Row 31: what safetensors itself reads without complaint."""
    entry = json.dumps(_entry([1], 0, 4))
    twice = f'{{"{FIRST}": {entry}, "{FIRST}": {entry}}}'.encode()
    yield Hostile("duplicate keys", {**tiny_files(1), WEIGHTS: safetensors(twice, b"\0" * 4)}, WEIGHTS)
    for case, value in (("NaN", float("nan")), ("infinity", float("-inf"))):
        tensors = load(tiny_files(1)[WEIGHTS])
        tensors[FIRST][1, 2] = value
        yield Hostile(case, {**tiny_files(1), WEIGHTS: save(tensors)}, FIRST)
    for case, names, padding in (("88 MB header of 330,000 tensors", 330_000, 190), ("15 MB of names", 140_000, 30)):
        names_of = (f'"{"x" * padding}{index:06}":{_zero_sized}' for index in range(names))
        header = ("{" + ",".join(names_of) + "}").encode()
        yield Hostile(case, {**tiny_files(1), WEIGHTS: safetensors(header)}, WEIGHTS, quick=False)
    # As many as are allowed, and none of them part of an adapter: this one is parsed.
    header = ("{" + ",".join(f'"{"x" * 100}{index:06}":{_zero_sized}' for index in range(65_000)) + "}").encode()
    yield Hostile("65,000 tensors", {**tiny_files(1), WEIGHTS: safetensors(header)}, "xxx", quick=False)


_zero_sized = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def configs() -> Iterator[Hostile]:
    """Row 32: configs that would run code, allocate, or never end."""
    good = json.loads(tiny_files(1)[CONFIG])
    regexes: dict[str, Any] = {
        "target_modules": {"target_modules": _SLOW, "layers_to_transform": None},
        "exclude_modules": {"exclude_modules": _SLOW},
        "layers_pattern": {"layers_pattern": [_SLOW], "layers_to_transform": [0]},
        "rank_pattern": {"rank_pattern": {_SLOW: 4}},
        "alpha_pattern": {"alpha_pattern": {_SLOW: 4}},
    }
    for field, change in regexes.items():
        yield _config(f"regex in {field}", good | change, field)
    yield _config("auto_map", good | {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map")
    yield _config("auto_mapping is not read", good | {"auto_mapping": {"x": 1}, "r": 0}, "r")
    yield _config("huge r", good | {"r": 1 << 62}, "r")
    yield _config("negative r", good | {"r": -1}, "r")
    yield _config("alpha infinite", good | {"lora_alpha": 1e999}, CONFIG)
    yield _raw("alpha NaN", b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN, "target_modules": ["q_proj"]}', CONFIG)
    yield _raw("deep nesting", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, CONFIG)
    yield _raw("no JSON", b"{", CONFIG)
    yield _raw("many digits", b'{"r": ' + b"9" * 100_000 + b"}", CONFIG)
    yield _raw("100 MB", b'{"a": "' + b"x" * 100_000_000 + b'"}', CONFIG)


def _config(case: str, values: dict[str, Any], subject: str) -> Hostile:
    return _raw(case, json.dumps(values).encode(), subject)


def _raw(case: str, config: bytes, subject: str) -> Hostile:
    return Hostile(case, {**tiny_files(1), CONFIG: config}, subject)


def foreign(fingerprint: str) -> Iterator[Hostile]:
    """Row 12: well-formed adapters of something else. `fingerprint` is that of the base served."""
    files = tiny_files(1)
    config, tensors = json.loads(files[CONFIG]), load(files[WEIGHTS])
    b_name = FIRST.replace("lora_A", "lora_B")

    def with_tensors(**changed: torch.Tensor) -> bytes:
        return save(tensors | changed)

    def made(values: dict[str, Any], weights: bytes = files[WEIGHTS]) -> dict[str, bytes]:
        return {CONFIG: json.dumps(values).encode(), WEIGHTS: weights}

    other = f"{int(fingerprint, 16) ^ 1:064x}"
    rank = {name: torch.zeros(600, 256) if "lora_A" in name else torch.zeros(256, 600) for name in tensors}
    cases = {
        "another base, declared": (
            made(config, save(tensors, metadata={"loramux_base_fingerprint": other})), "loramux_base_fingerprint",
        ),
        "another width": (made(config, with_tensors(**{FIRST: torch.zeros(4, 512)})), FIRST),
        "another B": (made(config, with_tensors(**{b_name: torch.zeros(128, 4)})), b_name),
        "rank over the limit": (made(config | {"r": 600}, save(rank)), FIRST),
        "another rank than it says": (made(config | {"r": 5}), FIRST),
        "unknown targets": (made(config | {"target_modules": ["nowhere"]}), "target_modules"),
        "a layer too many": (
            made(config, with_tensors(**{FIRST.replace("layers.0", "layers.9"): torch.zeros(4, 256)})), "layers.9",
        ),
        "a module without tensors": (made(config | {"target_modules": ["q_proj", "v_proj"]}), "v_proj"),
        "another method": (made(config | {"peft_type": "XLORA"}), "peft_type"),
        "DoRA": (made(config | {"use_dora": True}), "q_proj"),
    }  # fmt: skip
    for case, (contents, subject) in cases.items():
        yield Hostile(case, contents, subject)
