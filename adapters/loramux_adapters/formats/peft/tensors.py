"""What each tensor of a PEFT file is, by its name and shape alone: no data is read here.

A name is `base_model.model.<module>.<suffix>`. PEFT leaves out in silence what it cannot place; here every
tensor has exactly one place, and every selected module has its tensors, or the file is refused. Torch-free, and knows
no method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.tuner import Shape, Targets, Tuner
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_header import ITEM_BYTES, TensorEntry
from loramux_adapters.spec import BaseModelSpec, ModuleKind, ModuleSpec

BIAS, BASE_WEIGHT = "bias", "base_weight"
"""Roles that every method's files may have."""

PREFIX = "base_model.model."
_KINDS: tuple[ModuleKind, ...] = ("linear", "conv1d", "embedding", "norm")
# PEFT wraps a target, which moves its own parameters under base_layer.
_WRAPPED_SUFFIXES = {BIAS: ".base_layer.bias", BASE_WEIGHT: ".base_layer.weight"}
_PLAIN_SUFFIXES = {BIAS: ".bias", BASE_WEIGHT: ".weight"}
# Parts of names that a wrapped model's state dict has and PEFT does not know -> what wraps.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
_OUTER_WRAPPER = "module"  # DistributedDataParallel and DeepSpeed, around the whole model


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the file and the one place it has. `module` is empty where all modules share it."""

    module: str
    role: str
    entry: TensorEntry

    @property
    def canonical_name(self) -> str:
        """Its name in the digest, whatever the format calls it."""
        return f"{self.module}:{self.role}"


def place_tensors(
    entries: Iterable[TensorEntry], tuner: Tuner, targets: Targets, base: BaseModelSpec, limits: ReadLimits
) -> list[PlacedTensor]:
    """Assign every tensor to a role in a module of the base, or in all of them.

    Raises AdapterInvalid or AdapterIncompatible, naming the tensor, when one has no place, a module lacks one,
    or a shape or rank does not fit.
    """
    suffixes, own = _all_suffixes(tuner), _own_names(targets)
    placed = [_place(entry, tuner, suffixes, own, targets, base) for entry in entries]
    places: set[str] = set()
    for tensor in placed:
        if tensor.canonical_name in places:
            raise _invalid(tensor.entry, "another tensor of the file has its place")
        places.add(tensor.canonical_name)
        _check_dtype(tensor, tuner)
        if not tuner.may_be_empty:
            _check_not_empty(tensor.entry)
    _check_biases(placed, tuner, targets, base)
    _check_shapes(placed, tuner, targets, base, limits)
    return placed


def tensor_name(module: str, role: str, tuner: Tuner, targets: Targets, base: BaseModelSpec) -> str:
    """What a file calls the tensor of a role; `module` is empty where all modules share it."""
    if not module:
        return _shared_names(tuner, targets)[role]
    target = targets.modules.get(module)
    own = None if target is None else (target.own_suffixes or {}).get(role)
    suffix = own or _expected_suffix(role, base.modules[module], tuner, is_target=target is not None)
    return f"{PREFIX}{module}{suffix}"


def _all_suffixes(tuner: Tuner) -> list[tuple[str, str]]:
    """(suffix, role), longest first, so that `.weight` does not claim what a longer suffix means."""
    tables = [*(tuner.suffixes(kind) for kind in _KINDS), _WRAPPED_SUFFIXES, _PLAIN_SUFFIXES]
    return sorted(
        {(suffix, role) for table in tables for role, suffix in table.items()}, key=lambda item: (-len(item[0]), item)
    )


def _own_names(targets: Targets) -> dict[str, tuple[str, str]]:
    """Name in the file -> (module, role), of targets whose tensors the method does not name."""
    return {
        f"{PREFIX}{name}{suffix}": (name, role)
        for name, target in targets.modules.items()
        for role, suffix in (target.own_suffixes or {}).items()
    }


def _place(
    entry: TensorEntry,
    tuner: Tuner,
    suffixes: list[tuple[str, str]],
    own: Mapping[str, tuple[str, str]],
    targets: Targets,
    base: BaseModelSpec,
) -> PlacedTensor:
    _refuse_wrapped(entry)
    if entry.name in own:
        module_name, role = own[entry.name]
        return PlacedTensor(module_name, role, entry)
    for role, shared in _shared_names(tuner, targets).items():
        if entry.name == shared:
            return PlacedTensor("", role, entry)
    if not entry.name.startswith(PREFIX):
        raise _invalid(entry, f"its name does not begin with {PREFIX}, so PEFT would not load it")
    rest = entry.name.removeprefix(PREFIX)
    suffix, role = next(((suffix, role) for suffix, role in suffixes if rest.endswith(suffix)), ("", ""))
    name = rest.removesuffix(suffix)
    if not role or tuner.marker in name:
        raise _invalid(entry, f"it is no part of {_a(tuner)} adapter that PEFT would load")
    module = base.modules.get(name)
    if module is None:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: {base.architecture} base {quote(base.model_id)} "
            f"has no module {quote(name)}",
            subject=_subject(entry),
            remedy="upload an adapter made for this base",
        )
    is_target = name in targets.modules
    if role not in _PLAIN_SUFFIXES and not is_target:
        raise _invalid(entry, f"adapter_config.json does not select module {quote(name)}")
    expected = _expected_suffix(role, module, tuner, is_target=is_target)
    if suffix != expected:
        raise _invalid(entry, f"PEFT would look for {quote(expected)} instead")
    if role == BASE_WEIGHT and name not in (base.embedding, base.head):
        raise _invalid(entry, "a weight of the base itself is accepted for the embedding and the head only")
    return PlacedTensor(name, role, entry)


def _shared_names(tuner: Tuner, targets: Targets) -> dict[str, str]:
    return {**tuner.shared_names, **targets.shared_names}


def _a(tuner: Tuner) -> str:
    if tuner.kind == "lora":
        return "a LoRA"
    return f"{'an' if tuner.kind[0] in 'aeiou' else 'a'} {tuner.kind}"


def _expected_suffix(role: str, module: ModuleSpec, tuner: Tuner, *, is_target: bool) -> str | None:
    if role in _PLAIN_SUFFIXES:
        return (_WRAPPED_SUFFIXES if is_target else _PLAIN_SUFFIXES)[role]
    return tuner.suffixes(module.kind).get(role)


def _refuse_wrapped(entry: TensorEntry) -> None:
    parts = entry.name.split(".")
    wrapper = next((part for part in parts if part in _WRAPPERS), None)
    if wrapper is None and parts[0] == _OUTER_WRAPPER:
        wrapper = _OUTER_WRAPPER
    if wrapper is not None:
        what = _WRAPPERS.get(wrapper, "DistributedDataParallel or DeepSpeed")
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: {wrapper!r} in its name is a wrapper of {what}, which was "
            "saved with the model",
            subject=_subject(entry),
            remedy="save the unwrapped model (accelerator.unwrap_model(model).save_pretrained(DIRECTORY)), or remove "
            f"{wrapper + '.'!r} from the names of the file's tensors",
        )


def _check_dtype(tensor: PlacedTensor, tuner: Tuner) -> None:
    """Whether it is a tensor of numbers where numbers are meant. Positions may be numbers: Windows saves them so."""
    if tensor.role not in tuner.index_roles and tensor.entry.dtype not in ITEM_BYTES:
        raise _invalid(tensor.entry, f"dtype {quote(tensor.entry.dtype)} is not F32, F16 or BF16")


def _check_not_empty(entry: TensorEntry) -> None:
    if 0 in entry.shape:
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)} is empty (shape {list(entry.shape)}): it was saved while "
            "DeepSpeed ZeRO-3 or FSDP had its values elsewhere",
            subject=_subject(entry),
            remedy="gather the weights when saving: save_pretrained(DIRECTORY, "
            "state_dict=accelerator.get_state_dict(model)); ZeRO-3 needs stage3_gather_16bit_weights_on_model_save",
        )


def _check_biases(placed: list[PlacedTensor], tuner: Tuner, targets: Targets, base: BaseModelSpec) -> None:
    biased: set[str] = set()
    if tuner.bias != "none":
        names = base.modules if tuner.bias == "all" else targets.modules
        whole = {name for name, target in targets.modules.items() if "whole_bias" in (target.own_suffixes or {})}
        biased = {name for name in names if base.modules[name].has_bias and name not in whole}
    present = set()
    for tensor in placed:
        if tensor.role == BIAS:
            present.add(tensor.module)
            if tensor.module not in biased:
                raise _invalid(tensor.entry, f"adapter_config.json has bias {quote(tuner.bias)}")
            _check_shape(tensor.entry, (base.modules[tensor.module].out_features,), tuner)
    for name in sorted(biased - present):
        raise _missing(name, f"has bias {quote(tuner.bias)}, but the module's bias is missing")


def _check_shapes(
    placed: list[PlacedTensor], tuner: Tuner, targets: Targets, base: BaseModelSpec, limits: ReadLimits
) -> None:
    found: dict[str, dict[str, TensorEntry]] = {"": {}}
    for tensor in placed:
        if tensor.role not in _PLAIN_SUFFIXES:
            found.setdefault(tensor.module, {})[tensor.role] = tensor.entry
    for role, shape in targets.shared.items():
        if role not in found[""]:
            raise _missing("", f"needs {quote(_shared_names(tuner, targets)[role])}, which is missing")
        _check_shape(found[""][role], shape, tuner)
    for name, target in targets.modules.items():
        entries = found.get(name, {})
        shapes_found = {role: entry.shape for role, entry in entries.items()}
        expected = target.shapes(shapes_found)
        for role in expected:
            if role not in entries:
                suffixes = target.own_suffixes or tuner.suffixes(base.modules[name].kind)
                what = suffixes[role][1:].removesuffix(".weight")
                raise _missing(name, f"selects the module, but its {what} is missing")
        if entries:
            _check_rank(next(iter(entries.values())), target.rank(shapes_found), limits)
        for role, entry in entries.items():
            if role not in expected:
                raise _invalid(entry, "adapter_config.json does not ask for it")
            _check_shape(entry, expected[role], tuner)


def _check_rank(entry: TensorEntry, rank: int, limits: ReadLimits) -> None:
    if rank > limits.max_rank:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: rank {rank} is over this server's limit of {limits.max_rank}",
            subject=_subject(entry),
            remedy="train with a smaller rank",
        )


def _check_shape(entry: TensorEntry, expected: Shape, tuner: Tuner) -> None:
    if entry.shape != expected:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: shape {list(entry.shape)} should be {list(expected)}",
            subject=_subject(entry),
            remedy=f"check {tuner.shape_keys}, or upload an adapter made for this base",
        )


def _subject(entry: TensorEntry) -> str:
    return f"{WEIGHTS_FILE}: {quote(entry.name)}"


def _invalid(entry: TensorEntry, why: str) -> AdapterError:
    return AdapterInvalid(
        f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: {why}",
        subject=_subject(entry),
        remedy="save the adapter again with PEFT's save_pretrained",
    )


def _missing(module: str, why: str) -> AdapterError:
    where = f"module {quote(module)}" if module else "the adapter"
    return AdapterInvalid(
        f"{WEIGHTS_FILE}: {where}: adapter_config.json {why}",
        subject=f"{WEIGHTS_FILE}: {quote(module)}" if module else WEIGHTS_FILE,
        remedy="save config and weights together",
    )
