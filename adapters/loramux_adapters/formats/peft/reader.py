"""A PEFT directory -> AdapterWeights, by whatever method. The only order of events, cheapest refusal first:

config, header, patterns, tensor names and shapes, declared base, and only then the tensors' data. Knows no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.base_weight import check_is_base_weight
from loramux_adapters.formats.declared_base import declared_fingerprint, is_other_base, read_declarations
from loramux_adapters.formats.digest import AdapterDigest
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.extras import tie_token_rows
from loramux_adapters.formats.peft.initial import needs_initial_pair
from loramux_adapters.formats.peft.tensors import BASE_WEIGHT, BIAS, PlacedTensor, place_tensors
from loramux_adapters.formats.peft.tuner import Shape, Targets, Tuner
from loramux_adapters.formats.peft.vocabulary import check_table, find_vocabulary, fit_vocabulary, resized
from loramux_adapters.formats.peft.work import check_work
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import AdapterSpec, BaseModelSpec
from loramux_adapters.weights import AdapterWeights, ModuleWeights

Tensors = dict[str, torch.Tensor]


def read_peft(
    files: Mapping[str, Path],
    tuner: Tuner,
    base: BaseModelSpec,
    limits: ReadLimits,
    *,
    allow_base_mismatch: bool,
) -> AdapterWeights:
    """Read the adapter whose adapter_config.json was parsed to `tuner`.

    Raises AdapterInvalid or AdapterIncompatible, naming file, tensor or key, and OSError when the disk fails.
    """
    declarations = read_declarations(files, limits)
    with SafetensorsFile(files[WEIGHTS_FILE], WEIGHTS_FILE, limits, integers=bool(tuner.index_roles)) as file:
        vocabulary = find_vocabulary(file.header.tensors.values(), tuner.token_ids, base, limits)
        if tuner.invocation and vocabulary != base.vocab_size:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: alora_invocation_tokens of a model with {vocabulary} tokens, the base has "
                f"{base.vocab_size}: before the invocation the base computes, which has no row for them",
                subject=f"{CONFIG_FILE}: alora_invocation_tokens",
                remedy="train without alora_invocation_tokens, or without resize_token_embeddings",
            )
        own = resized(base, vocabulary)  # the base as the adapter knows it
        targets = resolve_targets(tuner, own, limits)
        placed = place_tensors(file.header.tensors.values(), tuner, targets, own, limits)
        _check_work(placed, tuner, targets, own, limits)
        declared = declared_fingerprint(file.header.metadata, WEIGHTS_FILE, declarations)
        has_initial = needs_initial_pair(tuner, files, declared, declarations, base)
        mismatch = is_other_base(declared, base, allow=allow_base_mismatch)
        digest = AdapterDigest()
        tensors, tables = _read_tensors(file, placed, base, digest)
    if has_initial:
        with SafetensorsFile(files[INITIAL_FILE], INITIAL_FILE, limits) as file:
            initial = place_tensors(file.header.tensors.values(), tuner, _without_extras(targets), own, limits)
            pairs, _ = _read_tensors(file, initial, base, digest, prefix="~initial ")
            for name, pair in pairs.items():
                tensors[name] |= {f"initial_{role}": tensor for role, tensor in pair.items() if role in ("a", "b")}
    if targets.tied_head is not None and base.embedding is not None:
        _check_tied(tensors, targets.tied_head, base.embedding)
    modules = _canonical(tensors, tables, targets, own, base)
    _check_ranks(modules, limits)
    spec = AdapterSpec(
        digest=digest.finish(tuner.arithmetic(targets) | tuner.extras.arithmetic(targets.modules)),
        kind=tuner.variant,
        base_fingerprint=declared,
        base_mismatch=mismatch,
        ranks={name: part.rank for name, module in modules.items() if (part := module.get(LowRank)) is not None},
        biases=frozenset(name for name, module in modules.items() if module.get(Bias) is not None),
        nbytes=sum(tensor.entry.nbytes for tensor in placed),
        others=frozenset(name for name, module in modules.items() if _is_other(module)),
        virtual_tokens=tuner.virtual_tokens,
        invocation=tuner.invocation,
        vocabulary=0 if vocabulary == base.vocab_size else vocabulary,
    )
    return AdapterWeights(spec, modules)


def resolve_targets(tuner: Tuner, base: BaseModelSpec, limits: ReadLimits) -> Targets:
    """All that a config selects of `base`, the extras included. Raises AdapterInvalid or AdapterIncompatible."""
    targets = tuner.resolve(base, limits)
    return replace(targets, modules={**targets.modules, **tuner.extras.resolve(base, targets.modules)})


def _check_work(
    placed: list[PlacedTensor], tuner: Tuner, targets: Targets, base: BaseModelSpec, limits: ReadLimits
) -> None:
    shapes: dict[str, dict[str, Shape]] = {}
    names: dict[str, str] = {}
    for tensor in placed:
        shapes.setdefault(tensor.module, {})[tensor.role] = tensor.entry.shape
        names.setdefault(tensor.module, tensor.entry.name)
    works = {name: target.work(shapes.get(name, {})) for name, target in targets.modules.items()}
    check_work(works, names, base.modules, limits, tuner.smaller)


def _is_other(module: ModuleWeights) -> bool:
    return any(not isinstance(part, (LowRank, Bias)) for part in module.parts)


def _without_extras(targets: Targets) -> Targets:
    return replace(targets, modules={name: each for name, each in targets.modules.items() if each.own_suffixes is None})


def _read_tensors(
    file: SafetensorsFile, placed: list[PlacedTensor], base: BaseModelSpec, digest: AdapterDigest, prefix: str = ""
) -> tuple[dict[str, Tensors], Tensors]:
    """Every tensor once, in canonical order, hashed as uploaded. Those that all modules share are under "".

    And resized copies of the base's embedding and head by module; others are only compared with the base's.
    """
    read: dict[str, Tensors] = {"": {}}
    tables: Tensors = {}
    for tensor in sorted(placed, key=lambda tensor: tensor.canonical_name):
        data = file.read_bytes(tensor.entry)
        digest.add_tensor(prefix + tensor.canonical_name, tensor.entry.dtype, tensor.entry.shape, data)
        values = file.decode(tensor.entry, data)
        if tensor.role == BASE_WEIGHT:
            is_end = tensor.module in (base.embedding, base.head)
            if is_end and values.dim() == 2 and len(values) != base.vocab_size:
                check_table(tensor, values, base)
                tables[tensor.module] = values
            else:
                check_is_base_weight(tensor.module, tensor.entry, values, base)
        else:
            read.setdefault(tensor.module, {})[tensor.role] = values
    return read, tables


def _canonical(
    read: dict[str, Tensors], tables: Tensors, targets: Targets, own: BaseModelSpec, base: BaseModelSpec
) -> dict[str, ModuleWeights]:
    modules = canonical_parts(read, targets, own)
    fit_vocabulary(modules, tables, own.vocab_size, base)
    return {name: ModuleWeights(parts) for name, parts in modules.items()}


def canonical_parts(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], targets: Targets, base: BaseModelSpec
) -> dict[str, tuple[Part, ...]]:
    """What tensors, by module and role, come to; those that all modules share are under "".

    Plain operations of torch: what needs gradients gets them through. Raises AdapterInvalid where values mean nothing.
    """
    shared = tensors.get("", {})
    modules: dict[str, tuple[Part, ...]] = {}
    for name in dict.fromkeys([*targets.modules, *(name for name in tensors if name)]):
        own = dict(tensors.get(name, {}))
        bias = own.pop(BIAS, None)
        parts: tuple[Part, ...] = () if bias is None else (Bias(bias.float()),)
        if name in targets.modules:
            parts = (*targets.modules[name].parts({**shared, **own}), *parts)
        modules[name] = parts
    tie_token_rows(modules, base)
    return modules


def _check_ranks(modules: Mapping[str, ModuleWeights], limits: ReadLimits) -> None:
    """Of what came of the tensors: an initial pair doubles a rank."""
    for name, module in modules.items():
        low_rank = module.get(LowRank)
        if low_rank is not None and low_rank.rank > limits.max_rank:
            raise AdapterIncompatible(
                f"{WEIGHTS_FILE}: module {quote(name)}: rank {low_rank.rank}, with the initial pair, is over this "
                f"server's limit of {limits.max_rank}",
                subject=f"{WEIGHTS_FILE}: {quote(name)}",
                remedy="train with a smaller rank",
            )


def _check_tied(read: Mapping[str, Tensors], head: str, embedding: str) -> None:
    """A tied adapter is in the file twice and PEFT keeps one, so two different ones have no single meaning."""
    tied, own = read[head], read[embedding]
    if not (torch.equal(tied["a"], own["b"].T) and torch.equal(tied["b"], own["a"].T)):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: ensure_weight_tying is set, but the adapter of {quote(head)} is not that of "
            f"{quote(embedding)}",
            subject=f"{WEIGHTS_FILE}: {quote(head)}",
            remedy="save the adapter without ensure_weight_tying",
        )
