"""What the C library does with memory that a step frees: it is kept for the next step.

Given back, as is its habit with what is large, it would come again as new pages, which the system zeroes one by one.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = -1
_OF_HEAP = 1 << 30  # bytes: larger blocks are mapped, and given back
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """For the whole process, from now on. False where the C library has no such choice, or the user has made it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for name in _SET_BY_USER):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _OF_HEAP)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
