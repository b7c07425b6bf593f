"""What must be said to the OpenMP runtime before it is loaded. Imports nothing."""

from __future__ import annotations

import os
import sys

_VARIABLE = "GOMP_SPINCOUNT"
SPINS = "0"


def limit_spinning() -> bool:
    """Let libgomp's threads sleep where they wait; False when torch is loaded already, which brings the runtime: too
    late then.

    By default they spin at the end of a parallel region for as long as their scheduler lets them; on cores shared with
    other work they then spin away the time their partner needs. A value of the user's own stays.
    """
    if _VARIABLE in os.environ:
        return True
    os.environ[_VARIABLE] = SPINS
    return "torch" not in sys.modules
