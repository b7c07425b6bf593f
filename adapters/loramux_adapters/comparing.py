"""In what two adapters' files differ: keys of the config, modules, ranks, and tensors by how far they are apart.

Compares what was uploaded, name by name, and knows no base: no module is looked up and no product is formed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loramux_adapters.adapter_files import (
    ADAPTERHUB_WEIGHTS_FILE,
    CONFIG_FILE,
    INITIAL_FILE,
    INTERFACE_FILE,
    TEXT_FILES,
    WEIGHTS_FILE,
)
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import PEFT_METHODS
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.formats.safetensors_header import TensorEntry

_PREFIX = "base_model.model."
# Where a tensor's name stops to be the module's: PEFT names its parameters after the method.
_BEGINNINGS = {tuner.marker.lstrip(".") for tuner in PEFT_METHODS} | {"base_layer.", "token_adapter."}
# Where the name of a module ends and that of its tensor begins, whatever the method calls it.
_PARAMETER = re.compile(rf"\.(?=({'|'.join(map(re.escape, sorted(_BEGINNINGS)))})|(weight|bias)$)")
_RANKED = ".lora_A.weight"
# They say where an adapter comes from or how it was trained.
_BESIDE_ARITHMETIC = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type",
})  # fmt: skip


@dataclass(frozen=True)
class ConfigDifference:
    """A key of adapter_config.json with another value; None where it is left out."""

    key: str
    a: object
    b: object
    is_arithmetic: bool  # whether answers may depend on it


@dataclass(frozen=True)
class ModuleDifference:
    """One module of both: the tensor that differs most, and by how much."""

    module: str
    tensor: str  # its name behind the module's
    relative: float | None  # |a - b| / max(|a|, |b|), Frobenius; None where shapes differ, or one has no such tensor
    largest: float | None  # of the differences of elements

    @property
    def distance(self) -> float:
        """`relative`, and infinite in place of None."""
        return float("inf") if self.relative is None else self.relative


@dataclass(frozen=True)
class Comparison:
    """All that differs; `modules` by falling `distance`, `ranks` by module as (a, b)."""

    config: tuple[ConfigDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    ranks: Mapping[str, tuple[int, int]]
    modules: tuple[ModuleDifference, ...]
    dtypes: tuple[str, ...]  # modules with equal values in another dtype, which is another digest
    files: tuple[str, ...] = ()  # files beside the weights that are part of the digest, and differ or are in one alone

    @property
    def is_same(self) -> bool:
        """Whether tensors and arithmetic are the same, which makes one digest."""
        arithmetic = any(difference.is_arithmetic for difference in self.config)
        differ = self.only_a or self.only_b or self.ranks or self.modules or self.dtypes or self.files
        return not (arithmetic or differ)


def compare(a: Path, b: Path, limits: ReadLimits) -> Comparison:
    """Compare two adapters' directories. One tensor of each is in memory at a time.

    Raises AdapterInvalid where a file is none, or unsafe to read, and OSError.
    """
    config = _compare_configs(*(_read_config(directory, limits) for directory in (a, b)))
    with _open_weights(a, limits) as file_a, _open_weights(b, limits) as file_b:
        in_a, in_b = _by_module(file_a), _by_module(file_b)
        modules, ranks, dtypes = [], {}, []
        for module in sorted(in_a.keys() & in_b.keys()):
            if (rank_a := _rank(in_a[module])) != (rank_b := _rank(in_b[module])):
                ranks[module] = rank_a, rank_b
            worst = max(
                (_compare_tensors(module, name, in_a[module].get(name), in_b[module].get(name), file_a, file_b)
                 for name in sorted(in_a[module].keys() | in_b[module].keys())),
                key=lambda difference: difference.distance,
            )  # fmt: skip
            if worst.distance > 0:
                modules.append(worst)
            elif _dtypes(in_a[module]) != _dtypes(in_b[module]):
                dtypes.append(module)
    return Comparison(
        config,
        tuple(sorted(in_a.keys() - in_b.keys())),
        tuple(sorted(in_b.keys() - in_a.keys())),
        ranks,
        tuple(sorted(modules, key=lambda difference: (-difference.distance, difference.module))),
        tuple(dtypes),
        tuple(name for name in (INITIAL_FILE, INTERFACE_FILE, *TEXT_FILES) if _hash(a / name) != _hash(b / name)),
    )


def _open_weights(directory: Path, limits: ReadLimits) -> SafetensorsFile:
    of_hub = (directory / ADAPTERHUB_WEIGHTS_FILE).exists()
    name = ADAPTERHUB_WEIGHTS_FILE if of_hub else WEIGHTS_FILE
    return SafetensorsFile(directory / name, f"{directory}: {name}", limits)


def _hash(path: Path) -> str | None:
    """None where there is no file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(directory: Path, limits: ReadLimits) -> Mapping[str, object]:
    return strict_json.read_object(directory / CONFIG_FILE, f"{directory}: {CONFIG_FILE}", limits.max_config_bytes)


def _compare_configs(a: Mapping[str, object], b: Mapping[str, object]) -> tuple[ConfigDifference, ...]:
    return tuple(
        ConfigDifference(key, a.get(key), b.get(key), key not in _BESIDE_ARITHMETIC)
        for key in sorted(a.keys() | b.keys())
        if _plain(a.get(key)) != _plain(b.get(key))
    )


def _plain(value: object) -> object:
    """Without what is not arithmetic: the order of a list of names; empty and left out are one."""
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return sorted(value) or None
    return value if value or (value == 0 and value is not False) else None


def _by_module(file: SafetensorsFile) -> dict[str, dict[str, TensorEntry]]:
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in file.header.tensors.items():
        rest = name.removeprefix(_PREFIX)
        split = _PARAMETER.search(rest)
        at = split.start() if split else len(rest)
        found.setdefault(rest[:at], {})[rest[at:]] = entry
    return found


def _rank(tensors: Mapping[str, TensorEntry]) -> int:
    entry = tensors.get(_RANKED)
    return entry.shape[0] if entry is not None and entry.shape else 0


def _dtypes(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    return {name: entry.dtype for name, entry in tensors.items()}


def _compare_tensors(
    module: str,
    name: str,
    a: TensorEntry | None,
    b: TensorEntry | None,
    file_a: SafetensorsFile,
    file_b: SafetensorsFile,
) -> ModuleDifference:
    if a is None or b is None or a.shape != b.shape:
        return ModuleDifference(module, name.removeprefix("."), None, None)
    values_a, values_b = (
        file.decode(entry, file.read_bytes(entry)).to(torch.float64) for file, entry in ((file_a, a), (file_b, b))
    )
    apart = values_a - values_b
    norm = max(values_a.norm().item(), values_b.norm().item())
    relative = apart.norm().item() / norm if norm else 0.0
    largest = apart.abs().max().item() if apart.numel() else 0.0
    return ModuleDifference(module, name.removeprefix("."), relative, largest)
