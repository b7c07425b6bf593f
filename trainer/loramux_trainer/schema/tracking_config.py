"""Where the curves of a run go. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

from loramux_adapters.validation import Section, YesNo

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


def _several(value: object) -> object:
    """transformers takes one name, or none, too."""
    if value in (None, "none", ["none"]):
        return ()
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class TrackingConfig(Section):
    """Trackers that get a run of the job's name, with its losses, learning rate and gradient norm; `plot`: loss.png."""

    report_to: Annotated[tuple[TrackerName, ...], BeforeValidator(_several)] = ()
    plot: YesNo = False
