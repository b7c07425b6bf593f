"""What the schema knows and the training loop cannot do yet: refused, never left out in silence. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from loramux_trainer.errors import JobInvalid, Problems
from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import JobFile
from loramux_trainer.schema.adapter_config import LoraConfig
from loramux_trainer.schema.sweep_config import FleetConfig

_NOT_BUILT = "is not built yet in this version"
_LORA_KEYS = (
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias",
    "trainable_token_indices", "loraplus_lr_ratio",
)  # fmt: skip


def check_built(job: TrainConfig) -> None:
    """Raises JobInvalid, or SeveralInvalid, for what the loop cannot train yet."""
    problems = Problems()
    for key, what in _not_built(job):
        problems.add(JobInvalid(key, f"{what} {_NOT_BUILT}"))
    problems.raise_any()


def check_file_built(file: JobFile) -> None:
    """The same of a file of jobs, whose jobs are looked at one by one."""
    if len(file.jobs) > 1 or file.sweep is not None:
        raise JobInvalid("jobs" if file.sweep is None else "sweep", f"a file of several jobs {_NOT_BUILT}")
    if file.fleet != FleetConfig():
        raise JobInvalid("fleet", f"this {_NOT_BUILT}")


def _not_built(job: TrainConfig) -> Iterator[tuple[str, str]]:
    if job.method not in ("lora", "rslora"):
        yield "method", job.method
    if job.init != "A":
        yield "init", job.init
    if job.loss.name != "sft":
        yield "loss", job.loss.name
    if job.training.optimizer != "adamw":
        yield "training.optimizer", job.training.optimizer
    if job.training.frozen_products != "auto":
        yield "training.frozen_products", job.training.frozen_products
    if job.training.deterministic:
        yield "training.deterministic", "true"
    # The loop hands its schedule neither options nor the peak rate.
    if job.training.lr_scheduler_kwargs.given():
        yield "training.lr_scheduler_kwargs", "this"
    elif job.training.lr_scheduler_type == "polynomial":
        yield "training.lr_scheduler_type", job.training.lr_scheduler_type
    default = LoraConfig()
    for key in _LORA_KEYS:
        if getattr(job.lora, key) != getattr(default, key):
            yield f"lora.{key}", "this"
