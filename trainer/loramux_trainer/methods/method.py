"""What a method of training says of itself: the config that is exported, and how its tensors begin.

Everything else follows from the config: which tensors there are, what they come to at each module, and what a file
calls them is known to `loramux_adapters.formats`, which reads such files for the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loramux_adapters.formats.peft.tuner import Shape, Target
from loramux_trainer.fleet.parameters import Role


@dataclass(frozen=True, eq=False)
class Start:
    """One tensor's first values; `role` None: a constant, which is exported and not trained."""

    values: torch.Tensor
    role: Role | None


class Method(Protocol):
    """One method with the options of a job."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The adapter_config.json of what is trained, without what says which base."""
        ...

    def shapes(self, module: str, target: Target) -> Mapping[str, Shape]:
        """The tensors of a module, by role."""
        ...

    def start(self, module: str, role: str, shape: Shape) -> Start:
        """How a tensor begins; `module` is empty for those that all modules share."""
        ...
