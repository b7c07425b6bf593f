"""What a kind of part says of itself: its tensors in host memory, how they reach a slot, and how they act.

    y = output_gain * (W (input_gain * x) + B A (input_gain * x)) + bias

is what all kinds together make of a frozen W; each is one share of it. Whoever loops over parts knows none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.finite import is_finite
from loramux_adapters.parts.site import Site, SiteKind, StepRows


@dataclass(frozen=True, eq=False)
class Part:
    """One kind's share of what an adapter does to one module, in host memory. Subclasses are the kinds."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them: what the part takes of host memory."""
        return tuple(value for value in vars(self).values() if isinstance(value, torch.Tensor))


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class PartCost:
    """What a part takes on the device: rank rows of the module's pool, and bytes beside them."""

    rank_rows: int = 0
    nbytes: int = 0


class SiteParts(ABC, Generic[P]):
    """The parts of one kind at one site, of all slots.

    `cost` and `prepare` touch host memory only and may run on any thread. The rest belongs to whoever runs the steps,
    between two of them; `before` and `after` are called within one.
    """

    def __init__(self, site: Site) -> None:
        self.site = site

    @abstractmethod
    def cost(self, part: P) -> PartCost:
        """What `part` will take."""

    @abstractmethod
    def prepare(self, member: int, part: P) -> tuple[torch.Tensor, ...]:
        """The tensors that `write` copies, in the compute dtype.

        Raises AdapterIncompatible where a value is not finite in it.
        """

    def work(self, member: int, part: P) -> int:
        """Bytes that `write` reads of the base to compute what it keeps: they count as if they were copied."""
        return 0

    @abstractmethod
    def write(
        self, slot: int, member: int, part: P, prepared: Sequence[torch.Tensor], rank_rows: tuple[int, int] | None
    ) -> None:
        """Copies what `prepare` gave to the device; `rank_rows` is (first, number) of those given to it, if any.

        What needs the base's own weight is computed here, see `Site.frozen_weight`.
        """

    @abstractmethod
    def bind(self, slot: int) -> None:
        """What was written to `slot` counts from the next step on. Called again if it raised."""

    @abstractmethod
    def unbind(self, slot: int) -> None:
        """What was written or bound to `slot`, if anything, counts no more. Called again if it raised."""

    @abstractmethod
    def has(self, slot: int) -> bool:
        """Whether something is bound to `slot` here."""

    def before(self, x: torch.Tensor, member: int, step: StepRows) -> torch.Tensor:
        """What a member reads in place of x [T, in]: x itself, or a new tensor."""
        return x

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Changes the site's output y [T, out] in place; `inputs` [T, in] is what each member read."""

    def extend(self, y: torch.Tensor, x: torch.Tensor, step: StepRows) -> None:
        """Fills columns of y [T, > out] beyond the site's own, for x [T, in]; merged rows are among them."""


Fold = Callable[[torch.Tensor, torch.Tensor, Any], None]


@dataclass(frozen=True, eq=False)
class Share(Generic[P]):
    """One adapter's part where several adapters act together, and by how much its effect is multiplied."""

    part: P
    weight: float


Combine = Callable[[Sequence[Share[Any]]], Part | None]


@dataclass(frozen=True, eq=False)
class Kind:
    """One line of the registry: a type of part, the class for each kind of site it may be at, and what else it needs.

    `fold` merges a part into a weight [out, in] and a bias [out] of one member, both float32, in place. `combine` makes
    one part of the shares that several adapters have at one place, or None where there is none that is exact.
    """

    part: type[Part]
    sites: Mapping[SiteKind, type[SiteParts[Any]]]
    fold: Fold
    combine: Combine
    in_weight: bool = False  # changes the weight of a linear map or an embedding: another weight can do what it does
    changes_input: bool = False  # has a `before`
    is_pooled: bool = False  # has its device memory from the start, at every site it may be at
    for_virtual_ids: bool = False  # acts on rows of virtual tokens alone
    unfoldable: str = ""  # why it is in no weight: an adapter of it alone is not merged

    def at(self, site: Site) -> SiteParts[Any]:
        """An empty one. Raises AdapterIncompatible where the kind has no meaning."""
        made = self.sites.get(site.kind)
        if made is None:
            raise AdapterIncompatible(
                f"{site.members[0]}: {self.part.__name__} has no meaning for a module of kind {site.kind}",
                subject=site.members[0],
                remedy="train without it there",
            )
        return made(site)


def no_sum(_shares: Sequence[Share[Any]]) -> None:
    """The `combine` of kinds whose parts have no sum."""
    return


def finite(name: str, cast: torch.Tensor) -> torch.Tensor:
    """`cast` itself. Raises AdapterIncompatible where a value is not finite."""
    if not is_finite(cast):
        raise AdapterIncompatible(
            f"{name}: the scaled weights are not finite in {str(cast.dtype).removeprefix('torch.')}",
            subject=name,
            remedy="serve with --dtype float32, or train with a smaller alpha / r",
        )
    return cast
