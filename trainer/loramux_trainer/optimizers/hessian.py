"""An estimator of a Hessian's diagonal for Sophia (Liu et al., 2023), a pure function of what a backward pass gives."""

from __future__ import annotations

import torch


def gauss_newton_bartlett_estimate(gradient: torch.Tensor, count: int) -> torch.Tensor:
    """The Gauss-Newton diagonal from the gradient of the mean loss over `count` tokens.

    Their labels must be drawn from the model's softmax, not from the data: over the draw it has its expectation.
    """
    return count * gradient * gradient
