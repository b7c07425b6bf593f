"""Whether the eval losses of a sweep's configurations can be compared: one loss on one evaluation set. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loramux_trainer.job import TrainConfig

_READING = (
    "max_length", "truncation", "completion_only_loss", "assistant_only_loss", "instruction_format", "columns",
    "ignore_columns",
)  # fmt: skip


def differing_key(jobs: Sequence[TrainConfig], configurations: Mapping[str, str]) -> str | None:
    """The first key by which what is measured differs between configurations, None where none does.

    `configurations`: run -> its configuration. Seeds of one configuration may have evaluation sets of their own, the
    same ones in each configuration.
    """
    found: dict[str, dict[str, set[str]]] = {}  # key -> configuration -> values
    for job in jobs:
        configuration = configurations.get(job.run_name, job.run_name)
        for key, value in _measured(job).items():
            found.setdefault(key, {}).setdefault(configuration, set()).add(repr(value))
    return next((key for key, values in found.items() if len(set(map(frozenset, values.values()))) > 1), None)


def _measured(job: TrainConfig) -> dict[str, object]:
    """Dotted key -> value of all that says what an eval loss is a mean of."""
    loss, data = job.loss, job.data
    is_split = data.eval is None
    return {
        "loss.name": loss.name,
        "loss.loss_type": loss.kind,
        "loss.beta": loss.strength if loss.name != "sft" else None,
        "loss.label_smoothing": loss.label_smoothing,
        "loss.desirable_weight": 1 if loss.desirable_weight is None else loss.desirable_weight,
        "loss.undesirable_weight": 1 if loss.undesirable_weight is None else loss.undesirable_weight,
        "data.eval": data.eval,
        "data.eval_fraction": data.eval_fraction,
        **{f"data.{key}": getattr(data, key) for key in _READING},
        "data.train": data.train if is_split else None,
        "training.seed": job.training.seed if is_split else None,  # which records are held out
    }
