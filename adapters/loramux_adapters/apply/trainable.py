"""LoRA on a frozen model, with gradients: y = W x + s B A dropout(x), float32 master weights.

Every linear map of the base computes by the products that a server computes by, and the adapted ones by its low-rank
kernels. The base's modules stay where they are and are never written, so the same model can be fingerprinted before and
after. Knows no data, no loss and no file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import nn

from loramux_adapters.apply.autograd import LowRankRows, multiply_adapted, multiply_frozen
from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.frozen import FrozenLinear, Nf4Linear, freeze
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.weight_formats import select_weight_formats
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.kernels.protocol import Kernels, SlotSegment
from loramux_adapters.kernels.select import select_kernels
from loramux_adapters.parts.rank_rows import RankRows


class TrainableLowRank(nn.Module):
    """The two factors of one module, unscaled as PEFT stores them: `a` [r, in] and `b` [out, r], float32."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout
        self._rank_rows = RankRows({0: (0, len(a))}, len(a), a.device)

    def forward(self, x: torch.Tensor, frozen: FrozenLinear, kernels: Kernels) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        z = F.dropout(x, self.dropout, training=self.training)
        rows = LowRankRows(len(x), [SlotSegment(0, len(x), 0)], self._rank_rows, kernels, x.device)
        return multiply_adapted(x, z, self.a, (self.b * self.scale).T, frozen, rows)


class TrainableAdapter:
    """An attached adapter. A context manager that detaches at its end."""

    def __init__(self, modules: Mapping[str, TrainableLowRank], changed: Sequence[nn.Module]) -> None:
        """`changed` are the base's modules that were given another forward."""
        self._modules, self._changed = dict(modules), list(changed)

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
        """The model is the bare base again. Idempotent."""
        for module in self._changed:
            del module.forward
        self._changed.clear()

    def __enter__(self) -> TrainableAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    base: LoadedBase,
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
    for name, rank in targets.items():
        spec = base.spec.modules.get(name)
        if spec is None or spec.kind not in ("linear", "conv1d"):
            raise AdapterIncompatible(f"{name} is not a linear map of this base", subject=name)
        a = _kaiming(rank, spec.in_features, seed, name).to(base.device)
        b = torch.zeros(spec.out_features, rank, device=base.device)
        modules[name] = TrainableLowRank(a, b, scales[name], dropout)
    return TrainableAdapter(modules, _take_over(base, modules))


def _take_over(base: LoadedBase, modules: Mapping[str, TrainableLowRank]) -> list[nn.Module]:
    """Gives every NF4 map and every adapted one the forward that serves; returns these modules of the base."""
    device, dtype = base.device, base.compute_dtype
    kernels = select_kernels(deterministic=False, device=device, dtype=dtype)
    # The packed layout takes a copy of the weights and serves fewer rows than a batch of training has.
    formats = replace(select_weight_formats(device, dtype, dense=False, invariant=False), packed=False)
    changed = []
    for name, module in base.model.named_modules():
        if isinstance(module, Linear4bit) or name in modules:
            frozen = freeze(module, dtype, formats)
            if isinstance(frozen, Nf4Linear):
                frozen.build(formats)
            module.forward = _forward(frozen, modules.get(name), kernels)
            changed.append(module)
    return changed


def _forward(
    frozen: FrozenLinear, low_rank: TrainableLowRank | None, kernels: Kernels
) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = multiply_frozen(rows, frozen) if low_rank is None else low_rank(rows, frozen, kernels)
        return y.view(*x.shape[:-1], frozen.out_features)

    return forward


def _kaiming(rank: int, in_features: int, seed: int, name: str) -> torch.Tensor:
    """[rank, in] uniform in +-1/sqrt(in): kaiming uniform for leaky slope sqrt(5)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
