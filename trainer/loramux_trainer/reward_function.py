"""What scores the answers of loss grpo: a function of the user's, by the name that the job gives it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

from loramux_trainer.errors import JobInvalid

RewardFunction = Callable[..., list[float | None]]
"""As trl calls it: `(prompts, completions, completion_ids, **columns)` -> a score each, None for none."""

_KEY = "loss.reward_function"


def load_reward_function(entry_point: str) -> RewardFunction:
    """The function of `module:function`, where the module is one that can be imported, or a file's path.

    Runs the module. Raises JobInvalid.
    """
    module_name, _, name = entry_point.rpartition(":")
    try:
        module = _module_of(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        raise JobInvalid(_KEY, f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        what = "has no function" if found is None else "is no function:"
        raise JobInvalid(_KEY, f"{module_name} {what} {name}")
    function: RewardFunction = found
    return function


def _module_of(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("loramux_reward_function", name)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
