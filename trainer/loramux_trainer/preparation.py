"""What a fleet's jobs share before the first step: data in tokens, the base loaded and examined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from loramux_adapters.base.load import BaseRefused, LoadedBase, load_base, quantized_modules
from loramux_adapters.device import DeviceRefused, best_dtype, check_dtype, select_device
from loramux_adapters.embedded.tiny import TINY_NAME, tiny_path
from loramux_adapters.guard.examine import Examined, examine
from loramux_trainer.base_reading import BaseReading, loading, read_base
from loramux_trainer.data.dataset import DataSet, check_context, load_data
from loramux_trainer.errors import DeviceInvalid, JobInvalid, ModelInvalid, Problems
from loramux_trainer.job import TrainConfig
from loramux_trainer.targets import modules_of


@dataclass(frozen=True, eq=False)
class JobData:
    """One job and its data in the base's tokens."""

    job: TrainConfig
    data: DataSet
    reading: BaseReading


def source_of(job: TrainConfig) -> str:
    """Where the base's files are."""
    return str(tiny_path()) if job.model == TINY_NAME else job.model


def read_job_data(job: TrainConfig) -> JobData:
    """All that can be refused without the base's weights. Raises JobInvalid, DataInvalid, SeveralInvalid."""
    reading = read_base(job, source_of(job))
    problems = Problems()
    with problems.collecting():
        modules_of(job, reading.outline)
    with problems.collecting():
        data = load_data(job.data, reading.encoder, loss=job.loss, seed=job.training.seed)
        longest = max(unit.longest for unit in (*data.train, *data.eval))
        check_context(longest + job.virtual_tokens, reading.outline.context_length)
    problems.raise_any()
    return JobData(job, data, reading)


def find_device(job: TrainConfig) -> torch.device:
    """Raises DeviceInvalid."""
    try:
        return select_device(job.training.device)
    except DeviceRefused as refusal:
        raise DeviceInvalid("training.device", str(refusal)) from refusal


def compute_dtype(job: TrainConfig, device: torch.device) -> torch.dtype:
    """Of everything but products with frozen weights. Raises DeviceInvalid."""
    if job.training.compute_dtype == "auto":
        return best_dtype(device) if device.type == "cuda" else torch.float32
    return _dtype("training.compute_dtype", job.training.compute_dtype, device)


def frozen_products(job: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Of products with frozen weights, where it is another. Raises DeviceInvalid."""
    if job.training.frozen_products == "auto":
        return None
    return _dtype("training.frozen_products", job.training.frozen_products, device)


def load(job: TrainConfig, device: torch.device, dtype: torch.dtype) -> LoadedBase:
    """The job's base. Raises ModelInvalid."""
    with loading(job):
        base = load_base(source_of(job), compute_dtype=dtype, device=device, double_quant=job.training.double_quant)
    _refuse_split_blocks(job, base)
    return base


def examine_base(base: LoadedBase, longest: int) -> Examined:
    """What a server asks of its base before it serves: an adapter for a base that is refused could never be used.

    Over `longest` positions, the most that training sees. Raises ModelInvalid.
    """
    try:
        return examine(base, min(base.spec.context_length, longest))
    except BaseRefused as refusal:
        raise ModelInvalid(f"{refusal}; an adapter trained on it could not be served") from refusal


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute each layer in the backward pass. Only the layers themselves are in training mode: no dropout."""
    # transformers 5 renames this method on its way.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise JobInvalid("training.gradient_checkpointing", str(error)) from error
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _dtype(key: str, name: str, device: torch.device) -> torch.dtype:
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    try:
        check_dtype(device, dtype)
    except DeviceRefused as refusal:
        raise DeviceInvalid(key, str(refusal)) from refusal
    return dtype


def _refuse_split_blocks(job: TrainConfig, base: LoadedBase) -> None:
    """bitsandbytes 0.50 on a CPU takes wrong scales where a block crosses a row: training would differ from serving."""
    if base.device.type != "cpu":
        return
    for name, module in quantized_modules(base.model):
        in_features = module.codes.shape[1] * 2
        if in_features % module.block_size:
            raise ModelInvalid(
                f"{name} of {job.model} has {in_features} inputs, no multiple of the {module.block_size} weights of an "
                "NF4 block, which bitsandbytes computes wrongly on a CPU; train it on a GPU, or another base",
            )
