"""PEFT's layers on our base: they begin with the fleet's first values, and are what the job asks for, or refused.

PEFT begins plainly, or leaves a module out, in silence where its own layers cannot do something on 4-bit weights. So
what it has built is compared with what the exported file will hold, tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.errors import AdapterError
from loramux_trainer.errors import JobInvalid, ModelInvalid
from loramux_trainer.fleet.random import generator
from loramux_trainer.job import TrainConfig
from loramux_trainer.methods.build import Surroundings, build_method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.progress import Progress
from loramux_trainer.targets import modules_of
from loramux_trainer.trl_engine.data import TrlData

HEAD = "score"
"""The module that gives a sequence its score."""

_DROPOUT = {"LORA": "lora_dropout", "VERA": "vera_dropout"}
_ADAPTER = "default"


class PeftAdapter:
    """The adapter of a job: its config, its first values by their names in the file, and what PEFT makes of them."""

    def __init__(self, job: TrainConfig, base: LoadedBase, data: TrlData, progress: Progress) -> None:
        self._job, self._is_scoring = job, job.loss.name == "reward"
        self._shapes = modules_of(job, base.spec)
        around = Surroundings(
            base,
            BaseValues(base),
            self._shapes,
            1,
            progress.warned,
            encode=partial(data.reading.tokenizer.encode, add_special_tokens=False),
        )
        try:
            adapter = TrainedAdapter(build_method(job, around), base.spec, base.device)
        except AdapterError as error:
            raise JobInvalid("method", f"{job.method}: {error}") from error
        self.config, self.first = adapter.files()
        self.weights_file, self.parameters = adapter.layout.weights_file, adapter.parameters.weights.numel()
        if self._is_scoring:
            self.config["task_type"] = "SEQ_CLS"
            self.config["modules_to_save"] = [HEAD]
        switch_off_dropout(base.model)

    def peft_config(self) -> Any:
        """For trl, which builds the layers."""
        from peft import PeftConfig

        options: dict[str, Any] = {**copy.deepcopy(self.config), "inference_mode": False}
        name = _DROPOUT.get(options["peft_type"])
        if name is not None:
            options[name] = self._job.lora.dropout
        return PeftConfig.from_peft_type(**options)

    def begin(self, model: Any) -> None:
        """Puts the first values into what PEFT has built, in float32: trl rounds to bfloat16 on 4-bit bases.

        Raises JobInvalid where it is not what the job asks for.
        """
        from peft import set_peft_model_state_dict

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        built = self.tensors(model)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.first.items()}
        has = {name: tuple(tensor.shape) for name, tensor in built.items() if not self._is_of_head(name)}
        for name in sorted(wanted.keys() | has.keys()):
            if wanted.get(name) != has.get(name):
                raise JobInvalid(
                    "method",
                    f"PEFT builds no {self._job.method} here that could be served: {name} is {has.get(name)}, not "
                    f"{wanted.get(name)}; use engine: fleet",
                )
        heads = {name: tensor for name, tensor in built.items() if self._is_of_head(name)}
        set_peft_model_state_dict(model, {**self.first, **heads})
        self._check_values(model)
        self._check_scales(model)

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """By their names in the file, float32 copies on the CPU."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in state.items()}

    def _check_values(self, model: Any) -> None:
        """Each tensor of the file is there, and nothing else is trained."""
        for name, tensor in self.tensors(model).items():
            if not self._is_of_head(name) and not torch.equal(tensor, self.first[name]):
                raise JobInvalid("method", f"PEFT does not take the first values of {name}; use engine: fleet")
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        count = sum(parameter.numel() for name, parameter in trained.items() if not self._is_of_head(name))
        if count != self.parameters:
            raise JobInvalid(
                "method", f"PEFT trains {count} numbers, {self._job.method} has {self.parameters}; use engine: fleet"
            )

    def _check_scales(self, model: Any) -> None:
        if self.config["peft_type"] != "LORA":
            return
        for name, shape in self._shapes.items():
            layer = model.get_base_model().get_submodule(name)
            is_dora = bool(getattr(layer, "use_dora", {}).get(_ADAPTER))
            if layer.scaling[_ADAPTER] != shape.scale or is_dora != (self._job.method == "dora"):
                raise JobInvalid("method", f"PEFT builds no {self._job.method} at {name}; use engine: fleet")

    def _is_of_head(self, name: str) -> bool:
        return self._is_scoring and f".{HEAD}." in name


def scoring_model(base: LoadedBase, seed: int) -> Any:
    """The base's own layers under a head that gives a sequence one number, in place of the one that gives logits."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(base.config)
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelInvalid(f"{base.spec.model_id} has no model for classification in transformers") from error
    prefix = model.base_model_prefix
    if not isinstance(getattr(model, HEAD, None), nn.Linear) or prefix != base.model.base_model_prefix:
        raise ModelInvalid(f"{base.spec.model_id} has no head called {HEAD} that a reward could be trained with")
    setattr(model, prefix, base.model.base_model)
    head = nn.Linear(base.spec.hidden_size, 1, bias=False, device=base.device)
    drawn = torch.empty(head.weight.shape).normal_(0.0, base.spec.hidden_size**-0.5, generator=generator(seed, HEAD))
    head.weight.data = drawn.to(base.device)
    setattr(model, HEAD, head)
    for flag in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        setattr(model, flag, getattr(base.model, flag))
    return model.eval()


def switch_off_dropout(model: nn.Module) -> None:
    """The base's own: the server has none, and transformers' trainer puts the whole model into training mode."""
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout", "activation_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor of the adapter is another now."""
    return any(name not in before or not torch.equal(tensor, before[name]) for name, tensor in after.items())
