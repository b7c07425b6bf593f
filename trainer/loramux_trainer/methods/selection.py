"""Keys of a PEFT config that select exactly some modules, each with its rank and alpha.

Found by asking the reader of such configs what each candidate selects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loramux_adapters.errors import AdapterError
from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.methods.layouts import PeftLayout
from loramux_trainer.targets import ModuleShape


def select(config: Mapping[str, Any], names: Sequence[str], base: BaseModelSpec) -> dict[str, Any]:
    """`config` with the target_modules that select `names`: their last name parts where those say it, else full names.

    Raises ValueError where no list of names does.
    """
    endings = sorted({name.rpartition(".")[2] for name in names})
    for targets in (endings, sorted(names)):
        candidate = {**config, "target_modules": targets}
        try:
            found = set(PeftLayout(candidate, base).modules)
        except AdapterError:
            continue
        if found == set(names):
            return candidate
    raise ValueError("these modules cannot be told apart by name in a PEFT config")


def ranks(shapes: Mapping[str, ModuleShape], *, alpha: str) -> dict[str, Any]:
    """r, alpha (under the key that the method has for it) and the patterns of modules that have others."""
    rank, rank_pattern = _pattern({name: shape.rank for name, shape in shapes.items()})
    common, alpha_pattern = _pattern({name: shape.alpha for name, shape in shapes.items()})
    return {"r": rank, "rank_pattern": rank_pattern, alpha: common, "alpha_pattern": alpha_pattern}


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value (the largest of equally common ones), and the others by full name."""
    counts = Counter(values.values())
    common = max(counts, key=lambda value: (counts[value], value))
    return common, {f"^{name}": value for name, value in sorted(values.items()) if value != common}
