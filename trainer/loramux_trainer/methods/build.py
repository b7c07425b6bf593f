"""The method that a job asks for, on one base: the only place that knows all of them.

Every key that a job may give for its method has its effect here, or the job is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from loramux_adapters.base.load import LoadedBase
from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.methods import low_rank, prompts, vectors
from loramux_trainer.methods.adalora import Budget, adalora
from loramux_trainer.methods.bottlenecks import bottleneck
from loramux_trainer.methods.delta import delta_lora
from loramux_trainer.methods.galore import galore
from loramux_trainer.methods.initial_pairs import Pair
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.selection import ranks, select
from loramux_trainer.targets import ModuleShape

T = TypeVar("T")

PairOf = Callable[[str], Pair]
"""Module -> the factors that an initialization gives it."""


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a method may look at besides the job."""

    base: LoadedBase
    values: BaseValues
    shapes: Mapping[str, ModuleShape]  # of the modules that the job selects
    total_steps: int
    tell: Callable[[str], None]  # of what a user should know
    pairs: PairOf | None = None  # of an initialization that makes factors from the base
    components: Callable[[str], torch.Tensor] | None = None  # A of eva
    encode: Callable[[str], list[int]] | None = None  # text -> token ids


def build_method(job: TrainConfig, around: Surroundings) -> Method:
    """Raises JobInvalid where the base has nothing that the method could train."""
    try:
        return _BUILDERS[job.method](job, around)
    except ValueError as error:
        raise JobInvalid("method", f"{job.method}: {error}") from error


def _common(around: Surroundings) -> dict[str, Any]:
    spec = around.base.spec
    return {"task_type": "CAUSAL_LM", "base_model_name_or_path": spec.model_id, "inference_mode": True}


def _selected(around: Surroundings, config: Mapping[str, Any]) -> dict[str, Any]:
    return select({**_common(around), **config}, tuple(around.shapes), around.base.spec)


def _lora(job: TrainConfig, around: Surroundings) -> Method:
    lora = job.lora
    _check_dropout(job, around)
    _check_biases(lora.bias, around)
    options: dict[str, Any] = {
        "peft_type": "LORA",
        **ranks(around.shapes, alpha="lora_alpha"),
        "use_rslora": lora.use_rslora,
        "use_dora": job.method == "dora",
        "bias": lora.bias,
        "fan_in_fan_out": all(around.base.spec.modules[name].kind == "conv1d" for name in around.shapes),
    }
    config = _selected(around, options)
    if lora.trainable_token_indices:
        config["trainable_token_indices"] = list(lora.trainable_token_indices)
    seed = job.training.seed
    if around.pairs is not None:
        if job.method == "dora":
            raise JobInvalid("init", f"{job.init} cannot go with dora: its magnitudes are those of the whole weight")
        return delta_lora(config, seed, around.values, around.pairs, rank_budget=lora.rank_budget, tell=around.tell)
    if job.init == "eva":
        return low_rank.eva(config, seed, around.values, _required(around.components))
    if job.init not in ("A", "B", "gaussian", "orthogonal"):
        raise ValueError(f"init {job.init} has no factors")
    odd = [shape.rank for shape in around.shapes.values() if shape.rank % 2]
    if job.init == "orthogonal" and odd:
        raise JobInvalid("lora.rank", f"{odd[0]} is odd: init orthogonal shares its directions between A and B")
    return low_rank.lora(config, seed, around.values, init=job.init)


def _check_dropout(job: TrainConfig, around: Surroundings) -> None:
    modules = around.base.spec.modules
    if job.lora.dropout and all(modules[name].kind == "embedding" for name in around.shapes):
        raise JobInvalid("lora.dropout", "an embedding has none: its inputs are token ids")


def _check_biases(bias: str, around: Surroundings) -> None:
    """Of a job that asks for biases."""
    spec = around.base.spec
    names = spec.modules if bias == "all" else around.shapes
    if bias != "none" and not any(spec.modules[name].has_bias for name in names):
        which = "" if bias == "all" else " in the modules that are adapted"
        raise JobInvalid("lora.bias", f"{spec.model_id} has no biases{which}; remove it")


def _check_has_layers(job: TrainConfig, around: Surroundings) -> None:
    """Where PEFT adapts plain linear maps only, what is exported for others could not be loaded."""
    others = [name for name in around.shapes if around.base.spec.modules[name].kind != "linear"]
    if others:
        raise JobInvalid("method", f"PEFT has no {job.method} for {others[0]}, which is a Conv1D; use lora or dora")


def _adalora(job: TrainConfig, around: Surroundings) -> Method:
    keys, target = job.adalora, job.lora.rank
    first = keys.init_r or max(target + 1, round(1.5 * target))
    if first <= target:
        raise JobInvalid("adalora.init_r", f"{first} leaves nothing to prune to lora.rank {target}")
    warm, final = (_steps(share, around.total_steps) for share in (keys.tinit, keys.tfinal))
    if warm + final >= around.total_steps:
        raise JobInvalid("adalora.tfinal", f"with tinit no step of {around.total_steps} is left to prune in")
    _check_biases(job.lora.bias, around)
    budget = Budget(first, target, warm, final, keys.delta_t, around.total_steps)
    config = _selected(
        around, {"peft_type": "ADALORA", "lora_alpha": job.lora.alpha, "bias": job.lora.bias, "init_r": first}
    )
    return adalora(
        config,
        job.training.seed,
        around.values,
        budget,
        betas=(keys.beta1, keys.beta2),
        orthogonality=keys.orth_reg_weight,
    )


def _vera(job: TrainConfig, around: Surroundings) -> Method:
    return low_rank.vera(_selected(around, {"peft_type": "VERA", "r": job.lora.rank}), job.training.seed)


def _loha(job: TrainConfig, around: Surroundings) -> Method:
    _check_has_layers(job, around)
    config = _selected(around, {"peft_type": "LOHA", **ranks(around.shapes, alpha="alpha")})
    return low_rank.loha(config, job.training.seed)


def _lokr(job: TrainConfig, around: Surroundings) -> Method:
    _check_has_layers(job, around)
    config = _selected(around, {"peft_type": "LOKR", **ranks(around.shapes, alpha="alpha")})
    return low_rank.lokr(config, job.training.seed)


_FEEDFORWARD = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "wo")
"""Projections out of an MLP: IA3 scales their inputs."""


def _ia3(job: TrainConfig, around: Surroundings) -> Method:
    names = tuple(around.shapes)
    wanted = job.lora.feedforward_modules
    if wanted is None:
        inner = [name for name in names if name.rpartition(".")[2] in _FEEDFORWARD and ".attn." not in name]
    else:
        endings = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        inner = [name for name in names if name.endswith(endings)]
        for ending in endings:
            if not any(name.endswith(ending) for name in names):
                raise JobInvalid("lora.feedforward_modules", f"{ending!r} matches none of the selected modules")
    config = _selected(around, {"peft_type": "IA3", "feedforward_modules": []})
    lasts = sorted({name.rpartition(".")[2] for name in inner})
    found = [name for name in names if name.rpartition(".")[2] in lasts]
    if sorted(found) == sorted(inner) and set(lasts) <= set(config["target_modules"]):
        return vectors.ia3({**config, "feedforward_modules": lasts}, job.training.seed)
    # PEFT wants each of them among the targets in the same words.
    full = {"target_modules": sorted(names), "feedforward_modules": sorted(inner)}
    return vectors.ia3({**config, **full}, job.training.seed)


def _bitfit(job: TrainConfig, around: Surroundings) -> Method:
    spec, keys, seed = around.base.spec, job.bitfit, job.training.seed
    norms = sorted(name for name, module in spec.modules.items() if module.kind == "norm")
    biased = [name for name, module in spec.modules.items() if module.has_bias]
    if keys.biases and not biased:
        raise JobInvalid("bitfit.biases", f"{spec.model_id} has no biases; train its norms with bitfit.norms instead")
    if not keys.biases:
        config = {**_common(around), "peft_type": "LN_TUNING", "target_modules": norms}
        return vectors.layer_norms(config, seed, around.values)
    first = next(name for name, module in spec.modules.items() if module.kind in ("linear", "conv1d"))
    config = select({**_common(around), "peft_type": "LORA", "r": 1, "bias": "all"}, (first,), spec)
    return vectors.biases(config, seed, around.values, norms=norms if keys.norms else ())


def _prompt(job: TrainConfig, around: Surroundings) -> Method:
    keys, spec = job.prompt, around.base.spec
    config = {**_common(around), **prompts.sizes(keys.num_virtual_tokens, spec, of_keys=False)}
    table = around.values.weight(_required(spec.embedding))
    if keys.prompt_tuning_init_text is None:
        ids = prompts.random_tokens(keys.num_virtual_tokens, len(table), job.training.seed)
    else:
        text = _required(around.encode)(keys.prompt_tuning_init_text)
        ids = prompts.repeated(text, keys.num_virtual_tokens)
    return prompts.prompt(config, job.training.seed, table[torch.tensor(ids)])


def _p_tuning(job: TrainConfig, around: Surroundings) -> Method:
    keys, spec = job.prompt, around.base.spec
    config = {**_common(around), **prompts.sizes(keys.num_virtual_tokens, spec, of_keys=False)}
    return prompts.p_tuning(
        config,
        job.training.seed,
        hidden=keys.encoder_hidden_size or spec.hidden_size,
        encoder=keys.encoder_reparameterization_type,
        layers=keys.encoder_num_layers,
    )


def _prefix(job: TrainConfig, around: Surroundings) -> Method:
    keys, spec = job.prompt, around.base.spec
    if spec.kv_heads is None:
        raise ValueError(f"layers of {spec.model_id} differ in the size of their keys and values")
    config = {**_common(around), **prompts.sizes(keys.num_virtual_tokens, spec, of_keys=True)}
    if keys.prefix_projection:
        hidden = keys.encoder_hidden_size or spec.hidden_size
        return prompts.projected_prefix(config, job.training.seed, hidden=hidden)
    return prompts.prefix(config, job.training.seed)


def _bottleneck(job: TrainConfig, around: Surroundings) -> Method:
    keys = job.bottleneck
    return bottleneck(
        around.base.spec,
        job.training.seed,
        kind=keys.kind,
        reduction_factor=keys.reduction_factor,
        activation=keys.non_linearity,
    )


def _galore(job: TrainConfig, around: Surroundings) -> Method:
    keys = job.galore
    if keys.rank_budget < 2 * keys.rank:
        raise JobInvalid("galore.rank_budget", f"{keys.rank_budget} has no room for a period besides the running one")
    shapes = {name: ModuleShape(keys.rank, keys.scale * keys.rank, keys.scale) for name in around.shapes}
    config = _selected(around, {"peft_type": "LORA", **ranks(shapes, alpha="lora_alpha")})
    gap, seed = keys.update_proj_gap, job.training.seed
    return galore(config, seed, gap=gap, rank_budget=keys.rank_budget, tell=around.tell)


def _steps(value: float, total: int) -> int:
    """A number of steps, or below 1 a share of all."""
    return round(value * total) if value < 1 else int(value)


def _required(value: T | None) -> T:
    if value is None:
        raise ValueError("the base has no input embedding, or nothing was prepared for it")
    return value


_BUILDERS: Mapping[str, Callable[[TrainConfig, Surroundings], Method]] = {
    "lora": _lora,
    "rslora": _lora,
    "dora": _lora,
    "adalora": _adalora,
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "ia3": _ia3,
    "bitfit": _bitfit,
    "prompt": _prompt,
    "p-tuning": _p_tuning,
    "prefix": _prefix,
    "bottleneck": _bottleneck,
    "galore": _galore,
}
