"""One adapter's weights in canonical form: per module a tuple of parts, see `loramux_adapters.parts`.

Scales are folded in once, in float32, so that nothing after this point needs to know which rule a format used. Knows no
file, no device layout and no kind of part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from loramux_adapters.parts.part import Part
from loramux_adapters.spec import AdapterSpec

P = TypeVar("P", bound=Part)


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """What an adapter does to one module; at most one part of a kind."""

    parts: tuple[Part, ...] = ()

    def get(self, kind: type[P]) -> P | None:
        """The part of that kind."""
        return next((part for part in self.parts if isinstance(part, kind)), None)


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """A whole adapter in host memory, keyed by the base's module names."""

    spec: AdapterSpec
    modules: Mapping[str, ModuleWeights]

    @property
    def nbytes(self) -> int:
        """Host bytes of all tensors."""
        return sum(
            tensor.numel() * tensor.element_size()
            for module in self.modules.values()
            for part in module.parts
            for tensor in part.tensors
        )
