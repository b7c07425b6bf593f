"""Two estimators of a Hessian's diagonal for Sophia (Liu et al., 2023), pure functions of what passes give.

Either has its expectation over the random draw: Rademacher probes, or labels drawn from the model's own predictions.
"""

from __future__ import annotations

import torch


def rademacher_probe(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """+1 and -1 with equal chances, in the shape of `like`; `generator` is of its device."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def hutchinson_estimate(probe: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """The diagonal of H from a probe u and H u: needs a second backward pass, through the gradient times u."""
    return probe * product


def gauss_newton_bartlett_estimate(gradient: torch.Tensor, count: int) -> torch.Tensor:
    """The Gauss-Newton diagonal from the gradient of the mean loss over `count` tokens.

    Their labels must be drawn from the model's softmax, not from the data. Needs an ordinary backward pass only.
    """
    return count * gradient * gradient
