"""What must be said to the OpenMP runtime before it is loaded. Imports nothing."""

from __future__ import annotations

import os
import sys

_VARIABLE = "GOMP_SPINCOUNT"
SPINS = "1000"


def limit_spinning() -> bool:
    """Let libgomp's threads spin briefly; False when torch is loaded already, which brings the runtime: too late then.

    They spin at the end of a parallel region for as long as their scheduler lets them; on cores shared with others they
    then spin away the time their partner needs. A value of the user's own stays. Measured for SPINS, on 2 cores: 20
    training steps of the embedded base beside two busy loops take 23 s at 30000 spins and 2 s at 1000 and below; 40
    steps on idle cores 1.7, 1.9 and 2.4 s at 30000, 1000 and none, and decoding is 5 to 10 % slower at none.
    """
    if _VARIABLE in os.environ:
        return True
    os.environ[_VARIABLE] = SPINS
    return "torch" not in sys.modules
