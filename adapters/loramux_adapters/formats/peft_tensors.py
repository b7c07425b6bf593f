"""What each tensor of a PEFT file is, by its name and shape alone: no data is read here.

A name is `base_model.model.<module>.<suffix>`. PEFT leaves out in silence what it cannot place; here every
tensor has exactly one place, and every selected module has its tensors, or the file is refused. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_header import TensorEntry
from loramux_adapters.formats.targets import Target
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

Part = Literal["a", "b", "bias", "base_weight"]

PREFIX = "base_model.model."
LINEAR_SUFFIXES: dict[Part, str] = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
EMBEDDING_SUFFIXES: dict[Part, str] = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
# PEFT wraps a target, which moves its own parameters under base_layer.
_WRAPPED_SUFFIXES: dict[Part, str] = {"bias": ".base_layer.bias", "base_weight": ".base_layer.weight"}
_PLAIN_SUFFIXES: dict[Part, str] = {"bias": ".bias", "base_weight": ".weight"}
# Longest first, so that `.weight` does not claim what a longer suffix means.
_SUFFIXES = sorted(
    {
        (suffix, part)
        for table in (LINEAR_SUFFIXES, EMBEDDING_SUFFIXES, _WRAPPED_SUFFIXES, _PLAIN_SUFFIXES)
        for part, suffix in table.items()
    },
    key=lambda item: -len(item[0]),
)
_LOW_RANK: tuple[Part, Part] = ("a", "b")
# Parts of names that a wrapped model's state dict has and PEFT does not know -> what wraps.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
_OUTER_WRAPPER = "module"  # DistributedDataParallel and DeepSpeed, around the whole model


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the file and the one place it has."""

    module: str
    part: Part
    entry: TensorEntry

    @property
    def canonical_name(self) -> str:
        """Its name in the digest, whatever the format calls it."""
        return f"{self.module}:{self.part}"


def place_tensors(
    entries: Iterable[TensorEntry],
    targets: Mapping[str, Target],
    bias_mode: str,
    base: BaseModelSpec,
    limits: ReadLimits,
) -> list[PlacedTensor]:
    """Assign every tensor to a part of a module of the base.

    Raises AdapterInvalid or AdapterIncompatible, naming the tensor, when one has no place, a module lacks one,
    or a shape or rank does not fit.
    """
    placed = [_place(entry, targets, base) for entry in entries]
    _check_complete(placed, targets, bias_mode, base)
    for tensor in placed:
        _check_shape(tensor, base.modules[tensor.module], targets.get(tensor.module), limits)
    return placed


def _place(entry: TensorEntry, targets: Mapping[str, Target], base: BaseModelSpec) -> PlacedTensor:
    _refuse_wrapped(entry)
    if not entry.name.startswith(PREFIX):
        raise _invalid(entry, f"its name does not begin with {PREFIX}, so PEFT would not load it")
    rest = entry.name.removeprefix(PREFIX)
    suffix, part = next(((suffix, part) for suffix, part in _SUFFIXES if rest.endswith(suffix)), ("", None))
    name = rest.removesuffix(suffix)
    if part is None or ".lora_" in name:
        raise _invalid(entry, "it is no part of a LoRA adapter that PEFT would load")
    module = base.modules.get(name)
    if module is None:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: {base.architecture} base {quote(base.model_id)} "
            f"has no module {quote(name)}",
            subject=_subject(entry),
            remedy="upload an adapter made for this base",
        )
    if part in _LOW_RANK and name not in targets:
        raise _invalid(entry, f"adapter_config.json does not select module {quote(name)}")
    if suffix != _expected_suffix(part, module, name in targets):
        raise _invalid(entry, f"PEFT would look for {quote(_expected_suffix(part, module, name in targets))} instead")
    if part == "base_weight" and name not in (base.embedding, base.head):
        raise _invalid(entry, "a weight of the base itself is accepted for the embedding and the head only")
    return PlacedTensor(name, part, entry)


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


def _expected_suffix(part: Part, module: ModuleSpec, is_target: bool) -> str:
    if part in _LOW_RANK:
        return (EMBEDDING_SUFFIXES if module.kind == "embedding" else LINEAR_SUFFIXES)[part]
    return (_WRAPPED_SUFFIXES if is_target else _PLAIN_SUFFIXES)[part]


def _biased_modules(mode: str, targets: Mapping[str, Target], base: BaseModelSpec) -> set[str]:
    if mode == "none":
        return set()
    names = targets if mode == "lora_only" else base.modules
    return {name for name in names if base.modules[name].has_bias}


def _check_complete(
    placed: list[PlacedTensor], targets: Mapping[str, Target], bias_mode: str, base: BaseModelSpec
) -> None:
    present = {(tensor.module, tensor.part) for tensor in placed}
    for name in targets:
        for part in _LOW_RANK:
            if (name, part) not in present:
                raise _missing(name, f"selects the module, but its lora_{part.upper()} is missing")
    biased = _biased_modules(bias_mode, targets, base)
    for tensor in placed:
        if tensor.part == "bias" and tensor.module not in biased:
            raise _invalid(tensor.entry, f"adapter_config.json has bias {quote(bias_mode)}")
    for name in sorted(biased):
        if (name, "bias") not in present:
            raise _missing(name, f"has bias {quote(bias_mode)}, but the module's bias is missing")


def _check_shape(tensor: PlacedTensor, module: ModuleSpec, target: Target | None, limits: ReadLimits) -> None:
    part, entry = tensor.part, tensor.entry
    if 0 in entry.shape:
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)} is empty (shape {list(entry.shape)}): it was saved while "
            "DeepSpeed ZeRO-3 or FSDP had its values elsewhere",
            subject=_subject(entry),
            remedy="gather the weights when saving: save_pretrained(DIRECTORY, "
            "state_dict=accelerator.get_state_dict(model)); ZeRO-3 needs stage3_gather_16bit_weights_on_model_save",
        )
    expected: tuple[int, ...]
    if part in _LOW_RANK and target is not None:
        if target.rank > limits.max_rank:
            raise AdapterIncompatible(
                f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: rank {target.rank} is over this server's limit of "
                f"{limits.max_rank}",
                subject=_subject(entry),
                remedy="train with a smaller rank",
            )
        expected = (target.rank, module.in_features) if part == "a" else (module.out_features, target.rank)
    elif part == "base_weight":  # compared with the base's own, shape and all, when it is read
        return
    else:
        expected = (module.out_features,)
    if entry.shape != expected:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)}: shape {list(entry.shape)} should be {list(expected)}",
            subject=_subject(entry),
            remedy="check r and rank_pattern, or upload an adapter made for this base",
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
    return AdapterInvalid(
        f"{WEIGHTS_FILE}: module {quote(module)}: adapter_config.json {why}",
        subject=f"{WEIGHTS_FILE}: {quote(module)}",
        remedy="save config and weights together",
    )
