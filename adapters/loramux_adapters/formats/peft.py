"""A PEFT directory of LoRA or rsLoRA -> AdapterWeights. The only order of events, cheapest refusal first:

config, patterns, header, tensor names and shapes, declared base, and only then the tensors' data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, DECLARATION_FILES, WEIGHTS_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.base_weight import check_is_base_weight
from loramux_adapters.formats.declared_base import declared_fingerprint, is_other_base
from loramux_adapters.formats.digest import AdapterDigest, low_rank_config
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft_config import parse_config
from loramux_adapters.formats.peft_tensors import Part, PlacedTensor, place_tensors
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.formats.targets import Targets, resolve_targets
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.spec import AdapterSpec, BaseModelSpec
from loramux_adapters.weights import AdapterWeights, ModuleWeights

Parts = dict[Part, torch.Tensor]


def read_peft(
    files: Mapping[str, Path],
    config: Mapping[str, object],
    base: BaseModelSpec,
    limits: ReadLimits,
    *,
    allow_base_mismatch: bool,
) -> AdapterWeights:
    """Read the adapter whose adapter_config.json was parsed to `config`.

    Raises AdapterInvalid or AdapterIncompatible, naming file, tensor or key, and OSError when the disk fails.
    """
    lora = parse_config(config)
    targets = resolve_targets(lora, base, limits)
    declarations = {
        name: strict_json.read_object(files[name], name, limits.max_config_bytes)
        for name in DECLARATION_FILES
        if name in files
    }
    with SafetensorsFile(files[WEIGHTS_FILE], WEIGHTS_FILE, limits) as file:
        placed = place_tensors(file.header.tensors.values(), targets.modules, lora.bias, base, limits)
        declared = declared_fingerprint(file.header.metadata, WEIGHTS_FILE, declarations)
        mismatch = is_other_base(declared, base, allow=allow_base_mismatch)
        modules, digest = _read_tensors(file, placed, targets, base)
    spec = AdapterSpec(
        digest=digest,
        kind="lora",
        base_fingerprint=declared,
        base_mismatch=mismatch,
        ranks={name: target.rank for name, target in targets.modules.items()},
        biases=frozenset(name for name, module in modules.items() if module.get(Bias) is not None),
        nbytes=sum(tensor.entry.nbytes for tensor in placed),
    )
    return AdapterWeights(spec, modules)


def _read_tensors(
    file: SafetensorsFile, placed: list[PlacedTensor], targets: Targets, base: BaseModelSpec
) -> tuple[dict[str, ModuleWeights], str]:
    """Every tensor once, in canonical order: hashed as uploaded, then checked, then brought to canonical form."""
    digest = AdapterDigest()
    read: dict[str, Parts] = {}
    for tensor in sorted(placed, key=lambda tensor: tensor.canonical_name):
        data = file.read_bytes(tensor.entry)
        digest.add_tensor(tensor.canonical_name, tensor.entry.dtype, tensor.entry.shape, data)
        values = file.decode(tensor.entry, data)
        if tensor.part == "base_weight":
            check_is_base_weight(tensor.module, tensor.entry, values, base)
        else:
            read.setdefault(tensor.module, {})[tensor.part] = values
    if targets.tied_head is not None and base.embedding is not None:
        _check_tied(read, targets.tied_head, base.embedding)
    scales = {name: target.scale for name, target in targets.modules.items()}
    modules = {name: _module_weights(name, parts, scales.get(name, 1.0)) for name, parts in read.items()}
    return modules, digest.finish(low_rank_config(scales))


def _module_weights(name: str, parts: Parts, scale: float) -> ModuleWeights:
    biases = (Bias(parts["bias"].float()),) if "bias" in parts else ()
    if "a" not in parts:
        return ModuleWeights(biases)
    b = parts["b"].float() * scale
    if not bool(torch.isfinite(b).all()):
        raise AdapterInvalid(
            f"{CONFIG_FILE}: scale {scale:g} makes lora_B of module {quote(name)} infinite",
            subject=f"{CONFIG_FILE}: lora_alpha",
            remedy="check lora_alpha and alpha_pattern",
        )
    return ModuleWeights((LowRank(parts["a"], b), *biases))


def _check_tied(read: Mapping[str, Parts], head: str, embedding: str) -> None:
    """A tied adapter is in the file twice and PEFT keeps one, so two different ones have no single meaning."""
    tied, own = read[head], read[embedding]
    if not (torch.equal(tied["a"], own["b"].T) and torch.equal(tied["b"], own["a"].T)):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: ensure_weight_tying is set, but the adapter of {quote(head)} is not that of "
            f"{quote(embedding)}",
            subject=f"{WEIGHTS_FILE}: {quote(head)}",
            remedy="save the adapter without ensure_weight_tying",
        )
