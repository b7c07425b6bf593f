"""Which keys each engine reads: what trl, transformers or PEFT would leave out in silence is refused by name.

Names of keys only; what trl is given is known to `trl_engine`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

Engine = Literal["fleet", "trl"]

TRL_LOSSES: Final = ("grpo", "reward")
"""Losses that only trl computes here."""

_METHODS: Final[Mapping[str, str]] = {
    "adalora": "transformers' trainer never asks PEFT to prune, so that no rank would be given away",
    **dict.fromkeys(("loha", "lokr"), "PEFT takes the packed bytes of 4-bit weights for their shape"),
    "bitfit": "PEFT trains the biases of the base in place, and the base is never written",
    **dict.fromkeys(("prompt", "p-tuning", "prefix"), "trl does not count virtual tokens where it cuts and masks"),
    "bottleneck": "PEFT has no bottlenecks",
    "galore": "transformers' GaLore writes to the base",
}
_MOVES: Final = "PEFT would move the base, or begin plainly without a word where its weights have 4 bits"
_INITS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("pissa", "olora", "corda", "lora-ga"), _MOVES),
    "eva": "its factors come from the fleet's own look at the data",
}
_OPTIMIZERS: Final[Mapping[str, str]] = dict.fromkeys(("muon", "sophia"), "transformers has no such optimizer")
_LOSSES: Final[Mapping[str, str]] = {"orpo": "in trl it is an experiment, which may change without notice"}
_KEYS: Final[Mapping[str, str]] = {
    "lora.bias": "PEFT trains the biases of the base in place, and the base is never written",
    "lora.trainable_token_indices": "trl multiplies by the head's own weight, past the rows that are trained",
    "lora.loraplus_lr_ratio": "transformers' trainer gives all matrices one learning rate",
    "training.frozen_products": "PEFT multiplies as the base computes",
    "training.deterministic": "trl pads the rows of a batch to one length",
    "training.early_stopping_patience": "its evaluations are means over batches",
    "training.load_best_model_at_end": "transformers keeps what it goes back to as pickles",
    "checkpoint.save_steps": "transformers keeps optimizers as pickles, which nothing here reads or writes",
    "data.packing": "without FlashAttention the examples of a pack would see each other in trl",
}
_OF_PROMPTS: Final[Mapping[str, str]] = {
    "data.eval": "grpo looks at its rewards in each step",
    "data.eval_fraction": "grpo looks at its rewards in each step",
    "training.eval_steps": "grpo looks at its rewards in each step",
    "data.completion_only_loss": "the loss is on what the adapter writes",
    "data.assistant_only_loss": "the loss is on what the adapter writes",
    "data.instruction_format": "a prompt is a text or messages",
}


def unread_by_engine(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, why the engine cannot do it) of a job's values by section, those that differ from the defaults."""
    loss = str(_section(job, "loss").get("name") or "sft")
    if (job.get("engine") or "fleet") == "fleet":
        if loss in TRL_LOSSES:
            yield "loss", f"{loss} is computed by trl only: set engine: trl"
        return
    optimizer = str(_section(job, "training").get("optimizer"))
    chosen = (("method", str(job.get("method")), _METHODS), ("init", str(job.get("init")), _INITS))
    for key, value, reasons in (*chosen, ("training.optimizer", optimizer, _OPTIMIZERS), ("loss", loss, _LOSSES)):
        if value in reasons:
            yield key, f"{value} cannot go with engine: trl: {reasons[value]}; remove it, or use engine: fleet"
    for key, why in _KEYS.items():
        if _is_given(job, key):
            yield key, f"cannot go with engine: trl: {why}; remove it, or use engine: fleet"
    if loss == "grpo":
        yield from (
            (key, f"is not read by loss grpo: {why}") for key, why in _OF_PROMPTS.items() if _is_given(job, key)
        )
        yield from _of_grpo(_section(job, "loss"), _section(job, "training"), _section(job, "data"))


def _of_grpo(
    loss: Mapping[str, Any], training: Mapping[str, Any], data: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    if data.get("truncation") == "truncate":
        yield "data.truncation", "a prompt that is cut asks something else: leave it out, longer ones are dropped"
    several = loss.get("num_generations") or 8
    together = (training.get("batch_size") or 8) * (training.get("gradient_accumulation_steps") or 1)
    if together % several:
        yield (
            "training.batch_size",
            f"{together} answers a step are no multiple of loss.num_generations, {several}: each prompt gets that many",
        )


def _is_given(job: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return _section(job, section).get(name) not in (None, False, 0.0, "none")


def _section(job: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    values = job.get(name)
    return values if isinstance(values, Mapping) else {}
