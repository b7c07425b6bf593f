"""LoRA on a frozen model, with gradients: y = W x + s B A dropout(x), float32 master weights, by forward hooks.

The base's modules stay where they are and are never written, so the same model can be fingerprinted before and after.
Knows no data, no loss and no file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.spec import BaseModelSpec


class TrainableLowRank(nn.Module):
    """The two factors of one module, unscaled as PEFT stores them: `a` [r, in] and `b` [out, r], float32."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y = W x [..., out] -> y + s B A x in y's dtype; the delta is computed in float32."""
        x = F.dropout(x.to(self.a.dtype), self.dropout, training=self.training)
        return y + (F.linear(F.linear(x, self.a), self.b) * self.scale).to(y.dtype)


class TrainableAdapter:
    """An attached adapter. A context manager that detaches at its end."""

    def __init__(self, modules: Mapping[str, TrainableLowRank], handles: Sequence[RemovableHandle]) -> None:
        self._modules, self._handles = dict(modules), list(handles)

    def parameters(self) -> list[nn.Parameter]:
        """Every A and B in the order of module names: the order of optimizer state."""
        return [parameter for name in sorted(self._modules) for parameter in self._modules[name].parameters()]

    def state(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A [r, in], B [out, r]), unscaled float32; the live tensors, detached."""
        return {name: (module.a.detach(), module.b.detach()) for name, module in sorted(self._modules.items())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copies factors in. Raises AdapterIncompatible when modules or shapes differ."""
        if set(state) != set(self._modules):
            raise AdapterIncompatible("the saved factors are those of other modules", subject="state")
        for name, (a, b) in state.items():
            module = self._modules[name]
            if a.shape != module.a.shape or b.shape != module.b.shape:
                raise AdapterIncompatible(f"the saved factors of {name} have another shape", subject=name)
            module.a.copy_(a)
            module.b.copy_(b)

    def train(self, mode: bool) -> None:
        """Dropout on or off; a fresh adapter has it on."""
        for module in self._modules.values():
            module.train(mode)

    def detach(self) -> None:
        """Takes the hooks off; the model is the bare base again. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> TrainableAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    model: nn.Module,
    base: BaseModelSpec,
    targets: Mapping[str, int],
    *,
    scales: Mapping[str, float],
    dropout: float = 0.0,
    seed: int = 0,
) -> TrainableAdapter:
    """Puts a fresh adapter on the linear maps in `targets` (module name -> rank).

    `scales` gives s per module (alpha / r or alpha / sqrt(r)). A starts as PEFT's default, kaiming uniform with
    a = sqrt(5), drawn from the seed and the module's own name; B starts at zero, so the model is unchanged at first.
    Raises AdapterIncompatible for a module that is no linear map of this base.
    """
    modules: dict[str, TrainableLowRank] = {}
    handles: list[RemovableHandle] = []
    for name, rank in targets.items():
        spec = base.modules.get(name)
        if spec is None or spec.kind not in ("linear", "conv1d"):
            raise AdapterIncompatible(f"{name} is not a linear map of this base", subject=name)
        site = model.get_submodule(name)
        device = next(site.parameters()).device
        a = _kaiming(rank, spec.in_features, seed, name).to(device)
        b = torch.zeros(spec.out_features, rank, device=device)
        modules[name] = TrainableLowRank(a, b, scales[name], dropout)
        handles.append(site.register_forward_hook(_add_delta(modules[name])))
    return TrainableAdapter(modules, handles)


def _add_delta(
    low_rank: TrainableLowRank,
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def hook(_site: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = low_rank(inputs[0], output)
        return result

    return hook


def _kaiming(rank: int, in_features: int, seed: int, name: str) -> torch.Tensor:
    """[rank, in] uniform in +-1/sqrt(in): kaiming uniform for leaky slope sqrt(5)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
