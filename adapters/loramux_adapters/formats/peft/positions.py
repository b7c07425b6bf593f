"""Weights that change at some positions only, by values the file has: SHiRA, Super-Tuning, WaveFT, FourierFT."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.peft.config import bad_key
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import WeightChange

MAX_DRAWN = 1 << 20
# From here on torch.randperm draws otherwise (torch 2.13: its swaps would be biased by 32 bits).
_LARGEST = 0xFFFFFFFF // 20
"""Positions of one module that are drawn from a seed: each takes about a microsecond."""


@dataclass(frozen=True, eq=False)
class AddAt(WeightChange):
    """W, and values at some of its positions. Takes no second W."""

    positions: torch.Tensor  # [n], row-major, each once
    values: torch.Tensor  # [n], float32

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        weight.view(-1)[self.positions] += self.values
        return weight


def add_at(positions: torch.Tensor, values: torch.Tensor) -> AddAt:
    """Values [n] at positions [n]; those at the same one add up."""
    once, which = torch.unique(positions, return_inverse=True)
    return AddAt(once, torch.zeros(len(once)).index_add_(0, which, values.float()))


def whole_numbers(tensor: torch.Tensor, below: int, module: str, what: str) -> torch.Tensor:
    """`tensor` as int64. Raises AdapterInvalid where it holds anything but whole numbers from 0 to `below` - 1."""
    numbers = tensor.long()
    if not bool(((numbers == tensor) & (numbers >= 0) & (numbers < below)).all()):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: {what} of module {quote(module)} is not whole numbers from 0 to {below - 1}",
            subject=f"{WEIGHTS_FILE}: {quote(module)}",
            remedy="upload an adapter made for this base",
        )
    return numbers


@dataclass
class Drawn:
    """Positions that PEFT draws anew from a seed whenever it loads a file.

    PEFT takes the beginning of torch.randperm of a CPU generator: the swaps of Fisher and Yates, each by the remainder
    of 32 bits of MT19937. They are drawn by numpy's RandomState here, whose stream is frozen (NEP 19), so that they do
    not depend on the version of torch, and only as many as are taken.
    """

    seed: int
    key: str
    _most: dict[int, int] = field(default_factory=dict)
    _known: dict[int, torch.Tensor] = field(default_factory=dict)

    def expect(self, size: int, count: int) -> None:
        """`of` will be called so: the most that are expected are drawn at once."""
        self._most[size] = max(count, self._most.get(size, 0))

    def of(self, size: int, count: int) -> torch.Tensor:
        """`count` of the positions below `size`, in the order in which they are drawn.

        Raises AdapterInvalid for more than MAX_DRAWN, or a size that torch draws otherwise.
        """
        most = max(count, self._most.get(size, 0))
        if most > MAX_DRAWN or size >= _LARGEST:
            raise bad_key(
                self.key,
                f"draws {most} of {size} positions, this server draws {MAX_DRAWN} of {_LARGEST - 1} at most",
                "train fewer of them",
            )
        known = self._known.get(size)
        if known is None or len(known) < count:
            known = self._known[size] = _draw(size, most, self.seed)
        return known[:count]


def _draw(size: int, count: int, seed: int) -> torch.Tensor:
    bits = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    drawn = []
    for place, number in enumerate(bits.tolist()):
        other = place + number % (size - place)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return torch.tensor(drawn)


def check_fits(key: str, count: int, size: int, module: str) -> None:
    """Raises AdapterInvalid where more positions are meant than the weight of a module has."""
    if count > size:
        raise AdapterInvalid(
            f"{CONFIG_FILE}: {key}: {count} is more than the {size} weights of {quote(module)}",
            subject=f"{CONFIG_FILE}: {key}",
            remedy="save config and weights together",
        )
