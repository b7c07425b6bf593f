"""What must be said to the OpenMP runtime before it is loaded. Imports nothing."""

from __future__ import annotations

import os
import sys

_VARIABLE = "GOMP_SPINCOUNT"
_SPINS = "30000"


def limit_spinning() -> bool:
    """Let libgomp's threads spin briefly; False when torch is loaded already, which brings the runtime: too late then.

    They spin at the end of a parallel region for as long as their scheduler lets them; on cores shared with others they
    then spin away the time their partner needs. With a short spin a decode step was 4 to 10 times faster on two busy
    cores, and as fast as before on idle ones. A value of the user's own stays.
    """
    if _VARIABLE in os.environ:
        return True
    os.environ[_VARIABLE] = _SPINS
    return "torch" not in sys.modules
