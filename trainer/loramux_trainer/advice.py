"""What is worth a warning before the first step: choices that the data or the schedule do not support."""

from __future__ import annotations

from collections.abc import Iterator

from loramux_trainer.data.dataset import DataReport
from loramux_trainer.job import TrainConfig

_LOW_RANK = ("lora", "rslora", "dora", "adalora")
_SEVERAL_EPOCHS = 3  # the usual number; only beyond it a warning has something to say
_FEW_EXAMPLES, _MANY_EPOCHS = 1000, 5
_PARAMETERS_PER_TOKEN = 1000
"""Trained parameters for each supervised token. Rank 16 on all layers of a 7B model has 8 with Alpaca's 52,000
examples and about 80 with the 1,000 long ones of LIMA, both of which train well."""
_SMALLEST_RANK = 8  # no lower one is advised


def warnings_before(job: TrainConfig, data: DataReport, epochs: float, parameters: int) -> Iterator[str]:
    """Sentences with numbers and the remedy. `epochs` that the run takes, `parameters` that it trains."""
    yield from _of_the_schedule(job)
    yield from _of_epochs(data, epochs)
    if job.loss.name == "sft" and data.masked == 0:
        yield (
            f"none of the {data.train:,} training examples has a prompt: LoRA learns the form of such a text rather "
            "than its facts; write prompts and completions, or retrieve the facts when the model is asked"
        )
    supervised = data.tokens - data.masked
    if job.method in _LOW_RANK and job.lora.rank > _SMALLEST_RANK and parameters > _PARAMETERS_PER_TOKEN * supervised:
        yield (
            f"rank {job.lora.rank} trains {parameters:,} parameters on {supervised:,} supervised tokens, "
            f"{parameters // max(1, supervised):,} for each; lower lora.rank, or add examples"
        )


def _of_the_schedule(job: TrainConfig) -> Iterator[str]:
    training = job.training
    if training.optimizer == "sgd" and training.lr_scheduler_type in ("constant", "constant_with_warmup"):
        yield (
            f"sgd keeps its learning rate of {training.learning_rate:g} to the end, and does not settle; set "
            "training.lr_scheduler_type: cosine"
        )


def _of_epochs(data: DataReport, epochs: float) -> Iterator[str]:
    if data.eval or epochs <= _SEVERAL_EPOCHS:
        return
    if epochs > _MANY_EPOCHS and data.train < _FEW_EXAMPLES:
        yield (
            f"{epochs:.0f} epochs over {data.train:,} examples will likely be learned by heart, and there is no eval "
            "set to show it; set data.eval_fraction: 0.1, or lower training.num_train_epochs"
        )
    else:
        yield f"{epochs:.0f} epochs without an eval set do not show over-fitting; set data.eval_fraction: 0.05"
