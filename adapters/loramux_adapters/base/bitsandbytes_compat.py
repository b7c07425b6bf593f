"""What we use of bitsandbytes, imported here and nowhere else, so that one piece of its advice is never given, and
nothing of it is compiled.

Without the package `kernels` it recommends, at every import on a CPU, to install it; with it, it fetches another
4-bit kernel from a hub, unasked and unpinned, and the layouts we depend on would be that kernel's.
`loramux doctor` warns of the package instead. Whatever else bitsandbytes has to say is let through.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

_ADVISER = "bitsandbytes.backends.cpu.ops"
_ADVICE = "Failed to load CPU gemm_4bit_forward from kernels-community"


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVICE)


logging.getLogger(_ADVISER).addFilter(_is_wanted)


def _as_written(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of torch.compile, called or used as a decorator.

    bitsandbytes hands it four functions at import, of 8-bit optimizers and of devices without kernels of their own,
    which imports the whole of inductor: 2.3 of the 13 seconds of CPU time that the imports of a server took (medians,
    an AMD EPYC core). They are left as they are written, which is also what it falls back to.
    """
    return _as_written if function is None else function


with mock.patch.object(torch, "compile", _as_written):
    from bitsandbytes import functional, matmul_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit

__all__ = ["AdamW8bit", "Linear4bit", "PagedAdamW", "PagedAdamW8bit", "Params4bit", "functional", "matmul_4bit"]
