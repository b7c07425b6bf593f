"""An adapter in training: the tensors of its file, in a flat buffer, and the parts that they come to.

Made from nothing but the config that will be exported and first values, by the code that reads such files: whatever the
server reads exactly can be trained exactly. Knows no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.fleet.parameters import FlatParameters, Parameter
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.methods.layouts import layout_of
from loramux_trainer.methods.method import Made, Method, Start


class TrainedAdapter:
    """The tensors of one adapter, by module and role. Raises AdapterError where the config has no meaning here."""

    def __init__(self, method: Method, base: BaseModelSpec, device: torch.device) -> None:
        self.config, self._base = dict(method.config), base
        self.layout = layout_of(self.config, base)
        shapes = list(self.layout.shapes(method.found))
        self._parameters: list[Parameter] = []
        self._constants: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[str, str]] = {}  # name -> (module, role)
        self._makes: dict[str, Made] = {}  # of names that are made of others
        for module, role, shape in shapes:
            name = f"{module}:{role}"
            self._places[name] = (module, role)
            start = method.start(module, base, self.layout.target(module), role, shape)
            if isinstance(start, Made):
                self._makes[name] = start
                for part, own in start.starts.items():
                    self._add(f"{name}:{part}", own, device)
            else:
                self._add(name, start, device)
        self.parameters = FlatParameters(self._parameters, device)
        self._penalty = method.penalty
        self._control = method.control(self.parameters)
        for module, role, shape in shapes:
            value = self._value(f"{module}:{role}", self.parameters.views)
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"{module}:{role} begins as {tuple(value.shape)}, its file has {tuple(shape)}")

    def _add(self, name: str, start: Start, device: torch.device) -> None:
        if start.role is None:
            self._constants[name] = start.values.float().to(device)
        else:
            self._parameters.append(Parameter(name, start.role, start.values))

    def _value(self, name: str, trained: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A tensor of the file, by the tensors that are trained."""
        made = self._makes.get(name)
        if made is not None:
            return made.make({part: self._value(f"{name}:{part}", trained) for part in made.starts})
        return self._constants[name] if name in self._constants else trained[name]

    @property
    def exports_exactly(self) -> bool:
        """See Control."""
        return self._control.is_exact

    @property
    def virtual_tokens(self) -> int:
        """Positions before every prompt."""
        return self.layout.virtual_tokens

    def parts(self, *, with_gradients: bool) -> StepParts:
        """What the tensors come to now. Raises AdapterError where that is not finite."""
        with torch.set_grad_enabled(with_gradients):
            views = self.parameters.leaves() if with_gradients else self.parameters.views
            parts = self.layout.parts(self._by_module(views))
            penalty = self._penalty(views) if with_gradients and self._penalty is not None else None
            return StepParts(parts, penalty)

    def wants_gradients(self, step: int) -> tuple[str, ...]:
        """Modules whose frozen weights' gradients are wanted before 0-based `step`."""
        return self._control.wants_gradients(step)

    def take_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """They [out, in], by module."""
        self._control.take_gradients(gradients)

    def after_step(self, step: int) -> None:
        """To be called after the optimizer's 1-based `step`, before the gradients are cleared."""
        self._control.after_step(step)

    def tensors(self) -> dict[str, torch.Tensor]:
        """State beside the parameters."""
        return self._control.tensors()

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over such a state. Raises KeyError or RuntimeError where it is another's."""
        self._control.restore(tensors)

    @torch.no_grad()
    def files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The config, and name in the file -> tensor: float32 copies on the CPU."""
        views = self.parameters.views
        tensors = {place: self._value(name, views).cpu().clone() for name, place in self._places.items()}
        config, tensors = self._control.finish(dict(self.config), tensors)
        return config, {self.layout.name(*place): tensor.contiguous() for place, tensor in tensors.items()}

    def _by_module(self, values: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, (module, role) in self._places.items():
            found.setdefault(module, {})[role] = self._value(name, values)
        return found
