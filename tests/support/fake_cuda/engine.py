"""The engine of `support.model_engine` whose model, cache, slots and sampler lie on a fake CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from loramux_adapters.apply import inject
from loramux_adapters.base.bitsandbytes_compat import Linear4bit, functional
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.guard.examine import Examined, examine
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from loramux_server.engine.plan import StepPlan, StepResult
from loramux_server.model.runner import ModelRunner
from loramux_server.model.worker import Worker
from support.fake_cuda.ledger import Ledger, counting
from support.model_engine import ModelEngine

CUDA = torch.device("cuda", 0)


class CountedWorker:
    """Executes plans on the fake device; keeps a ledger of each, and raises what the engine would contain."""

    def __init__(self, worker: Worker, mode: FakeTensorMode, layers: nn.ModuleList) -> None:
        self._worker, self._mode, self._layers = worker, mode, layers
        self.steps: list[tuple[StepPlan, Ledger]] = []

    @property
    def is_busy(self) -> bool:
        """See Worker."""
        return self._worker.is_busy

    def execute(self, plan: StepPlan) -> StepResult:
        """See Worker."""
        with counting(self._mode, self._layers) as ledger:
            try:
                result = self._worker.execute(plan)
            except Exception as error:
                raise StepFailed(f"step {plan.step} failed on the fake device") from error
        self.steps.append((plan, ledger))
        return result


class StepFailed(BaseException):
    """A step that cannot run on CUDA. Not an Exception: the engine would fail the requests and go on."""


class FakeCudaEngine(ModelEngine):
    """Built as on a GPU, from the base's real content; what it gives out is no text of any model.

    Takes `base` over. It has to be used within `no_cuda_library`.
    """

    runner_type = ModelRunner

    def __init__(self, base: LoadedBase, adapters: dict[str, Path], **options: Any) -> None:
        self._examined = examine(base, base.spec.context_length)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, mock.patch.object(inject, "_on_host", _on_host):
            super().__init__(_to_fake(base), adapters, **options)
        self.counted = CountedWorker(self.worker, mode, base.model.get_submodule("model.layers"))
        self.worker = self.counted  # type: ignore[assignment]

    def examine(self, base: LoadedBase) -> Examined:
        """What was found before the weights became fake."""
        return self._examined

    def read(self, path: Path, base: BaseModelSpec) -> AdapterWeights:
        """Real tensors in host memory."""
        with unset_fake_temporarily():
            return super().read(path, base)


@contextmanager
def no_cuda_library() -> Iterator[None]:
    """Within, what a torch without CUDA lacks does nothing: to set the current device, and to pin host memory."""
    with (
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
    ):
        yield


def _to_fake(base: LoadedBase) -> LoadedBase:
    """The base with every tensor of its model replaced by a fake one of the same form on the device, in place."""
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            module.weight = _fake_nf4(module.weight)
            _replace_tensors(module._parameters, lambda name: name != "weight")
        else:
            _replace_tensors(module._parameters, lambda _: True)
        _replace_tensors(module._buffers, lambda _: True)
        _replace_tensors(vars(module), lambda _: True)
    return replace(base, device=CUDA)


def _replace_tensors(tensors: dict[str, Any], chosen: Callable[[str], bool]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and chosen(name):
            tensors[name] = _fake(tensor)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def _fake_nf4(weight: Any) -> nn.Parameter:
    """A bitsandbytes parameter would quantize when it is moved: a plain one, with the state that is read of it."""
    state = weight.quant_state
    fake: Any = nn.Parameter(_fake(weight.data), requires_grad=False)
    fake.quant_state = functional.QuantState(
        absmax=_fake(state.absmax), shape=state.shape, code=_fake(state.code), blocksize=state.blocksize,
        quant_type=state.quant_type, dtype=state.dtype,
    )  # fmt: skip
    return fake


def _on_host(bias: torch.Tensor | None) -> torch.Tensor | None:
    """What is read back from the device when a model is built, as a real tensor: adapters are prepared with it."""
    with unset_fake_temporarily():
        return None if bias is None else torch.zeros(bias.shape)
