"""The training loop: forward, backward, clip, step, for one adapter on one frozen base.

Its whole state is adapter, optimizer, random generators and a step number, so that a resumed run repeats the
uninterrupted one bit for bit. Knows no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loramux_adapters.apply.trainable import TrainableAdapter
from loramux_adapters.guard.rope import RopeChoice
from loramux_trainer.batches import Batch, StepOrder, collate
from loramux_trainer.completion_loss import completion_loss
from loramux_trainer.data import DataSet
from loramux_trainer.errors import CheckpointInvalid, Diverged
from loramux_trainer.examples import Unit
from loramux_trainer.job import OptimConfig
from loramux_trainer.progress import EvalReport, StepReport
from loramux_trainer.schedule import factor, warmup_length


class Loop:
    """Steps are taken one by one by the caller, which decides when to evaluate, save and stop."""

    def __init__(
        self,
        model: nn.Module,
        adapter: TrainableAdapter,
        data: DataSet,
        job: OptimConfig,
        *,
        pad_id: int,
        device: torch.device,
        rope: RopeChoice | None = None,
    ) -> None:
        self._rope = rope
        self._model, self._adapter, self._data, self._job = model, adapter, data, job
        self._pad_id, self._device = pad_id, device
        self._parameters = adapter.parameters()
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=job.learning_rate, betas=job.betas, weight_decay=job.weight_decay, fused=True
        )
        self._order = StepOrder(
            [unit.tokens for unit in data.train],
            batch_size=job.batch_size,
            accumulation=job.gradient_accumulation_steps,
            seed=job.seed,
        )
        self.total_steps = (
            job.max_steps if job.max_steps is not None else job.num_train_epochs * self._order.steps_per_epoch
        )
        self.eval_every = job.eval_steps or self._order.steps_per_epoch
        self._warmup = warmup_length(job.warmup_steps, self.total_steps)
        self.step = 0

    def train_step(self) -> StepReport:
        """One optimizer step over its micro-batches. Raises Diverged before a non-finite number reaches the weights."""
        batches = [self._collate([self._data.train[i] for i in rows]) for rows in self._order.micro_batches(self.step)]
        tokens = sum(batch.supervised for batch in batches)
        total = 0.0
        for batch in batches:
            loss = completion_loss(self._model, batch, self._rope) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        clip = math.inf if self._job.max_grad_norm is None else self._job.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self._parameters, clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise Diverged(
                f"step {self.step + 1}: loss {total}, gradient norm {norm}; "
                "start again in another output with a lower training.learning_rate"
            )
        rate = self._job.learning_rate * factor(self._job.lr_scheduler_type, self.step, self._warmup, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepReport(self.step, total, rate, norm, tokens)

    @torch.no_grad()
    def evaluate(self) -> EvalReport:
        """Mean loss over the evaluation set, without dropout; changes nothing."""
        self._adapter.train(False)
        total, tokens, size = 0.0, 0, self._job.batch_size
        held = sorted(self._data.eval, key=lambda unit: unit.tokens)
        for start in range(0, len(held), size):
            batch = self._collate(held[start : start + size])
            total += completion_loss(self._model, batch, self._rope).item()
            tokens += batch.supervised
        self._adapter.train(True)
        return EvalReport(self.step, total / tokens)

    def _collate(self, units: list[Unit]) -> Batch:
        return collate([row for unit in units for row in unit.rows], pad_id=self._pad_id, device=self._device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes from step to step, on the CPU."""
        state = {"rng.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self._device)
        for name, (a, b) in self._adapter.state().items():
            state[f"a.{name}"], state[f"b.{name}"] = a, b
        for index, parameter in enumerate(self._parameters):
            for key, value in self._optimizer.state[parameter].items():
                state[f"optimizer.{index}.{key}"] = value
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue after `step` steps. Raises CheckpointInvalid when the tensors are not this loop's."""
        try:
            names = [name[2:] for name in tensors if name.startswith("a.")]
            self._adapter.load_state({name: (tensors[f"a.{name}"], tensors[f"b.{name}"]) for name in names})
            torch.set_rng_state(tensors["rng.cpu"])
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], self._device)
            state: dict[int, dict[str, Any]] = {index: {} for index in range(len(self._parameters))}
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".")
                    state[int(index)][key] = tensor
        except (KeyError, ValueError) as error:
            raise CheckpointInvalid(f"the checkpoint's tensors are not those of this job ({error})") from error
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = step
