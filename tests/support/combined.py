"""Several adapters with weights as one model: the oracle sums whole weights that PEFT merged, one adapter at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.combining import combine
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from support.adapters import peft_warnings_ignored
from support.all_kinds import VOCABULARIES
from support.bottlenecks import is_bottleneck
from support.kinds import KindOracle, dequantized_model
from support.model_engine import ModelEngine

Terms = Sequence[tuple[str, float]]


class CombinedOracle(KindOracle):
    """Changes of weights are summed by their weights, IA3's gains are multiplied onto the sum; a prompt, a prefix, a
    bottleneck or a resized vocabulary with what goes with it acts on the model that this gives."""

    def __init__(self, checkpoint: Path, adapters: Mapping[str, Path], terms: Terms) -> None:
        base = dequantized_model(checkpoint)
        total = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        gains: list[Any] = []
        rest: list[Path] = []
        for name, weight in terms:
            directory = adapters[name]
            if is_bottleneck(directory) or name in VOCABULARIES:
                rest.append(directory)
                continue
            with peft_warnings_ignored():
                model = dequantized_model(checkpoint)
                if not json.loads((directory / CONFIG_FILE).read_text()).get("trainable_token_indices"):
                    _untie(model)  # trained tokens are of both ends
                wrapped: Any = PeftModel.from_pretrained(model, str(directory)).eval()
                config = wrapped.peft_config["default"]
                if config.is_prompt_learning:
                    rest.append(directory)
                elif config.peft_type == "IA3":
                    gains += [
                        (path.removeprefix("base_model.model."), module, weight)
                        for path, module in wrapped.named_modules()
                        if isinstance(module, IA3Layer)
                    ]
                else:
                    merged = wrapped.merge_and_unload().state_dict()
                    for key, frozen in base.state_dict().items():
                        total[key] += weight * (merged[key] - frozen)
        _untie(base)
        base.load_state_dict(total)
        for path, layer, weight in gains:
            _multiply(base.get_submodule(path), layer, weight)
        assert len(rest) <= 1
        vocabulary = next((VOCABULARIES[name] for name, _ in terms if name in VOCABULARIES), None)
        super().__init__(checkpoint, rest[0] if rest else None, vocabulary, model=base)


def concatenated(out: Path, terms: Sequence[tuple[Path, float]]) -> Path:
    """A LoRA whose factors are those of several side by side: of activated ones, which PEFT does not merge."""
    config = json.loads((terms[0][0] / CONFIG_FILE).read_text())
    scaled = []
    for directory, weight in terms:
        own = json.loads((directory / CONFIG_FILE).read_text())
        tensors = load_file(directory / WEIGHTS_FILE)
        scale = weight * own["lora_alpha"] / own["r"]
        scaled.append({key: value * scale if "lora_B" in key else value for key, value in tensors.items()})
    rank = config["r"] * len(terms)
    out.mkdir()
    (out / CONFIG_FILE).write_text(json.dumps({**config, "r": rank, "lora_alpha": rank}))
    joined = {key: torch.cat([each[key] for each in scaled], dim=int("lora_B" in key)) for key in scaled[0]}
    save_file({key: value.contiguous() for key, value in joined.items()}, out / WEIGHTS_FILE)
    return out


def _untie(model: Any) -> None:
    """PEFT would merge a change of one end into both."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


@torch.no_grad()
def _multiply(module: Any, layer: Any, weight: float) -> None:
    gain = 1 + weight * (layer.ia3_l["default"].flatten() - 1)
    by_column = layer.is_feedforward != isinstance(module, Conv1D)  # Conv1D's weight lies transposed
    module.weight.mul_(gain[None, :] if by_column else gain[:, None])
    if module.bias is not None and not layer.is_feedforward:
        module.bias.mul_(gain)


def add_combination(engine: ModelEngine, name: str, terms: Terms, base: BaseModelSpec) -> AdapterWeights:
    """Has the engine know `name` as what the terms, names that it knows, come to."""
    weights = combine([(engine.weights[engine.digests[each]], weight) for each, weight in terms], base)
    engine.digests[name] = weights.spec.digest
    engine.weights[weights.spec.digest] = weights
    return weights
