"""Every method's loss and gradients against PEFT's on the exported files, in float64 on the dequantized base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.methods import low_rank, prompts, vectors
from loramux_trainer.methods.adalora import Budget, adalora
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from support.fleets import ALL_LINEAR, examples_of, jitter, lora_config, name_in_file, peft_in_float64, summed_loss
from support.tiny import load_tiny

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))
LINEAR = {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR}
EVERYWHERE = [*ALL_LINEAR, "lm_head", "embed_tokens"]
ENDS = ["embed_tokens", "lm_head"]
TOKENS = list(range(3, 130, 2))
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def _sizes(spec: BaseModelSpec, *, of_keys: bool) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", **prompts.sizes(5, spec, of_keys=of_keys)}


METHODS: dict[str, Callable[[BaseValues, BaseModelSpec], Method]] = {
    "lora": lambda values, _: low_rank.lora(lora_config(), 0, values),
    "rslora": lambda values, _: low_rank.lora(lora_config(use_rslora=True), 0, values),
    "lora-of-all": lambda values, _: low_rank.lora(lora_config(target_modules=EVERYWHERE), 0, values),
    "lora-ranks": lambda values, _: low_rank.lora(lora_config(rank_pattern={"k_proj": 2, "up_proj": 7}), 0, values),
    "lora-some": lambda values, _: low_rank.lora(lora_config(target_modules=["q_proj", "v_proj"]), 0, values),
    "init-b": lambda values, _: low_rank.lora(lora_config(), 0, values, init="B"),
    "gaussian": lambda values, _: low_rank.lora(lora_config(), 0, values, init="gaussian"),
    "orthogonal": lambda values, _: low_rank.lora(lora_config(), 0, values, init="orthogonal"),
    "dora": lambda values, _: low_rank.lora(lora_config(use_dora=True), 0, values),
    "dora-of-both-ends": lambda values, _: low_rank.lora(lora_config(use_dora=True, target_modules=ENDS), 0, values),
    "tokens": lambda values, _: low_rank.lora(lora_config(trainable_token_indices=TOKENS), 0, values),
    "adalora": lambda values, _: adalora({**LINEAR, "lora_alpha": 8}, 0, values, Budget(6, 3, 2, 2, 1, 20)),
    "vera": lambda *_: low_rank.vera({**LINEAR, "r": 16}, 0),
    "loha": lambda *_: low_rank.loha({**LINEAR, "r": 3, "alpha": 6}, 0),
    "loha-dense": lambda *_: low_rank.loha({**LINEAR, "r": 12, "alpha": 6}, 0),
    "lokr": lambda *_: low_rank.lokr({**LINEAR, "r": 3, "alpha": 6}, 0),
    "ia3": lambda *_: vectors.ia3(
        {**LINEAR, "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, 0
    ),
    "ia3-inputs-of-siblings": lambda *_: vectors.ia3(
        {**LINEAR, "target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["q_proj", "up_proj"]}, 0
    ),
    "ln": lambda values, _: vectors.layer_norms({"task_type": "CAUSAL_LM", "target_modules": NORMS}, 0, values),
    "prompt": lambda _, spec: prompts.prompt(_sizes(spec, of_keys=False), 0),
    "prefix": lambda _, spec: prompts.prefix(_sizes(spec, of_keys=True), 0),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")  # PEFT's remarks
def test_loss_and_gradients_equal_peft(
    name: str, model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = TrainedAdapter(METHODS[name](BaseValues(fleet_base), fleet_base.spec), fleet_base.spec, fleet_base.device)
    jitter(adapter)
    examples = examples_of(tokenizer, TEXTS)
    parts = adapter.parts(with_gradients=True)
    with model.running([MemberRows(parts, tuple(examples), 0, adapter.virtual_tokens)]) as hidden:
        loss, _ = model.token_loss(hidden, torch.ones(len(hidden.targets)))
        loss.backward()  # type: ignore[no-untyped-call]
    penalty = parts.backward()
    ours = _by_name_in_file(adapter)

    peft = peft_in_float64(adapter, fleet_base, load_tiny().model, tmp_path)
    if name == "adalora":  # PEFT adds its penalty to the mean loss of every forward
        peft.peft_config["default"].orth_reg_weight = 1e-30
    exact = summed_loss(peft, examples)
    exact.backward()
    theirs = {key.replace(".default", ""): p.grad for key, p in peft.named_parameters() if p.grad is not None}
    torch.testing.assert_close(float(loss.detach()), float(exact.detach()), rtol=1e-6, atol=0)
    assert len(ours) == len(theirs)
    for key, gradient in ours.items():
        other = theirs[_name_in_peft(key, theirs)]
        if penalty:  # its gradient is not the loss's
            continue
        # 2e-5 of the largest was measured, of this and of PEFT's own float32.
        torch.testing.assert_close(gradient.double(), other, atol=4e-5 * float(other.abs().max()), rtol=0)


def _by_name_in_file(adapter: TrainedAdapter) -> dict[str, torch.Tensor]:
    gradients = {name: g for group in adapter.parameters.groups for name, g in group.gradients.items()}
    return {name_in_file(adapter, name): gradient for name, gradient in gradients.items()}


def _name_in_peft(name: str, known: dict[str, Any]) -> str:
    if name == "prompt_embeddings":
        return "prompt_encoder.embedding.weight"
    return next(key for key in known if name in (key, key.removesuffix(".weight"), key.replace("base_layer.", "")))


# What stands before the prompt is seen from the first step on.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("prompt", "prefix")])
def test_a_fresh_adapter_leaves_the_model_as_it_is(
    name: str, model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    adapter = TrainedAdapter(METHODS[name](BaseValues(fleet_base), fleet_base.spec), fleet_base.spec, fleet_base.device)
    examples = tuple(examples_of(tokenizer, TEXTS))
    with torch.no_grad():
        losses = []
        for parts in (None, adapter.parts(with_gradients=False)):
            with model.running([MemberRows(parts, examples, 0)]) as hidden:
                losses.append(model.log_probs(hidden))
    torch.testing.assert_close(*losses, atol=2e-5, rtol=1e-5)
