"""A directory of AdapterHub's package with a bottleneck adapter -> AdapterWeights.

Config, header, tensor names and shapes, declared base, and only then the tensors' data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.adapter_files import ADAPTERHUB_SAVE, CONFIG_FILE
from loramux_adapters.adapter_files import ADAPTERHUB_WEIGHTS_FILE as WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.adapterhub.config import HubConfig, bad_key, parse
from loramux_adapters.formats.adapterhub.interface import read_interface
from loramux_adapters.formats.declared_base import declared_fingerprint, is_other_base, read_declarations
from loramux_adapters.formats.digest import AdapterDigest
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.formats.safetensors_header import TensorEntry
from loramux_adapters.parts.bottleneck import Bottleneck, BottleneckForm, Source
from loramux_adapters.spec import AdapterSpec, BaseModelSpec
from loramux_adapters.sublayers import Place, Sublayer, sublayers
from loramux_adapters.weights import AdapterWeights, ModuleWeights

Shape = tuple[int, ...]
Roles = Mapping[str, torch.Tensor]

_MODULES: Mapping[Place, str] = {"attention": "attention_adapters", "mlp": "output_adapters"}


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor that the adapter has. `is_copy`: the package keeps the same one under another name."""

    sublayer: str
    role: str
    shape: Shape
    is_copy: bool = False

    @property
    def canonical_name(self) -> str:
        """Its name in the digest."""
        return f"{self.sublayer}:{self.role}"


def read_adapterhub(
    files: Mapping[str, Path],
    raw: Mapping[str, object],
    base: BaseModelSpec,
    limits: ReadLimits,
    *,
    allow_base_mismatch: bool,
) -> AdapterWeights:
    """Read the adapter whose adapter_config.json is `raw`.

    Raises AdapterInvalid or AdapterIncompatible, naming file, tensor or key, and OSError when the disk fails.
    """
    config = parse(raw)
    config.check(base, read_interface(files, base, limits))
    wanted = expected_tensors(config, base)
    declarations = read_declarations(files, limits)
    with SafetensorsFile(files[WEIGHTS_FILE], WEIGHTS_FILE, limits) as file:
        placed = _place(file.header.tensors.values(), wanted, base)
        declared = declared_fingerprint(file.header.metadata, WEIGHTS_FILE, declarations)
        mismatch = is_other_base(declared, base, allow=allow_base_mismatch)
        read, digest = _read_tensors(file, placed)
    modules = {name: ModuleWeights((bottleneck_of(tensors, config),)) for name, tensors in read.items()}
    spec = AdapterSpec(
        digest=digest.finish(_arithmetic(_form(config), config)),
        kind="bottleneck",
        base_fingerprint=declared,
        base_mismatch=mismatch,
        ranks={},
        biases=frozenset(),
        nbytes=sum(entry.nbytes for entry, _ in placed),
        others=frozenset(modules),
    )
    return AdapterWeights(spec, modules)


def expected_tensors(config: HubConfig, base: BaseModelSpec) -> dict[str, ExpectedTensor]:
    """Every tensor of the file, by its name with the base's prefix. Raises AdapterInvalid."""
    return {name: expected for each in _selected(config, base) for name, expected in _tensors_of(each, config)}


def _selected(config: HubConfig, base: BaseModelSpec) -> list[Sublayer]:
    found = [each for each in sublayers(base) if each.place in config.places and each.layer not in config.left_out]
    if not found:
        raise bad_key("leave_out", "leaves no layer of the base", "upload an adapter made for this base")
    return found


def _tensors_of(sublayer: Sublayer, config: HubConfig) -> Iterator[tuple[str, ExpectedTensor]]:
    """(name in the file, what it is) of every tensor at one sub-layer; names with the base's prefix."""
    prefix = f"{sublayer.layer_name}.{_MODULES[sublayer.place]}.adapters.{config.name}."
    width, k = config.hidden_size, config.width(sublayer.layer)
    norm: dict[str, Shape] = {"weight": (width,), "bias": (width,)}
    modules: dict[str, tuple[str, dict[str, Shape]]] = {
        f"adapter_down.{int(config.ln_before)}": ("down", {"weight": (k, width), "bias": (k,)}),
        "adapter_up": ("up", {"weight": (width, k), "bias": (width,)}),
    }
    if config.ln_before:
        modules["adapter_norm_before"] = ("norm_before", norm)
    if config.ln_after:
        modules["adapter_norm_after"] = ("norm_after", norm)
    for name, (role, shapes) in modules.items():
        for leaf, shape in shapes.items():
            yield f"{prefix}{name}.{leaf}", ExpectedTensor(sublayer.name, f"{role}.{leaf}", shape)
    if config.ln_before:
        for leaf, shape in norm.items():
            yield (
                f"{prefix}adapter_down.0.{leaf}",
                ExpectedTensor(sublayer.name, f"norm_before.{leaf}", shape, is_copy=True),
            )
    if not isinstance(config.scaling, float):
        yield (
            f"{prefix}scaling",
            ExpectedTensor(sublayer.name, "scaling", (1 if config.scaling == "learned" else width,)),
        )


def _place(
    entries: Iterable[TensorEntry], wanted: Mapping[str, ExpectedTensor], base: BaseModelSpec
) -> list[tuple[TensorEntry, ExpectedTensor]]:
    """Every tensor of the file in the order of the digest, copies behind what they are copies of.

    Raises AdapterInvalid or AdapterIncompatible when one has no place, is missing, or has another shape.
    """
    placed: dict[str, tuple[TensorEntry, ExpectedTensor]] = {}
    for entry in entries:
        name = _with_prefix(entry.name, wanted)
        expected = wanted.get(name)
        if expected is None:
            raise _invalid(entry, f"it is no tensor of a bottleneck that {CONFIG_FILE} asks for")
        if name in placed:
            raise _invalid(entry, "it is in the file twice, with the base's prefix and without")
        if entry.shape != expected.shape:
            raise AdapterIncompatible(
                f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: shape {list(entry.shape)} should be "
                f"{list(expected.shape)}",
                subject=f"{WEIGHTS_FILE}: {quote(entry.name)}",
                remedy=f"check reduction_factor of {CONFIG_FILE}, or upload an adapter made for this base",
            )
        placed[name] = (entry, expected)
    present = {expected.canonical_name for _, expected in placed.values()}
    for name, expected in wanted.items():
        if expected.canonical_name not in present:
            raise AdapterInvalid(
                f"{WEIGHTS_FILE}: tensor {quote(name)} is missing",
                subject=f"{WEIGHTS_FILE}: {quote(name)}",
                remedy=f"upload config and weights of one adapter made for this {base.architecture} base, saved "
                f"together with {ADAPTERHUB_SAVE}",
            )
    return sorted(placed.values(), key=lambda item: (item[1].canonical_name, item[1].is_copy))


def _with_prefix(name: str, wanted: Mapping[str, ExpectedTensor]) -> str:
    """The package saves a bare model's names without what the model with a head calls it, and reads both."""
    head = next(iter(wanted)).partition(".")[0]
    return name if name in wanted else f"{head}.{name}"


def _read_tensors(
    file: SafetensorsFile, placed: list[tuple[TensorEntry, ExpectedTensor]]
) -> tuple[dict[str, dict[str, torch.Tensor]], AdapterDigest]:
    digest = AdapterDigest()
    read: dict[str, dict[str, torch.Tensor]] = {}
    last = ""
    for entry, expected in placed:
        data = file.read_bytes(entry)
        values = file.decode(entry, data)
        own = read.setdefault(expected.sublayer, {})
        if expected.canonical_name == last:
            if not torch.equal(values, own[expected.role]):
                raise _invalid(entry, "it differs from adapter_norm_before, whose copy it is")
            continue
        last = expected.canonical_name
        digest.add_tensor(last, entry.dtype, entry.shape, data)
        own[expected.role] = values
    return read, digest


def _form(config: HubConfig) -> BottleneckForm:
    """What `pre_forward`, `forward` and `post_forward` of the package's adapters make of these layers, whose norms are
    before a sub-layer: it finds none behind it, and adds the residual where it would apply one.
    """
    reads: Source = "output"
    if config.is_parallel:
        reads = "residual"
    elif config.original_ln_before:
        reads = "sum"
    with_residual = reads == "sum" and not config.residual_before_ln
    if with_residual and not config.residual_in_norm and not config.original_ln_after:
        # The adapter adds the residual in place of the layer: once, as the layer does.
        return BottleneckForm(config.activation, reads)
    return BottleneckForm(
        config.activation,
        reads,
        shortcut="sum" if with_residual else "output",
        shortcut_in_norm=config.residual_in_norm,
        keeps_residual=config.original_ln_after,
    )


def bottleneck_of(tensors: Roles, config: HubConfig) -> Bottleneck:
    """What the tensors of one sub-layer, by role, come to. Raises AdapterInvalid where that is not finite."""
    form, up = _form(config), tensors["up.weight"].float()
    scale = tensors["scaling"].float() if "scaling" in tensors else up.new_tensor([float(config.scaling)])
    up, up_bias = up * scale[:, None], tensors["up.bias"].float() * scale
    if not bool(up.isfinite().all() and up_bias.isfinite().all()):
        raise bad_key("scaling", "it makes adapter_up infinite", "train with a smaller scaling")
    return Bottleneck(
        form,
        tensors["down.weight"].float(),
        tensors["down.bias"].float(),
        up,
        up_bias,
        _norm(tensors, "norm_before"),
        _norm(tensors, "norm_after"),
    )


def _norm(tensors: Roles, role: str) -> torch.Tensor | None:
    if f"{role}.weight" not in tensors:
        return None
    return torch.stack([tensors[f"{role}.weight"].float(), tensors[f"{role}.bias"].float()])


def _arithmetic(form: BottleneckForm, config: HubConfig) -> dict[str, Any]:
    """What is not in the names and shapes of tensors."""
    scale = config.scaling.hex() if isinstance(config.scaling, float) else "1"
    return {"kind": "bottleneck", "scale": scale, **vars(form)}


def _invalid(entry: TensorEntry, why: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: {why}",
        subject=f"{WEIGHTS_FILE}: {quote(entry.name)}",
        remedy=f"save the adapter again with {ADAPTERHUB_SAVE}",
    )
