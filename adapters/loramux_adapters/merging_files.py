"""Directories of LoRAs with weights -> one directory that PEFT loads, without a base and without a server.

The sum is that of `combine`, from which a server makes a request for several adapters: exact, ranks add. It is then
left so, or brought to a rank by singular values.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.adapter_files import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    INITIAL_FILE,
    MAX_FILE_BYTES,
    TEXT_FILES,
    WEIGHTS_FILE,
)
from loramux_adapters.combination import Term, combine_specs
from loramux_adapters.combining import combine
from loramux_adapters.compressing import compress, patterns
from loramux_adapters.errors import AdapterConflict, AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats import registry, strict_json
from loramux_adapters.formats.adapterhub.config import is_adapterhub
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.extras import NO_EXTRAS
from loramux_adapters.formats.peft.lora import EMBEDDING_SUFFIXES, LINEAR_SUFFIXES, LoraTuner
from loramux_adapters.formats.peft.own_base import read_own_base
from loramux_adapters.formats.peft.tensors import PREFIX
from loramux_adapters.formats.peft.writer import write_files
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.spec import BaseModelSpec, ModuleSpec
from loramux_adapters.weights import AdapterWeights

_ROUNDING = 1e-9
"""A share of the base's bias that is left where weights such as 0.1 and 0.9 come to 1."""

_LEFT_BESIDE = {"README.md", "training_args.bin"}  # what PEFT and trl write beside an adapter


@dataclass(frozen=True)
class Merged:
    """What was written."""

    modules: int
    ranks: tuple[int, ...]  # distinct, ascending
    base_fingerprint: str | None  # where all declare the same
    energy_kept: float | None = None  # of the module that lost most, where ranks were cut; from 0 to 1
    worst_module: str | None = None


@dataclass(frozen=True, eq=False)
class _Source:
    directory: Path
    weight: float
    files: Mapping[str, Path]
    config: Mapping[str, object]
    tuner: LoraTuner
    base: BaseModelSpec
    tables: Mapping[str, torch.Tensor]
    weights: AdapterWeights


def merge_files(
    sources: Sequence[tuple[Path, float]],
    out: Path,
    limits: ReadLimits,
    *,
    rank: int | None = None,
    force: bool = False,
) -> Merged:
    """Write the sum of adapters with weights to `out`, at once or not at all; each at most of `rank` if it is given.

    Raises AdapterInvalid and AdapterIncompatible, naming the directory that cannot be part of a sum; AdapterConflict
    where `out` is there and `force` is not given or it holds something else; ValueError for a weight that is none and
    without adapters; and OSError.
    """
    if not sources:
        raise ValueError("there is no adapter to merge")
    out = Path(os.path.abspath(out))  # a link stays a link
    _check_out(out, force=force)
    read = [_read(directory, weight, limits) for directory, weight in sources]
    fingerprint = _common_fingerprint(read)
    base, tables = _common_base(read)
    combine_specs([Term(each.weights.spec, each.weight, str(each.directory)) for each in read])  # refuses by name
    low_ranks, biases = _sum(read, base)
    kept: dict[str, float] = {}
    if rank is not None:
        for name, part in low_ranks.items():
            low_ranks[name], kept[name] = _cut(part, rank)
    _check_ranks(low_ranks, limits)
    config = _config(read, low_ranks, biases)
    tensors = _tensors(base, low_ranks, biases, config) | {
        f"{PREFIX}{name}{'.base_layer' if name in low_ranks else ''}.weight": table for name, table in tables.items()
    }
    texts = next((each.files for each in read if each.weights.spec.text_files), {})
    with _appearing(out, force=force) as partial:
        write_files(partial, config, tensors, fingerprint)
        for name in TEXT_FILES:
            if name in texts:
                shutil.copyfile(texts[name], partial / name)
        _read(partial, 1.0, limits)
    worst = min(kept, key=lambda name: kept[name]) if kept else None
    ranks = tuple(sorted({part.rank for part in low_ranks.values()}))
    return Merged(len(low_ranks), ranks, fingerprint, None if worst is None else kept[worst], worst)


def _read(directory: Path, weight: float, limits: ReadLimits) -> _Source:
    files = {
        name: directory / name for name in MAX_FILE_BYTES if name != CERTIFICATE_FILE and (directory / name).is_file()
    }
    try:
        if CONFIG_FILE not in files:
            raise AdapterInvalid(f"{CONFIG_FILE} is missing", remedy="name directories that save_pretrained wrote")
        config = strict_json.read_object(files[CONFIG_FILE], CONFIG_FILE, limits.max_config_bytes)
        tuner = _lora(config, files)
        if WEIGHTS_FILE not in files:
            raise AdapterInvalid(f"{WEIGHTS_FILE} is missing", remedy="name directories that save_pretrained wrote")
        base, tables = read_own_base(files[WEIGHTS_FILE], limits)
        weights = registry.read(files, base, limits, allow_base_mismatch=True)
    except AdapterError as error:
        raise type(error)(f"{directory}: {error.message}", subject=error.subject, remedy=error.remedy) from None
    return _Source(directory, weight, files, config, tuner, base, tables, weights)


def _lora(config: Mapping[str, object], files: Mapping[str, Path]) -> LoraTuner:
    """Raises AdapterIncompatible, with the reason, for what has no exact sum in a file of a LoRA."""
    if is_adapterhub(config):
        raise _no_sum("a bottleneck is no low rank of a weight")
    tuner = registry.parse_config(config)
    if not isinstance(tuner, LoraTuner):
        if tuner.virtual_tokens:
            raise _no_sum(f"{tuner.kind} stands before the prompt, where a LoRA's file holds nothing")
        raise _no_sum(f"what {tuner.kind} changes is not in a LoRA's file as it is")
    if tuner.use_dora:
        raise _no_sum("the magnitudes of DoRA scale the sum of the base's weight and its own low rank")
    if tuner.moved_by or INITIAL_FILE in files:
        raise AdapterIncompatible(
            f"{tuner.moved_by or 'its initialization'} took its initial values from the base, so that its low rank "
            "belongs to another one",
            remedy="save it as a LoRA of the base: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    if tuner.extras != NO_EXTRAS:
        raise _no_sum("modules_to_save and trainable_token_indices hold whole weights, which add only to the base's")
    return tuner


def _no_sum(why: str) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"it has no exact sum as a file: {why}",
        remedy="a server may sum it in a request, adapters={NAME: WEIGHT, ...}",
    )


def _common_fingerprint(read: Sequence[_Source]) -> str | None:
    """What all declare; None where one declares nothing."""
    declared = {each.weights.spec.base_fingerprint: each.directory for each in read}
    known = {fingerprint: directory for fingerprint, directory in declared.items() if fingerprint is not None}
    if len(known) > 1:
        (one, first), (other, second) = list(known.items())[:2]
        raise AdapterIncompatible(
            f"{first} was trained on base {one[:12]} and {second} on {other[:12]}",
            subject=str(second),
            remedy="merge adapters of one base",
        )
    return next(iter(known)) if None not in declared and known else None


def _common_base(read: Sequence[_Source]) -> tuple[BaseModelSpec, dict[str, torch.Tensor]]:
    """The modules of all, and the base's own tables that any of them holds."""
    modules: dict[str, tuple[ModuleSpec, Path]] = {}
    tables: dict[str, tuple[torch.Tensor, Path]] = {}
    for each in read:
        for name in each.weights.spec.ranks.keys() | each.weights.spec.biases:
            module = each.base.modules[name]
            known, directory = modules.setdefault(name, (module, each.directory))
            has_same_in = known.in_features == module.in_features or "norm" in (known.kind, module.kind)
            if known.out_features != module.out_features or not has_same_in:
                raise AdapterIncompatible(
                    f"{name} maps {known.in_features} to {known.out_features} in {directory} and {module.in_features} "
                    f"to {module.out_features} in {each.directory}",
                    subject=name,
                    remedy="merge adapters of one base",
                )
            if name in each.weights.spec.ranks:
                modules[name] = (module, each.directory)
        for name, table in each.tables.items():
            other, directory = tables.setdefault(name, (table, each.directory))
            if not torch.equal(other, table):
                raise AdapterIncompatible(
                    f"the base's own weight of {name} in {each.directory} is not that in {directory}",
                    subject=name,
                    remedy="merge adapters of one base, saved with save_embedding_layers=False",
                )
    base = replace(read[0].base, embedding=None, head=None, modules={name: each for name, (each, _) in modules.items()})
    return base, {name: table for name, (table, _) in tables.items()}


def _sum(read: Sequence[_Source], base: BaseModelSpec) -> tuple[dict[str, LowRank], dict[str, Bias]]:
    """By module. Raises AdapterIncompatible where a bias needs the base's own."""
    low_ranks, biases = {}, {}
    for name, module in combine([(each.weights, each.weight) for each in read], base).modules.items():
        for part in module.parts:
            match part:
                case LowRank(on_input=False):
                    low_ranks[name] = part
                case Bias():
                    biases[name] = _whole_or_delta(name, part, read)
                case _:
                    raise AdapterIncompatible(
                        f"{name}: {type(part).__name__} is no part of a LoRA's file", subject=name
                    )
    shares = {bias.base_share for bias in biases.values()}
    if len(shares) > 1:
        raise AdapterIncompatible(
            "one of the adapters has lora_bias and another bias, which one file cannot have",
            subject=CONFIG_FILE,
            remedy="merge those of one form",
        )
    return low_ranks, biases


def _whole_or_delta(name: str, part: Bias, read: Sequence[_Source]) -> Bias:
    """With a share of the base's bias that is exactly 0 or 1."""
    share = round(part.base_share)
    if share not in (0, 1) or abs(part.base_share - share) > _ROUNDING:
        having = [f"{each.directory}={each.weight:g}" for each in read if name in each.weights.spec.biases]
        raise AdapterIncompatible(
            f"{' and '.join(having)}: its file holds the whole bias of {name}, of which a part needs the base's own",
            subject=name,
            remedy="give those with a bias weights that come to 1",
        )
    return Bias(part.value, float(share))


def _cut(part: LowRank, rank: int) -> tuple[LowRank, float]:
    """In float64, as the energy that is lost is small beside all."""
    if part.rank <= rank:
        return part, 1.0
    a, b, kept = compress(part.a.double(), part.b.double(), rank)
    return LowRank(a.float(), b.float()), kept


def _check_ranks(low_ranks: Mapping[str, LowRank], limits: ReadLimits) -> None:
    for name, part in low_ranks.items():
        if part.rank > limits.max_rank:
            raise AdapterIncompatible(
                f"{name}: the ranks come to {part.rank}, over the limit of {limits.max_rank}",
                subject=name,
                remedy=f"cut them with --combination svd --rank {limits.max_rank} or less",
            )


def _config(read: Sequence[_Source], low_ranks: Mapping[str, LowRank], biases: Mapping[str, Bias]) -> dict[str, Any]:
    """Scales are 1: they are in B."""
    whole = any(bias.base_share == 0.0 for bias in biases.values())
    ranks = {name: part.rank for name, part in low_ranks.items()}
    return {
        "peft_type": "LORA",
        **{key: _common(read, key) for key in ("base_model_name_or_path", "revision", "task_type")},
        **patterns(ranks, dict.fromkeys(ranks, 1.0), {}),
        "target_modules": sorted(low_ranks),
        "alora_invocation_tokens": list(read[0].tuner.invocation) or None,
        "bias": _bias_key(read, low_ranks) if whole else "none",
        "fan_in_fan_out": any(each.config.get("fan_in_fan_out") is True for each in read),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": bool(biases) and not whole,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def _common(read: Sequence[_Source], key: str) -> object:
    """What all configs say; None where they differ."""
    first = read[0].config.get(key)
    return first if all(each.config.get(key) == first for each in read) else None


def _bias_key(read: Sequence[_Source], low_ranks: Mapping[str, LowRank]) -> str:
    """`all`, or `lora_only`, which asks for the bias of every target, unknown where no file holds it."""
    if any(each.tuner.bias == "all" for each in read):
        return "all"
    known = {name for each in read if each.tuner.bias == "lora_only" for name in each.weights.spec.ranks}
    for each in read:
        for name in each.weights.spec.ranks:
            if name not in known:
                raise AdapterIncompatible(
                    f"{each.directory}: it adapts {name}, whose bias the file would need: another has bias lora_only",
                    subject=name,
                    remedy="merge adapters of the same bias key or the same modules",
                )
    return "lora_only"


def _tensors(
    base: BaseModelSpec, low_ranks: Mapping[str, LowRank], biases: Mapping[str, Bias], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, part in low_ranks.items():
        module = base.modules[name]
        suffixes = EMBEDDING_SUFFIXES if module.kind == "embedding" else LINEAR_SUFFIXES
        tensors[f"{PREFIX}{name}{suffixes['a']}"] = part.a.contiguous()
        tensors[f"{PREFIX}{name}{suffixes['b']}"] = part.b.contiguous()
        if config["lora_bias"] and module.kind != "embedding":
            delta = biases[name].value if name in biases else torch.zeros(module.out_features)
            tensors[f"{PREFIX}{name}.lora_B.bias"] = delta
    if not config["lora_bias"]:
        for name, bias in biases.items():
            tensors[f"{PREFIX}{name}{'.base_layer' if name in low_ranks else ''}.bias"] = bias.value
    return tensors


def _check_out(out: Path, *, force: bool) -> None:
    """Raises AdapterConflict where `out` may not be written, or replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise AdapterConflict(f"{out} exists", subject=str(out), remedy="choose another directory, or --force")
    if out.is_symlink() or not out.is_dir():
        raise AdapterConflict(f"{out} is not a directory", subject=str(out), remedy="choose another")
    foreign = sorted({path.name for path in out.iterdir()} - {*MAX_FILE_BYTES, *_LEFT_BESIDE})
    if foreign:
        raise AdapterConflict(
            f"{out} holds {foreign[0]}, which is no file of an adapter and would be lost",
            subject=str(out),
            remedy="choose another directory",
        )


@contextmanager
def _appearing(out: Path, *, force: bool) -> Iterator[Path]:
    """A directory beside `out` that takes its place when all is written, and is removed when that fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, former = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("partial", "former"))
    partial.mkdir()
    try:
        yield partial
        _check_out(out, force=force)
        if out.exists():
            out.rename(former)
        try:
            partial.rename(out)
        except OSError:
            if former.exists():
                former.rename(out)
            raise
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
