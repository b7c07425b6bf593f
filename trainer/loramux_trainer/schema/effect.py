"""Which keys take effect: a key that the chosen method, init, optimizer or schedule does not read is refused.

Names of keys only; what they do is known to those who read them. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from loramux_trainer.schema.optim_config import OptimizerName
from loramux_trainer.schema.schedule_config import OPTIONS

Method = Literal[
    "lora", "rslora", "dora", "adalora", "vera", "loha", "lokr", "ia3", "bitfit",
    "prompt", "p-tuning", "prefix", "bottleneck", "galore",
]  # fmt: skip
Init = Literal["A", "B", "gaussian", "orthogonal", "eva", "pissa", "olora", "corda", "lora-ga"]

LOW_RANK = ("lora", "rslora", "dora")
"""Methods whose factors an init fills."""
DELTA_INITS = ("pissa", "olora", "corda", "lora-ga")
"""Inits that would move the base: y = W x + s (B A - B0 A0) x, exported at twice the rank."""

_MODULES = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
_LORA = _MODULES | _PATTERNS | {
    "rank", "alpha", "use_rslora", "dropout", "bias", "trainable_token_indices", "loraplus_lr_ratio", "rank_budget",
}  # fmt: skip
_READS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(LOW_RANK, _LORA),
    "adalora": _MODULES | {"rank", "alpha", "dropout", "bias"},
    "vera": _MODULES - {"exclude_modules"} | {"rank", "dropout"},
    **dict.fromkeys(("loha", "lokr"), _MODULES | _PATTERNS | {"rank", "alpha"}),
    "ia3": frozenset({"target_modules", "exclude_modules", "feedforward_modules"}),
    "galore": _MODULES,
}
_PROMPTS = ("prompt", "p-tuning", "prefix")
# Section -> the methods that read it, beside lora.
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "prompt": _PROMPTS,
    **{name: (name,) for name in ("adalora", "bitfit", "bottleneck", "galore")},
}
_PROMPT_KEYS: Mapping[str, tuple[str, ...]] = {
    "num_virtual_tokens": _PROMPTS,
    "prompt_tuning_init_text": ("prompt",),
    "encoder_hidden_size": ("p-tuning", "prefix"),
    "prefix_projection": ("prefix",),
    **dict.fromkeys(("encoder_reparameterization_type", "encoder_num_layers"), ("p-tuning",)),
}
_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "betas": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "muon", "sophia"),
    "momentum": ("sgd", "muon"),
    "hessian_update_period": ("sophia",),
}
_WITHOUT_DECAY = ("vera", "ia3", "bitfit")
"""Methods that train vectors only: gains, biases and norms."""


def without_effect(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, why it would not take effect) of a job's values by section; keys with None are not given.

    Choices that the job does not give are the defaults.
    """
    method = str(job.get("method") or "lora")
    if method not in get_args(Method):
        return
    if job.get("init") is not None and method not in LOW_RANK:
        yield "init", f"{method} has no factors to initialize; remove it, or use method {', '.join(LOW_RANK)}"
    for section, name, value in _given(job):
        if why := _reason(section, name, value, job, method):
            yield f"{section}.{name}", why


def _given(job: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for section in ("lora", *_SECTIONS, "training"):
        values = job.get(section)
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name == "lr_scheduler_kwargs" and isinstance(value, Mapping):
                yield from (
                    ("training.lr_scheduler_kwargs", key, each) for key, each in value.items() if each is not None
                )
            elif value is not None and value != {}:
                yield section, name, value


def _reason(section: str, name: str, value: Any, job: Mapping[str, Any], method: str) -> str | None:
    if section == "lora":
        return _reason_of_lora(name, value, job, method)
    if section in _SECTIONS:
        if method not in _SECTIONS[section]:
            return _not_read(f"method {method}", _SECTIONS[section])
        return _reason_of_prompt(name, job["prompt"], method) if section == "prompt" else None
    training = job["training"] if isinstance(job.get("training"), Mapping) else {}
    schedule = str(training.get("lr_scheduler_type") or "cosine")
    if section == "training.lr_scheduler_kwargs":
        readers = tuple(kind for kind, options in OPTIONS.items() if name in options)
        return None if schedule not in OPTIONS or schedule in readers or not readers else _not_read(schedule, readers)
    if name == "num_train_epochs" and training.get("max_steps") is not None:
        return "training.max_steps is in its place; remove one of them, or set max_steps to null"
    if name == "weight_decay" and value != 0 and method == "galore":
        return "GaLore's decays the frozen weight, which is not written to here; remove it"
    if name == "warmup_steps" and value != 0 and schedule == "constant":
        return "constant has no warm-up; remove it, or use constant_with_warmup"
    if name == "weight_decay" and value != 0 and method in _WITHOUT_DECAY:
        return f"method {method} trains vectors, which no weight decay acts on; remove it"
    if name == "early_stopping_threshold" and value != 0 and training.get("early_stopping_patience") is None:
        return "nothing is stopped early; set training.early_stopping_patience, or remove it"
    optimizer = str(training.get("optimizer") or "adamw")
    if optimizer in get_args(OptimizerName) and optimizer not in _OPTIMIZERS.get(name, (optimizer,)):
        return _not_read(f"optimizer {optimizer}", _OPTIMIZERS[name])
    return None


def _reason_of_lora(name: str, value: Any, job: Mapping[str, Any], method: str) -> str | None:
    init = job.get("init")
    if name == "use_rslora" and value is False and method == "rslora":
        return "contradicts method rslora; remove it, or use method lora"
    if name == "rank_budget" and method in LOW_RANK and init not in DELTA_INITS:
        return f"init {init or 'A'} exports the rank it trains; remove it, or use init {', '.join(DELTA_INITS)}"
    if name == "rank" and method == "galore":
        return "method galore does not read it; its rank is galore.rank"
    readers = tuple(each for each, keys in _READS.items() if name in keys)
    known = readers or name == "feedforward_modules"
    return _not_read(f"method {method}", readers) if known and method not in readers else None


def _reason_of_prompt(name: str, prompt: Mapping[str, Any], method: str) -> str | None:
    if method not in _PROMPT_KEYS.get(name, _PROMPTS):
        return _not_read(f"method {method}", _PROMPT_KEYS[name])
    if name == "encoder_hidden_size" and method == "prefix" and not prompt.get("prefix_projection"):
        return "a prefix without a projection has no encoder; remove it, or set prompt.prefix_projection"
    is_lstm = prompt.get("encoder_reparameterization_type") == "LSTM"
    if name == "encoder_num_layers" and not is_lstm:
        return "an MLP does not read it; remove it, or set prompt.encoder_reparameterization_type: LSTM"
    return None


def _not_read(who: str, readers: tuple[str, ...]) -> str:
    return f"{who} does not read it; remove it (it is read by {', '.join(readers)})"
