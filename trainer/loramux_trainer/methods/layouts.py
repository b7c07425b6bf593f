"""What files of an adapter hold, from their config alone: tensors by module and role, and what they come to.

Thin over `loramux_adapters.formats`, which reads such files for the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from loramux_adapters.adapter_files import ADAPTERHUB_WEIGHTS_FILE, WEIGHTS_FILE
from loramux_adapters.formats.adapterhub.config import is_adapterhub, parse
from loramux_adapters.formats.adapterhub.interface import read_interface
from loramux_adapters.formats.adapterhub.reader import bottleneck_of, expected_tensors
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.reader import canonical_parts, resolve_targets
from loramux_adapters.formats.peft.tensors import BIAS, tensor_name
from loramux_adapters.formats.peft.tuner import Shape, Target
from loramux_adapters.formats.registry import parse_config
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec

LIMITS = ReadLimits(regex_seconds=60.0)
"""A job is the user's own: its patterns may take their time."""

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""Module -> role -> tensor; those that all modules share are under ""."""


class Layout(Protocol):
    """One config on one base."""

    weights_file: str
    virtual_tokens: int

    def target(self, module: str) -> Target | None:
        """How a module is adapted, where the format has something to say of it."""
        ...

    def shapes(self, found: Callable[[Target], Mapping[str, Shape]]) -> Iterator[tuple[str, str, Shape]]:
        """(module, role, shape) of every tensor; `found`: shapes that the config does not say."""
        ...

    def parts(self, tensors: Tensors) -> dict[str, tuple[Part, ...]]:
        """What they come to, by module, with gradients. Raises AdapterError where that is not finite."""
        ...

    def name(self, module: str, role: str) -> str:
        """In the file."""
        ...


def layout_of(config: Mapping[str, Any], base: BaseModelSpec) -> Layout:
    """Raises AdapterError where the config has no meaning on this base."""
    return HubLayout(config, base) if is_adapterhub(config) else PeftLayout(config, base)


class PeftLayout:
    """A PEFT directory."""

    weights_file = WEIGHTS_FILE

    def __init__(self, config: Mapping[str, Any], base: BaseModelSpec) -> None:
        self._base, self._tuner = base, parse_config(config)
        self._targets = resolve_targets(self._tuner, base, LIMITS)
        self.virtual_tokens = self._tuner.virtual_tokens

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that are adapted."""
        return tuple(self._targets.modules)

    def target(self, module: str) -> Target | None:
        """See Layout."""
        return self._targets.modules.get(module)

    def shapes(self, found: Callable[[Target], Mapping[str, Shape]]) -> Iterator[tuple[str, str, Shape]]:
        """See Layout."""
        yield from (("", role, tuple(shape)) for role, shape in self._targets.shared.items())
        for name, target in self._targets.modules.items():
            yield from ((name, role, tuple(shape)) for role, shape in target.shapes(found(target)).items())
        if self._tuner.bias != "none":
            names = self._base.modules if self._tuner.bias == "all" else self._targets.modules
            whole = {name for name, each in self._targets.modules.items() if "whole_bias" in (each.own_suffixes or {})}
            biased = [self._base.modules[name] for name in names if name in self._base.modules and name not in whole]
            yield from ((module.name, BIAS, (module.out_features,)) for module in biased if module.has_bias)

    def parts(self, tensors: Tensors) -> dict[str, tuple[Part, ...]]:
        """See Layout."""
        return canonical_parts(tensors, self._targets, self._base)

    def name(self, module: str, role: str) -> str:
        """See Layout."""
        return tensor_name(module, role, self._tuner, self._targets, self._base)


class HubLayout:
    """A directory of AdapterHub's package."""

    weights_file = ADAPTERHUB_WEIGHTS_FILE
    virtual_tokens = 0

    def __init__(self, config: Mapping[str, Any], base: BaseModelSpec) -> None:
        self._config = parse(config)
        self._config.check(base, read_interface({}, base, LIMITS))
        expected = expected_tensors(self._config, base)
        self._names = {(each.sublayer, each.role): name for name, each in expected.items() if not each.is_copy}
        self._shapes = {(each.sublayer, each.role): each.shape for each in expected.values()}

    def target(self, module: str) -> Target | None:
        """See Layout: it has none."""
        return None

    def shapes(self, found: Callable[[Target], Mapping[str, Shape]]) -> Iterator[tuple[str, str, Shape]]:
        """See Layout."""
        return ((module, role, shape) for (module, role), shape in self._shapes.items())

    def parts(self, tensors: Tensors) -> dict[str, tuple[Part, ...]]:
        """See Layout."""
        return {module: (bottleneck_of(own, self._config),) for module, own in tensors.items()}

    def name(self, module: str, role: str) -> str:
        """See Layout."""
        return self._names[module, role]
