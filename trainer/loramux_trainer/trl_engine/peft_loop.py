"""PEFT in a plain loop of torch's on a base of 16 or of 4 bits: what the fleet is compared with.

As PEFT's users write it: `get_peft_model`, rows padded to the longest one, logits of all positions at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loramux_adapters.base.load import ask_for_logits_only, refuse_foreign_quantization
from loramux_trainer.base_reading import loading
from loramux_trainer.batches import StepOrder
from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.errors import Diverged
from loramux_trainer.job import TrainConfig
from loramux_trainer.preparation import JobData, compute_dtype, enable_activation_checkpointing, load, source_of
from loramux_trainer.progress import EvalReport, Progress, StepReport
from loramux_trainer.schedule import learning_rate
from loramux_trainer.targets import modules_of
from loramux_trainer.trl_engine.adapter import switch_off_dropout

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class PeftLoop:
    """A LoRA job with `adamw` or `sgd` and a number of steps. The base is loaded at once."""

    def __init__(self, prepared: JobData, device: torch.device, bits: int) -> None:
        from peft import LoraConfig, get_peft_model

        job = prepared.job
        self._job, self._data, self._device = job, prepared.data, device
        base = _load_16_bit(job, device) if bits == 16 else load(job, device, compute_dtype(job, device)).model
        switch_off_dropout(base)
        if job.training.gradient_checkpointing:
            enable_activation_checkpointing(base)
            base.enable_input_require_grads()
        torch.manual_seed(job.training.seed)
        lora = job.lora
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.alpha),
            lora_dropout=lora.dropout,
            target_modules=list(modules_of(job, prepared.reading.outline)),
            task_type="CAUSAL_LM",
        )
        self._model: Any = get_peft_model(base, config)
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def go(self, progress: Progress) -> None:
        """Takes the job's steps, and evaluates after the last one. Raises Diverged as the fleet ends a job."""
        training = self._job.training
        steps = training.max_steps or 0
        own = {"betas": training.betas} if training.optimizer == "adamw" else {"momentum": training.momentum or 0.0}
        optimizer = _OPTIMIZERS[training.optimizer](
            self._trained, lr=training.learning_rate, weight_decay=training.weight_decay, **own
        )
        units = self._data.train
        order = StepOrder.of(training, [unit.tokens for unit in units])
        progress.started(steps, 0, self._data.report)
        self._model.train()
        for step in range(steps):
            rate = learning_rate(training, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches = [[units[index] for index in batch] for batch in order.micro_batches(step)]
            tokens = sum(unit.supervised for batch in batches for unit in batch)
            loss = sum(self._backward(batch, tokens) for batch in batches)
            limit = training.max_grad_norm or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(self._trained, limit))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}")
            optimizer.step()
            optimizer.zero_grad()
            progress.stepped(StepReport(step + 1, loss, rate, norm, tokens))
        if self._data.eval:
            loss = self._evaluate()
            if not math.isfinite(loss):
                raise Diverged(f"step {steps}: eval loss {loss:g}")
            progress.evaluated(EvalReport(steps, loss))

    def _backward(self, batch: Sequence[Unit], tokens: int) -> float:
        """The batch's part of a step's mean over `tokens`."""
        loss = self._loss(batch) / tokens
        loss.backward()
        return float(loss.detach())

    def _evaluate(self) -> float:
        self._model.eval()
        units, size = self._data.eval, self._job.training.batch_size
        with torch.no_grad():
            sums = [float(self._loss(units[start : start + size])) for start in range(0, len(units), size)]
        return sum(sums) / sum(unit.supervised for unit in units)

    def _loss(self, batch: Sequence[Unit]) -> Any:
        """Sum of -log p over the tokens with a loss."""
        rows = [row for unit in batch for row in unit.rows]
        ids, labels, mask = (each.to(self._device) for each in _padded(rows))
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )


def _padded(rows: Sequence[Example]) -> Iterator[torch.Tensor]:
    """Ids, labels and mask, [rows, longest] each."""
    longest = max(len(row.ids) for row in rows)
    for fill, values in (
        (0, [row.ids for row in rows]),
        (IGNORE, [row.labels for row in rows]),
        (0, [(1,) * len(row.ids) for row in rows]),
    ):
        yield torch.tensor([(*each, *[fill] * (longest - len(each))) for each in values])


def _load_16_bit(job: TrainConfig, device: torch.device) -> Any:
    """The base in bfloat16; one whose files are NF4 already is dequantized."""
    with loading(job):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source_of(job), dtype=torch.bfloat16, device_map={"": device}, trust_remote_code=False, use_safetensors=True
        )
        declared = getattr(model.config, "quantization_config", None)
        if declared is not None:
            refuse_foreign_quantization(model.config.to_dict())
            model = model.dequantize().to(torch.bfloat16)
    ask_for_logits_only(model.config)
    return model.eval().requires_grad_(False)
