"""A job on a base as a member of a fleet: its method, loss, optimizer, schedule and order of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from loramux_adapters.errors import AdapterError
from loramux_trainer.batches import StepOrder
from loramux_trainer.data.dataset import DataSet
from loramux_trainer.data.examples import Example
from loramux_trainer.errors import JobInvalid
from loramux_trainer.fleet.member import Member, MemberOptions
from loramux_trainer.fleet.model import FleetModel
from loramux_trainer.job import TrainConfig
from loramux_trainer.losses.select import build_loss, check_batch_size
from loramux_trainer.methods.build import Surroundings, build_method
from loramux_trainer.methods.factors import OF_DATA, OF_WEIGHTS, Factors
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.optimizers.build import build_optimizer
from loramux_trainer.preparation import JobData
from loramux_trainer.schedule import learning_rate
from loramux_trainer.targets import ModuleShape, modules_of

_MICRO_BATCHES_LOOKED_AT = 8
"""Of training data, by initializations that look at it."""


@dataclass(frozen=True)
class BuiltMember:
    """What a job has become."""

    member: Member
    adapter: TrainedAdapter
    eval_every: int
    steps_per_epoch: int


def build_member(prepared: JobData, model: FleetModel, tell: Callable[[str], None]) -> BuiltMember:
    """Raises JobInvalid and DeviceInvalid where something that is asked for would not take effect."""
    job, data, base = prepared.job, prepared.data, model.base
    training = job.training
    loss = build_loss(job.loss, max_length=job.data.max_length)
    check_batch_size(loss, training.batch_size)
    if training.is_guarded and not data.eval:
        key = "load_best_model_at_end" if training.load_best_model_at_end else "early_stopping_patience"
        raise JobInvalid(f"training.{key}", "the eval set is empty; raise data.eval_fraction, or set data.eval")
    order = StepOrder.of(job.training, [unit.tokens for unit in data.train])
    total = training.max_steps if training.max_steps is not None else training.num_train_epochs * order.steps_per_epoch
    shapes = modules_of(job, base.spec)
    values = BaseValues(base)
    factors = _factors(job, model, values, shapes, order, data)
    around = Surroundings(
        base,
        values,
        shapes,
        total,
        tell,
        pairs=factors.pair if factors is not None and job.init != "eva" else None,
        components=factors.components if factors is not None and job.init == "eva" else None,
        encode=partial(prepared.reading.tokenizer.encode, add_special_tokens=False),
    )
    try:
        adapter = TrainedAdapter(build_method(job, around), base.spec, base.device)
    except AdapterError as error:
        raise JobInvalid("method", f"{job.method}: {error}") from error
    if not adapter.parameters.groups:
        raise JobInvalid("method", f"{job.method} trains nothing on {base.spec.model_id}")
    options = MemberOptions(
        total,
        lambda step: learning_rate(training, step, total),
        max_grad_norm=training.max_grad_norm,
        dropout=job.lora.dropout,
        seed=training.seed,
    )
    learning_rate(training, 0, total)  # refuses a warm-up that leaves no step
    member = Member(
        job.run_name,
        adapter,
        loss,
        partial(build_optimizer, training, loraplus_lr_ratio=job.lora.loraplus_lr_ratio),
        order,
        data.train,
        data.eval,
        options,
    )
    return BuiltMember(member, adapter, training.eval_steps or order.steps_per_epoch, order.steps_per_epoch)


def _factors(
    job: TrainConfig,
    model: FleetModel,
    values: BaseValues,
    shapes: dict[str, ModuleShape],
    order: StepOrder,
    data: DataSet,
) -> Factors | None:
    if job.init not in (*OF_WEIGHTS, *OF_DATA):
        return None
    embeddings = [name for name in shapes if model.base.spec.modules[name].kind == "embedding"]
    if embeddings:
        raise JobInvalid(
            "init",
            f"{job.init} finds no factors for {embeddings[0]}, an embedding; use A, or leave it out of the targets",
        )
    batches: list[Sequence[Example]] = []
    step = 0
    while job.init in OF_DATA and len(batches) < _MICRO_BATCHES_LOOKED_AT and step < order.steps_per_epoch:
        batches += [[row for i in batch for row in data.train[i].rows] for batch in order.micro_batches(step)]
        step += 1
    return Factors(job.init, model, values, shapes, batches[:_MICRO_BATCHES_LOOKED_AT])
