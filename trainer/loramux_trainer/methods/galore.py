"""GaLore: the gradient of the frozen weight in a low-rank subspace (Zhao et al., 2024), as an exact low-rank adapter.

A step with a projected gradient is a step of one factor beside a fixed one: with y = W x + s B A x and B = U fixed, the
gradient of A over s is U^T dW. At the end of a period both are kept as they are, and the next begins at zero with new
directions. So no weight of the base is written, and what is exported is a LoRA of rank periods times r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from loramux_adapters.compressing import compress, patterns
from loramux_trainer.fleet.parameters import FlatParameters
from loramux_trainer.methods.compress import Tell
from loramux_trainer.methods.method import Beginning, Control, Made, Method, Start


class _Unscaled(torch.autograd.Function):
    """The factor as it is, and its gradient over the scale: s belongs to the step alone, so that an optimizer that does
    not normalize (SGD) makes the paper's step, and clipping sees the projected gradient.
    """

    @staticmethod
    def forward(ctx: Any, factor: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient / ctx.scale, None


def _unscaled(factor: torch.Tensor, scale: float) -> torch.Tensor:
    return cast("torch.Tensor", _Unscaled.apply(factor, scale))  # type: ignore[no-untyped-call]


class _Side:
    """One module: which factor is fixed, and what came of the periods before."""

    def __init__(self, out: int, wide: int, rank: int) -> None:
        self.fixes_a = out >= wide  # the shorter side is projected, as in the paper
        self.rank = min(rank, out, wide)
        self.fixed = torch.zeros((self.rank, wide) if self.fixes_a else (out, self.rank))
        self.a, self.b = torch.zeros(0, wide), torch.zeros(out, 0)

    @property
    def factor_shape(self) -> tuple[int, int]:
        """Of what is trained."""
        return (self.b.shape[0], self.rank) if self.fixes_a else (self.rank, self.a.shape[1])

    def whole_a(self, factor: torch.Tensor | None) -> torch.Tensor:
        """[periods * r, in]"""
        now = self.fixed if factor is None else factor
        return torch.cat([self.a.to(now.device), now])

    def whole_b(self, factor: torch.Tensor | None) -> torch.Tensor:
        """[out, periods * r]"""
        now = self.fixed if factor is None else factor
        return torch.cat([self.b.to(now.device), now], dim=1)

    def begin(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """A period ends: `factor` is kept and becomes zero; the next one's directions are the gradient's largest."""
        if factor.any():
            self.a = self.whole_a(None if self.fixes_a else factor.detach()).clone()
            self.b = self.whole_b(factor.detach() if self.fixes_a else None).clone()
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        directions = vh[: self.rank] if self.fixes_a else u[:, : self.rank]
        self.fixed = _with_signs(directions, dim=1 if self.fixes_a else 0).contiguous().to(factor.device)
        factor.zero_()

    def compress(self, rank: int) -> float:
        """What is kept to at most `rank`; returns the share of its energy that is left."""
        self.a, self.b, left = compress(self.a, self.b, rank)
        return left


class Projections(Control):
    """New directions every `gap` steps."""

    def __init__(
        self, parameters: FlatParameters, sides: Mapping[str, _Side], gap: int, rank_budget: int, tell: Tell
    ) -> None:
        self._parameters, self._sides, self._gap = parameters, sides, gap
        self._rank_budget, self._tell = rank_budget, tell

    def wants_gradients(self, step: int) -> tuple[str, ...]:
        """See Control."""
        return tuple(self._sides) if step % self._gap == 0 else ()

    def take_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """See Control."""
        least = 1.0
        for name, side in self._sides.items():
            side.begin(gradients[name], self._parameters.views[_factor_of(name, side)])
            least = min(least, side.compress(self._rank_budget - side.rank))
        if least < 1.0:
            self._tell(
                f"GaLore: over the rank budget of {self._rank_budget}; the worst module keeps {least:.2%} of its energy"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """See Control."""
        found: dict[str, torch.Tensor] = {}
        for name, side in self._sides.items():
            found |= {f"{name}.fixed": side.fixed, f"{name}.a": side.a, f"{name}.b": side.b}
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Control."""
        for name, side in self._sides.items():
            side.fixed, side.a, side.b = (
                tensors[f"{name}.{part}"].to(side.fixed.device) for part in ("fixed", "a", "b")
            )

    def finish(
        self, config: dict[str, Any], tensors: dict[tuple[str, str], torch.Tensor]
    ) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
        """The rank that came of it, at the same scale."""
        ranks = {name: len(tensors[name, "a"]) for name in self._sides}
        scale = config["lora_alpha"] / config["r"]
        return config | patterns(ranks, dict.fromkeys(ranks, scale), config), tensors


def galore(config: Mapping[str, Any], seed: int, *, gap: int, rank_budget: int, tell: Tell) -> Method:
    """`config`: r directions a module, and lora_alpha / r the paper's scale."""
    rank, scale = int(config["r"]), config["lora_alpha"] / config["r"]
    sides: dict[str, _Side] = {}

    def side(begin: Beginning, out: int, wide: int) -> _Side:
        return sides.setdefault(begin.module, _Side(out, wide, rank))

    def of(role: str) -> Callable[[Beginning], Made]:
        def rule(begin: Beginning) -> Made:
            module = begin.spec
            if module is None:
                raise ValueError("GaLore has no tensors that modules share")
            own = side(begin, module.out_features, module.in_features)
            whole = own.whole_a if role == "a" else own.whole_b
            if own.fixes_a == (role == "a"):
                return Made({}, lambda _: whole(None))
            start = Start(torch.zeros(own.factor_shape), "b" if role == "b" else "a")
            return Made({"factor": start}, lambda tensors: whole(_unscaled(tensors["factor"], scale)))

        return rule

    return Method(
        {"peft_type": "LORA", **config},
        seed,
        {"a": of("a"), "b": of("b")},
        control=lambda parameters: Projections(parameters, sides, gap, rank_budget, tell),
    )


def _with_signs(directions: torch.Tensor, dim: int) -> torch.Tensor:
    """Singular vectors, along `dim`, whose largest component is positive: a library may give either sign, and the
    optimizer's moments outlive the directions they were made along.
    """
    places = directions.abs().argmax(dim, keepdim=True)
    return directions * directions.gather(dim, places).sign()


def _factor_of(name: str, side: _Side) -> str:
    return f"{name}:{'b' if side.fixes_a else 'a'}:factor"
