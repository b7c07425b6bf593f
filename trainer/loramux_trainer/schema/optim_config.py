"""The section of a job that says how its parameters are optimized. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from loramux_adapters.validation import Number, Section, Whole, YesNo
from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.fields import Count, Positive, Share, two
from loramux_trainer.schema.schedule_config import ScheduleName, ScheduleOptions, check_options, warmup_length

T = TypeVar("T")
OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "lion", "muon", "sophia"
]  # fmt: skip

# Per optimizer, the defaults of its paper or library; adamw's also for those that are AdamW in another memory.
_BETAS: Mapping[str, tuple[float, float]] = {"lion": (0.9, 0.99), "sophia": (0.96, 0.99)}
_MOMENTUM: Mapping[str, float] = {"sgd": 0.0, "muon": 0.95}
_HESSIAN_PERIOD = 10
_OF_THE_OPTIMIZER = cast("tuple[float, float]", ())


@dataclass(frozen=True)
class OptimConfig(Section):
    """The optimization.

    `max_steps` overrides `num_train_epochs`; `warmup_steps` below 1 is a share of all steps, else steps.
    `betas`, `momentum` and `hessian_update_period` become the optimizer's defaults where they are not given; the last
    two stay None with an optimizer that has none.
    """

    learning_rate: Annotated[Positive, Field(le=1)] = 2e-4
    lr_scheduler_type: ScheduleName = "cosine"
    lr_scheduler_kwargs: ScheduleOptions = field(default_factory=ScheduleOptions)
    num_train_epochs: Count = 3
    max_steps: Count | None = None
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.03
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    max_grad_norm: Positive | None = 1.0
    optimizer: OptimizerName = "adamw"
    weight_decay: Share = 0.0
    betas: Annotated[tuple[Share, Share], BeforeValidator(two)] = _OF_THE_OPTIMIZER
    momentum: Share | None = None
    hessian_update_period: Count | None = None  # steps
    seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 elsewhere
    frozen_products: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: as compute_dtype
    double_quant: YesNo = False  # of the base, see `loramux serve --double-quant`
    deterministic: YesNo = False
    gradient_checkpointing: YesNo = False
    eval_steps: Count | None = None  # None: each epoch
    early_stopping_patience: Count | None = None  # evaluations without a lower loss; None: all steps are taken
    early_stopping_threshold: Annotated[Number, Field(ge=0)] = 0.0  # how much lower
    load_best_model_at_end: YesNo = False  # of the evaluations

    @property
    def is_guarded(self) -> bool:
        """Whether the eval loss decides what is exported."""
        return self.early_stopping_patience is not None or self.load_best_model_at_end

    def __post_init__(self) -> None:
        defaults: dict[str, Any] = {
            "betas": _BETAS.get(self.optimizer, (0.9, 0.999)),
            "momentum": _MOMENTUM.get(self.optimizer),
            "hessian_update_period": _HESSIAN_PERIOD if self.optimizer == "sophia" else None,
        }
        for key, default in defaults.items():
            if getattr(self, key) in (None, _OF_THE_OPTIMIZER):
                object.__setattr__(self, key, default)

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _fits_the_schedule(cls, options: ScheduleOptions, others: ValidationInfo) -> ScheduleOptions:
        if {"learning_rate", "lr_scheduler_type"} <= set(others.data):
            try:
                check_options(others.data["lr_scheduler_type"], options, others.data["learning_rate"])
            except JobInvalid as error:
                raise ValueError(error.message) from error
        return options

    @field_validator("warmup_steps")
    @classmethod
    def _leaves_steps(cls, warmup: float, others: ValidationInfo) -> float:
        if others.data.get("max_steps") is not None:  # how many steps the epochs are depends on the data
            try:
                warmup_length(warmup, others.data["max_steps"])
            except JobInvalid as error:
                raise ValueError(error.message) from error
        return warmup
