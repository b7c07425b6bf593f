"""Well-formed adapters, changed at random: configs, headers, names, shapes, dtypes, offsets, values, bytes.

Whatever comes of it is read or refused by an AdapterError, in bounded time.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux_adapters.errors import AdapterError
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.spec import BaseModelSpec
from support.adapters import CONFIG, WEIGHTS
from support.timing import processor_seconds

REFUSAL_SECONDS, READ_SECONDS = 0.05, 1.0
"""Of processor time: what a file may cost that is refused, and one that is read (OFT's rotations are computed)."""

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, "", "q_proj", "all",
    "all-linear", ".*", "(((a+)+)+)+$", "\x00", "é" * 50, "../../etc/passwd", "model.layers.0.self_attn.q_proj", [], {},
    [0], [1.5], [[]], ["q_proj", 1], {"q_proj": 4}, {"(a+)+$": 2}, {"q_proj": None}, {"a": {"b": {"c": []}}},
    [2**40] * 3, list(range(64)), "lora_only", "pissa", "bat", "road_4",
)  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "", "f32", 5, None)


@dataclass
class Outcomes:
    """What came of the files so far; `slow` are those that took too long twice."""

    read: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)


class Fuzzer:
    """Changes one adapter of `directories` at a time; the same seed gives the same files."""

    def __init__(self, directories: Mapping[str, Path], base: BaseModelSpec, scratch: Path, seed: int) -> None:
        self._seeds = {name: _Seed.load(path) for name, path in directories.items()}
        self._base, self._scratch = base, scratch
        self._random = random.Random(seed)
        self.outcomes = Outcomes()

    def run(self, rounds: int) -> Outcomes:
        """Reads `rounds` files. Raises whatever is no AdapterError."""
        for _ in range(rounds):
            name = self._random.choice(sorted(self._seeds))
            self._one(name, self._change(self._seeds[name]))
        return self.outcomes

    def _one(self, name: str, files: Mapping[str, bytes]) -> None:
        paths = {}
        for file, data in files.items():
            paths[file] = self._scratch / file
            paths[file].write_bytes(data)
        if self._is_slow(paths, count=True) and self._is_slow(paths, count=False):
            self.outcomes.slow.append(name)

    def _is_slow(self, paths: Mapping[str, Path], *, count: bool) -> bool:
        with processor_seconds() as spent:
            try:
                read(paths, self._base, ReadLimits())
                what = None
            except AdapterError as error:
                what = type(error).__name__
                if not str(error) or len(str(error)) > 2000:
                    raise AssertionError(f"a refusal of {len(str(error))} characters") from error
        if count and what is None:
            self.outcomes.read += 1
        elif count and what is not None:
            self.outcomes.refused[what] = self.outcomes.refused.get(what, 0) + 1
        return spent.seconds > (READ_SECONDS if what is None else REFUSAL_SECONDS)

    def _change(self, seed: _Seed) -> dict[str, bytes]:
        config, header, data = json.loads(json.dumps(seed.config)), json.loads(json.dumps(seed.header)), seed.data
        raw: bytes | None = None
        for _ in range(self._random.choice((1, 1, 1, 2, 5))):
            kind = self._random.randrange(4)
            if kind == 0:
                self._change_config(config)
            elif kind == 1:
                self._change_header(header, len(data))
            elif kind == 2:
                data = self._change_bytes(data)
            else:
                raw = self._change_bytes(json.dumps(config).encode())
        encoded = json.dumps(header).encode()
        if self._random.random() < 0.1:
            encoded = self._change_bytes(encoded)
        length = len(encoded) if self._random.random() > 0.03 else self._random.choice((0, 1, 2**20, 2**40, 2**63))
        weights = struct.pack("<Q", length % 2**64) + encoded + data
        return {CONFIG: json.dumps(config).encode() if raw is None else raw, WEIGHTS: weights}

    def _change_config(self, config: dict[str, Any]) -> None:
        choose = self._random.choice
        key = choose([*config, "peft_type", "r", "target_modules", "a_key_of_later"])
        match self._random.randrange(4):
            case 0:
                config.pop(key, None)
            case 1:
                other = choose(sorted(self._seeds))
                config[key] = choose(list(self._seeds[other].config.values()))
            case _:
                config[key] = choose(_VALUES)

    def _change_header(self, header: dict[str, Any], size: int) -> None:
        choose = self._random.choice
        if not header:
            return
        name = choose(list(header))
        entry = header[name]
        changes: tuple[Callable[[], object], ...] = (
            lambda: header.pop(name),
            lambda: header.update({self._name(name): header.pop(name)}),
            lambda: header.update({self._name(name): entry}),
            lambda: header.update({name: choose(_VALUES)}),
            lambda: header.update({"__metadata__": choose(_VALUES)}),
            lambda: isinstance(entry, dict) and entry.update(dtype=choose(_DTYPES)),
            lambda: isinstance(entry, dict) and entry.update(shape=self._shape(entry.get("shape"))),
            lambda: isinstance(entry, dict) and entry.update(data_offsets=choose((
                [0, 0], [0, size], [size, 0], [-1, 4], [size, size + 4], [0, 2**63], ["0", 4], [0], None,
            ))),
        )  # fmt: skip
        choose(changes)()

    def _shape(self, shape: object) -> object:
        choose = self._random.choice
        if isinstance(shape, list) and shape and self._random.random() < 0.7:
            changed = list(shape)
            changed[self._random.randrange(len(changed))] = choose((0, 1, -1, 3, 2**31, 2**62, 1.5, "4", None))
            return changed if self._random.random() < 0.5 else [*reversed(shape)]
        return choose(([], [1], [2**40, 2**40], [0, 4], [1] * 70, None, "4", [[4]]))

    def _name(self, name: str) -> str:
        parts = name.split(".")
        parts[self._random.randrange(len(parts))] = self._random.choice(
            ("", "q_proj", "99", "lora_A", "é", "\x00", "a" * 500)
        )
        return ".".join(parts)

    def _change_bytes(self, data: bytes) -> bytes:
        if not data:
            return data
        at = self._random.randrange(len(data))
        match self._random.randrange(5):
            case 0:
                return data[:at]
            case 1:
                return data[:at] + bytes([self._random.randrange(256)]) + data[at + 1 :]
            case 2:
                return data[:at] + data[at:][:64] + data[at:]
            case 3:  # a number that is none, at a place of one
                at -= at % 4
                return data[:at] + struct.pack("<f", self._random.choice((math.nan, math.inf, 3e38))) + data[at + 4 :]
            case _:
                return data[:at] + self._random.randbytes(16) + data[at + 16 :]


@dataclass(frozen=True)
class _Seed:
    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes

    @classmethod
    def load(cls, directory: Path) -> _Seed:
        weights = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(weights[:8], "little")
        header = json.loads(weights[8 : 8 + length])
        return cls(json.loads((directory / CONFIG).read_text()), header, weights[8 + length :])
