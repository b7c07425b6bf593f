"""What a GPU would pay for a step, counted on fake tensors: kernels, copies to the device, waits of the host.

FakeTensorMode checks devices, dtypes and shapes of every operation and computes nothing. What the host reads of a fake
tensor is a dummy: True, 0 or nothing found.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They make no kernel: they describe memory that is there, or memory that nobody has written.
NO_KERNEL = frozenset({
    "alias", "as_strided", "chunk", "detach", "detach_", "diagonal", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
    "_reshape_alias", "_unsafe_view",
})  # fmt: skip
ONE_KERNEL = frozenset({"scaled_dot_product_attention", "rms_norm", "layer_norm"})  # not to be taken apart
FOUND_BY_HOST = frozenset({"nonzero", "masked_select", "_unique2"})  # their size is known to the device first
OWN = ("/loramux_server/", "/loramux_adapters/")
SOURCES = (*OWN, "/transformers/", "/bitsandbytes/")

Place = tuple[str, int, str]
"""File (below its import root), line, function."""


def place() -> Place:
    """The line that asks for the operation, of ours before one of the libraries we call."""
    found: Place = ("?", 0, "?")
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for source in SOURCES if found[0] == "?" else OWN:
            if source in name:
                spot = (source[1:] + name.rpartition(source)[2], frame.f_lineno, frame.f_code.co_qualname)
                if source in OWN:
                    return spot
                found = spot
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Ledger(TorchDispatchMode):
    """Goes over a FakeTensorMode, see `counting`. `layer_kernels` are those of `kernels` within decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Place] = Counter()
        self.layer_kernels: Counter[Place] = Counter()
        self.to_device: Counter[Place] = Counter()
        self.syncs: Counter[Place] = Counter()
        self.in_layer = False

    def sync(self) -> None:
        """The host waits for the device."""
        self.syncs[place()] += 1

    def _kernel(self) -> None:
        self.kernels[place()] += 1
        if self.in_layer:
            self.layer_kernels[place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if name == "_local_scalar_dense":
            return self._read_scalar(args[0])
        if name in FOUND_BY_HOST:
            return self._find(args[0])
        if space == "aten" and name not in ONE_KERNEL and func._can_decompose():
            with self:  # inference mode hands composite operations over whole
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = func(*args, **kwargs)
        self._enter(space, name, args, kwargs, made)
        return made

    def _read_scalar(self, tensor: torch.Tensor) -> bool | float | int:
        if tensor.is_cuda:
            self.sync()
        if tensor.dtype is torch.bool:
            return True
        return 0.0 if tensor.dtype.is_floating_point else 0

    def _find(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            self.sync()
        return tensor.new_empty((0, tensor.dim()), dtype=torch.int64)

    def _enter(self, space: str, name: str, args: Any, kwargs: Any, made: Any) -> None:
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        if name in ("_to_copy", "copy_"):
            source, target = (used[1], used[0]) if name == "copy_" else (used[0], given[0])
            if source.is_cuda != target.is_cuda:
                if target.is_cuda:
                    self.to_device[place()] += 1
                elif not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                    self.sync()
                return
        if space != "prim" and name not in NO_KERNEL and any(tensor.is_cuda for tensor in used + given):
            self._kernel()


def _read_all(ledger: Ledger) -> Callable[[torch.Tensor], Any]:
    """In place of `FakeTensor.tolist`, which reads one number after the other."""

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.is_cuda:
            ledger.sync()
        return _zeros(tensor.shape, False if tensor.dtype is torch.bool else 0)

    return tolist


def _zeros(shape: tuple[int, ...], zero: Any) -> Any:
    return zero if not shape else [_zeros(shape[1:], zero) for _ in range(shape[0])]


@contextmanager
def counting(mode: FakeTensorMode, layers: torch.nn.ModuleList) -> Iterator[Ledger]:
    """Within, operations go through the FakeTensorMode `mode` and are counted; `layers` are the model's."""
    ledger = Ledger()

    def enter(*_: Any) -> None:
        ledger.in_layer = True

    def leave(*_: Any) -> None:
        ledger.in_layer = False

    with ExitStack() as stack:
        for layer in layers:
            for hook in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)):
                stack.callback(hook.remove)
        for each in (mode, ledger, mock.patch.object(FakeTensor, "tolist", _read_all(ledger))):
            stack.enter_context(each)
        yield ledger
