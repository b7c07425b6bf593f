"""AdapterWeights' way out: a plain PEFT directory that PEFT loads, and that names the base it was made on.

Writes into a directory the caller owns; making it appear at once (a temporary directory and a rename) is the
caller's. Same input, same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.formats.declared_base import FINGERPRINT_KEY
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.lora import EMBEDDING_SUFFIXES, LINEAR_SUFFIXES, LoraTarget, LoraTuner
from loramux_adapters.formats.peft.tensors import PREFIX
from loramux_adapters.spec import BaseModelSpec


@dataclass(frozen=True, eq=False)
class TrainedModule:
    """One module's factors as trained, without the scale, and the alpha that makes it."""

    a: torch.Tensor  # [r, in]; for an embedding [r, vocabulary]
    b: torch.Tensor  # [out, r]
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[0])


def write_peft(
    directory: Path, modules: Mapping[str, TrainedModule], base: BaseModelSpec, *, use_rslora: bool = False
) -> None:
    """Write adapter_config.json and adapter_model.safetensors of `modules`, keyed by the base's module names.

    Raises ValueError for a module the base lacks, factors that do not fit it, or an empty adapter, and AdapterInvalid
    for an alpha that a reader would refuse.
    """
    _check_modules(modules, base)
    config = _config(modules, base, use_rslora)
    tensors = {}
    for name, module in modules.items():
        suffixes = EMBEDDING_SUFFIXES if base.modules[name].kind == "embedding" else LINEAR_SUFFIXES
        tensors[f"{PREFIX}{name}{suffixes['a']}"] = module.a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}{suffixes['b']}"] = module.b.detach().cpu().contiguous()
    write_files(directory, config, tensors, base)


def write_files(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    base: BaseModelSpec,
    *,
    weights_file: str = WEIGHTS_FILE,
) -> None:
    """Write both files, of whatever method, from an adapter_config.json and tensors by their names in the file."""
    directory.mkdir(parents=True, exist_ok=True)
    # One key only: safetensors writes several in an order that changes from call to call.
    save_file(dict(tensors), directory / weights_file, metadata={FINGERPRINT_KEY: base.fingerprint})
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    (directory / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")


def _check_modules(modules: Mapping[str, TrainedModule], base: BaseModelSpec) -> None:
    if not modules:
        raise ValueError("an adapter needs at least one module")
    for name, module in modules.items():
        spec = base.modules.get(name)
        if spec is None:
            raise ValueError(f"the base has no module {name!r}")
        a, b = (module.rank, spec.in_features), (spec.out_features, module.rank)
        if tuple(module.a.shape) != a or tuple(module.b.shape) != b:
            raise ValueError(f"{name}: shapes {tuple(module.a.shape)}, {tuple(module.b.shape)} should be {a}, {b}")


def _config(modules: Mapping[str, TrainedModule], base: BaseModelSpec, use_rslora: bool) -> dict[str, Any]:
    rank, rank_pattern = _pattern({name: module.rank for name, module in modules.items()})
    alpha, alpha_pattern = _pattern({name: module.alpha for name, module in modules.items()})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model_id,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "bias": "none",
        "fan_in_fan_out": all(base.modules[name].kind == "conv1d" for name in modules),
    }
    for targets in (sorted({name.rpartition(".")[2] for name in modules}), sorted(modules)):
        candidate = config | {"target_modules": targets}
        if _means(candidate, modules, base):
            return candidate
    raise ValueError("these modules cannot be told apart by name in a PEFT config")


def _means(config: Mapping[str, Any], modules: Mapping[str, TrainedModule], base: BaseModelSpec) -> bool:
    """Whether a reader of `config` finds exactly `modules`, each with its rank and scale."""
    lora = LoraTuner.parse(config)
    wanted = {
        name: LoraTarget(base.modules[name], module.rank, lora.scale(module.rank, module.alpha))
        for name, module in modules.items()
    }
    return lora.resolve(base, ReadLimits(regex_seconds=60.0)).modules == wanted


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value (the largest of equally common ones), and the others by full name."""
    counts = Counter(values.values())
    common = max(counts, key=lambda value: (counts[value], value))
    return common, {f"^{name}": value for name, value in sorted(values.items()) if value != common}
