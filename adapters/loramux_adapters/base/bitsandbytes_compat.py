"""What we use of bitsandbytes, imported here and nowhere else, so that one piece of its advice is never given.

Without the package `kernels` it recommends, at every import on a CPU, to install it; with it, it fetches another
4-bit kernel from a hub, unasked and unpinned, and the layouts we depend on would be that kernel's.
`loramux doctor` warns of the package instead. Whatever else bitsandbytes has to say is let through.
"""

# ruff: noqa: E402 -- the advice is given while bitsandbytes is imported

from __future__ import annotations

import logging

_ADVISER = "bitsandbytes.backends.cpu.ops"
_ADVICE = "Failed to load CPU gemm_4bit_forward from kernels-community"


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVICE)


logging.getLogger(_ADVISER).addFilter(_is_wanted)

from bitsandbytes import functional, matmul_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit

__all__ = ["AdamW8bit", "Linear4bit", "PagedAdamW", "PagedAdamW8bit", "Params4bit", "functional", "matmul_4bit"]
