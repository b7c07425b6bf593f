"""What a method of training says of itself: the config that is exported, and how its tensors begin.

Everything else follows from the config: which tensors there are, what they come to at each module, and what a file
calls them is known to `loramux_adapters.formats`, which reads such files for the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loramux_adapters.formats.peft.tuner import Shape, Target
from loramux_adapters.spec import BaseModelSpec, ModuleSpec
from loramux_trainer.fleet.parameters import FlatParameters, Role
from loramux_trainer.fleet.random import generator


@dataclass(frozen=True, eq=False)
class Start:
    """One tensor's first values; `role` None: a constant, which is exported and not trained."""

    values: torch.Tensor
    role: Role | None


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor of the file that is made of others, which are trained in its place: what an encoder gives, or a factor
    beside a frozen one. `make` is plain operations of torch, of tensors by their names in `starts`.
    """

    starts: Mapping[str, Start]
    make: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a rule may look at. `module` is empty, and `target` None, for a tensor that all modules share."""

    module: str
    spec: ModuleSpec | None
    target: Target | None
    shape: Shape
    generator: torch.Generator  # of this tensor alone


class Control:
    """What a method does between steps, besides what its optimizer does: nothing, where it does not say otherwise."""

    is_exact = True
    """Whether what is exported is what is trained, and not an approximation that was asked for."""

    def wants_gradients(self, step: int) -> tuple[str, ...]:
        """Modules whose frozen weights' gradients it asks for before 0-based `step`."""
        return ()

    def take_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """They [out, in], by module, on the CPU."""

    def after_step(self, step: int) -> None:
        """After the optimizer's 1-based `step`; the gradients are still there."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over a state. Raises KeyError or RuntimeError where it is another's."""

    def finish(
        self, config: dict[str, Any], tensors: dict[tuple[str, str], torch.Tensor]
    ) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
        """Config and tensors, by module and role, as they are exported."""
        return config, tensors


Rule = Callable[[Beginning], Start | Made]
"""How the tensors of one role begin."""


@dataclass(frozen=True, eq=False)
class Method:
    """One method with the options of a job: `config` is the adapter_config.json, without what says which base."""

    config: Mapping[str, Any]
    seed: int
    rules: Mapping[str, Rule]  # by role
    found: Callable[[Target], Mapping[str, Shape]] = field(default=lambda _: {})
    """Shapes that the config does not say, see `Target.shapes`."""
    penalty: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None
    """Of the trained tensors by name: comes to the loss of every step."""
    control: Callable[[FlatParameters], Control] = lambda _: Control()

    def start(self, module: str, base: BaseModelSpec, target: Target | None, role: str, shape: Shape) -> Start | Made:
        """How a tensor begins. Raises ValueError for a role that the method does not know."""
        rule = self.rules.get(role)
        if rule is None:
            raise ValueError(f"{self.config.get('peft_type')}: nothing says how {role} of {module or 'all'} begins")
        own = generator(self.seed, f"{module}:{role}")
        return rule(Beginning(module, base.modules.get(module), target, tuple(shape), own))
