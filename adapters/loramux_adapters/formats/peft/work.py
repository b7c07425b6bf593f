"""What reading an adapter takes beyond its bytes: a number from shapes alone, judged before any data is read.

One thread reads the uploads of all tenants, and the copy to a slot stands between two steps of everybody: what a file
costs there must not be its author's choice. Torch-free; knows no method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import ModuleSpec

Shape = tuple[int, ...]

# How many multiply-adds of a large float32 product take as long, on one core (measured at 38e9 a second):
PASS: Final = 64
"""One number read and written, by any elementwise operation."""
GATHER: Final = 128
"""One number taken from elsewhere, scaled and added."""
SORT: Final = 4096
"""One number of a million sorted."""
DRAW: Final = 32_768
"""One position drawn from a seed."""

_ITEM_BYTES = 4  # canonical parts are float32


@dataclass(frozen=True)
class Work:
    """What one module takes. Multiply-adds, or what takes as long, and bytes of host memory."""

    reading: int = 0  # multiply-adds at a publish, and at each load: from the file to the canonical parts
    making: int = 0  # multiply-adds of its own weight where it is copied to a slot
    kept: int = 0  # bytes of the canonical parts
    scratch: int = 0  # bytes beside them while they are made


def elements(shapes: Iterable[Shape]) -> int:
    """Of tensors together."""
    return sum(map(math.prod, shapes))


def work_of(kept: int, *, reading: int = 0, making: int = 0, scratch: int = 0) -> Work:
    """Of a module whose canonical parts have `kept` elements, each touched once, and that takes more `reading`."""
    return Work(PASS * kept + reading, making, _ITEM_BYTES * kept, scratch)


def check_work(
    works: Mapping[str, Work],
    tensors: Mapping[str, str],
    modules: Mapping[str, ModuleSpec],
    limits: ReadLimits,
    remedy: str,
) -> None:
    """Raises AdapterIncompatible for an adapter that would take too long or too much memory.

    All by name of module: `works`, and one of its tensors in `tensors`. `remedy` is the method's.
    """
    for name, work in works.items():
        module = modules.get(name)
        if module is not None and work.making:
            out, wide = module.out_features, module.in_features
            # As much as the product of the weight and a square matrix, whatever the size of the base.
            most = out * wide * (max(out, wide) + limits.max_rank)
            _check(work.making, most, "multiply-adds to make its weight", name, tensors, remedy)
    reading, kept = sum(work.reading for work in works.values()), sum(work.kept for work in works.values())
    scratch = max((work.scratch for work in works.values()), default=0)
    hardest = max(works, key=lambda name: works[name].reading, default="")
    largest = max(works, key=lambda name: works[name].kept + works[name].scratch, default="")
    _check(reading, limits.max_multiply_adds, "multiply-adds to read it", hardest, tensors, remedy)
    _check(kept + scratch, limits.max_canonical_bytes, "bytes of memory to read it", largest, tensors, remedy)


def _check(number: int, most: int, what: str, module: str, tensors: Mapping[str, str], remedy: str) -> None:
    if number > most:
        tensor = quote(tensors.get(module, module))
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE}: the adapter takes {number:.2g} {what}, this server takes at most {most:.2g}; most of it "
            f"is for tensor {tensor}",
            subject=f"{WEIGHTS_FILE}: {tensor}",
            remedy=remedy,
        )
