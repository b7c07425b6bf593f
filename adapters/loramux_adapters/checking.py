"""What a server would say of an adapter's files, without a server: the same reader, the same costs.

Without a base only what the files alone tell. Knows no command and no store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.adapter_files import CONFIG_FILE, DECLARATION_FILES, WEIGHTS_FILE
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.declared_base import declared_fingerprint
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.residency.slots import ROW_MULTIPLE, SlotTable
from loramux_adapters.weights import AdapterWeights


@dataclass(frozen=True)
class DeviceCost:
    """What an adapter takes of a device: rank rows per linear module at most, and bytes with those beside the rows."""

    rank_rows: int
    nbytes: int
    dtype: str  # of the computation


@dataclass(frozen=True)
class Checked:
    """An adapter that a server with the base `base` accepts."""

    kind: str
    digest: str
    ranks: tuple[int, ...]  # distinct, ascending
    targets: tuple[str, ...]
    modules: int
    vocabulary: int  # token ids it knows, the base's where it has no other
    nbytes: int  # of the tensors
    declared_base: str | None  # fingerprint
    base: str
    base_fingerprint: str
    base_mismatch: bool
    cost: DeviceCost


@dataclass(frozen=True)
class Outline:
    """What the files of an adapter tell without a base: safe to read, and not compared with anything."""

    kind: str
    tensors: int
    nbytes: int
    declared_base: str | None


def check(files: Mapping[str, Path], base: LoadedBase, limits: ReadLimits, *, allow_base_mismatch: bool) -> Checked:
    """Read an adapter as a server with this base would, whose model is injected and of no other use afterwards.

    Raises what an upload is refused with: AdapterInvalid, AdapterIncompatible; and OSError.
    """
    weights = formats.read(files, base.spec, limits, allow_base_mismatch=allow_base_mismatch)
    spec = weights.spec
    return Checked(
        kind=spec.kind,
        digest=spec.digest,
        ranks=tuple(sorted(set(spec.ranks.values()))),
        targets=spec.targets,
        modules=len(weights.modules),
        vocabulary=spec.vocabulary or base.spec.vocab_size,
        nbytes=spec.nbytes,
        declared_base=spec.base_fingerprint,
        base=base.spec.model_id,
        base_fingerprint=base.spec.fingerprint,
        base_mismatch=spec.base_mismatch,
        cost=_cost(weights, base),
    )


def outline(files: Mapping[str, Path], limits: ReadLimits) -> Outline:
    """Check what can be checked of the files alone: JSON, the header, sizes. Raises AdapterInvalid and OSError."""
    config = strict_json.read_object(files[CONFIG_FILE], CONFIG_FILE, limits.max_config_bytes)
    declarations = {
        name: strict_json.read_object(files[name], name, limits.max_config_bytes)
        for name in DECLARATION_FILES
        if name in files
    }
    with SafetensorsFile(files[WEIGHTS_FILE], WEIGHTS_FILE, limits) as file:
        declared = declared_fingerprint(file.header.metadata, WEIGHTS_FILE, declarations)
        entries = file.header.tensors.values()
        return Outline(
            str(config.get("peft_type", "unknown")).lower(), len(entries), sum(e.nbytes for e in entries), declared
        )


def _cost(weights: AdapterWeights, base: LoadedBase) -> DeviceCost:
    # No slot is ever written: one multiple of rows is enough to ask every place what a part costs there.
    adapted = inject(base, capacity=ROW_MULTIPLE)
    ranks, beside = SlotTensors(adapted).cost(weights)
    needs = SlotTable(adapted.linears, ROW_MULTIPLE, 1, 0).needs(ranks)
    modules, size = base.spec.modules, base.compute_dtype.itemsize
    nbytes = sum(rows * (modules[name].in_features + modules[name].out_features) * size for name, rows in needs.items())
    return DeviceCost(max(needs.values(), default=0), nbytes + beside, str(base.compute_dtype).removeprefix("torch."))
