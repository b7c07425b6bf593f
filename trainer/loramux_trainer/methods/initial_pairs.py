"""Factors to begin from: of a weight, of what it reads, or of its gradient. Pure functions of matrices.

Each gives A [r, in] and B [out, r] without the scale s, as PEFT 0.21 does; beside B A the product s B A is taken off
where the pair does not begin at zero, see `delta`.
"""

from __future__ import annotations

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, in] and B [out, r] of a module, without the scale."""


def pissa(weight: torch.Tensor, rank: int, scale: float) -> Pair:
    """The largest singular values of the weight [out, in] (Meng et al., 2024)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def olora(weight: torch.Tensor, rank: int) -> Pair:
    """The first columns and rows of its QR decomposition (Büyükakyüz, 2024)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def corda(weight: torch.Tensor, covariance: torch.Tensor, rank: int, scale: float) -> Pair:
    """The largest singular directions of the weight over what it reads (Yang et al., 2024, for a new task: "ipm").

    `covariance` [in, in] of the inputs. It is damped until its inverse is one, from a hundredth of its mean on.
    """
    identity = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    damp = 0.01
    while True:
        damped = covariance + identity * (covariance.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, identity)) < 0.05:
            break
        damp *= 2
        if damp > 1e6:
            raise ValueError("the covariance of a module's inputs is not finite")
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * (vh[:rank] @ inverse), u[:, :rank] * root


def lora_ga(gradient: torch.Tensor, rank: int, *, stable_gamma: float = 16.0) -> Pair:
    """The gradient's [out, in] first singular directions for A and the next for B (Wang et al., 2024: "ArB2r", scaled
    to be stable by out^1/4 / sqrt(gamma)).
    """
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    factor = gradient.shape[0] ** 0.25 / stable_gamma**0.5
    # Where the gradient has fewer directions than both need, B's are the last ones.
    start = min(rank, len(s) - rank)
    part = slice(start, start + rank)
    return vh[:rank].contiguous(), u[:, part] * (s[part] * factor)


def eva(second_moment: torch.Tensor, mean: torch.Tensor, rank: int) -> torch.Tensor:
    """A [r, in]: the principal components of a module's inputs (Paischer et al., 2024); B begins at zero.

    `second_moment` [in, in] and `mean` [in] of the inputs.
    """
    values, vectors = torch.linalg.eigh(second_moment - mean[:, None] * mean[None])
    order = values.argsort(descending=True)[:rank]
    components: torch.Tensor = vectors[:, order].T.contiguous()
    return components
