"""What a server would say of an adapter's files, without a server: the same reader, the same costs.

Without a base only what the files alone tell. Knows no command and no store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.adapter_files import CERTIFICATE_FILE, CONFIG_FILE, DECLARATION_FILES, WEIGHTS_FILE
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.certificate.document import Certificate
from loramux_adapters.certificate.document import parse as parse_certificate
from loramux_adapters.certificate.replay import check_identity
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.declared_base import declared_fingerprint
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.residency.slots import ROW_MULTIPLE, SlotTable
from loramux_adapters.spec import AdapterSpec, BaseModelSpec
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
    certificate: bool  # whether there is one of this adapter and base, which a server replays


@dataclass(frozen=True)
class Outline:
    """What the files of an adapter tell without a base: safe to read, and not compared with anything."""

    kind: str
    tensors: int
    nbytes: int
    declared_base: str | None
    certificate: bool


def check(files: Mapping[str, Path], base: LoadedBase, limits: ReadLimits, *, allow_base_mismatch: bool) -> Checked:
    """Read an adapter as a server with this base would, whose model is injected and of no other use afterwards.

    Raises what an upload is refused with before a replay: AdapterInvalid, AdapterIncompatible, CertificateRefused; and
    OSError.
    """
    weights = formats.read(files, base.spec, limits, allow_base_mismatch=allow_base_mismatch)
    spec = weights.spec
    certificate = _check_certificate(files, spec, base.spec)
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
        certificate=certificate,
    )


def outline(files: Mapping[str, Path], limits: ReadLimits) -> Outline:
    """Check what can be checked of the files alone: JSON, the header, sizes. Raises AdapterInvalid and OSError."""
    config = strict_json.read_object(files[CONFIG_FILE], CONFIG_FILE, limits.max_config_bytes)
    declarations = {
        name: strict_json.read_object(files[name], name, limits.max_config_bytes)
        for name in DECLARATION_FILES
        if name in files
    }
    certificate = _read_certificate(files)
    with SafetensorsFile(files[WEIGHTS_FILE], WEIGHTS_FILE, limits) as file:
        declared = declared_fingerprint(file.header.metadata, WEIGHTS_FILE, declarations)
        entries = file.header.tensors.values()
        return Outline(
            str(config.get("peft_type", "unknown")).lower(),
            len(entries),
            sum(e.nbytes for e in entries),
            declared,
            certificate is not None,
        )


def _read_certificate(files: Mapping[str, Path]) -> Certificate | None:
    return parse_certificate(files[CERTIFICATE_FILE].read_bytes()) if CERTIFICATE_FILE in files else None


def _check_certificate(files: Mapping[str, Path], adapter: AdapterSpec, base: BaseModelSpec) -> bool:
    """All that is judged before a replay but the chat template, which the server knows. Raises CertificateRefused."""
    certificate = _read_certificate(files)
    if certificate is None:
        return False
    room = base.context_length - adapter.virtual_tokens - 1
    check_identity(
        certificate,
        adapter=adapter.digest,
        base=base.fingerprint,
        chat_template=certificate.chat_template,
        vocabulary=base.vocab_size,
        context=room,
        room=room,
    )
    return True


def _cost(weights: AdapterWeights, base: LoadedBase) -> DeviceCost:
    # No slot is ever written: one multiple of rows is enough to ask every place what a part costs there.
    adapted = inject(base, capacity=ROW_MULTIPLE)
    ranks, beside = SlotTensors(adapted).cost(weights)
    needs = SlotTable(adapted.linears, ROW_MULTIPLE, 1, 0).needs(ranks)
    modules, size = base.spec.modules, base.compute_dtype.itemsize
    nbytes = sum(rows * (modules[name].in_features + modules[name].out_features) * size for name, rows in needs.items())
    return DeviceCost(max(needs.values(), default=0), nbytes + beside, str(base.compute_dtype).removeprefix("torch."))
