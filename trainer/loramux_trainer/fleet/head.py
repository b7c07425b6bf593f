"""From hidden states to the log-probabilities of targets, in chunks: no [N, vocabulary] ever lives.

`token_loss` takes its gradient in the forward pass and costs two products with the head; `log_probs` serves losses
that are any function of log-probabilities, costs three, and skips chunks without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from loramux_trainer.fleet.rows import SpanRows

CHUNK = 256
"""Rows of logits at a time."""

Logits = Callable[[torch.Tensor, SpanRows], torch.Tensor]
"""Hidden states [n, hidden] of some rows -> logits [n, vocabulary], with gradients of whatever is trained there."""


def token_loss(
    hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, rows: SpanRows, logits: Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, hidden], targets [N], weights [N] -> (sum of weights * -log p, the -log p [N] without gradient)."""
    loss, each = _TokenLoss.apply(hidden, targets, weights, rows, logits, _tap(rows))  # type: ignore[no-untyped-call]
    return loss, each


def log_probs(hidden: torch.Tensor, targets: torch.Tensor, rows: SpanRows, logits: Logits) -> torch.Tensor:
    """hidden [N, hidden], targets [N] -> log p of each target [N], float32."""
    return cast(torch.Tensor, _LogProbs.apply(hidden, targets, rows, logits, _tap(rows)))  # type: ignore[no-untyped-call]


def _tap(rows: SpanRows) -> torch.Tensor | None:
    """Enters the graph so that backward runs where members train at the head alone: their hidden states need none."""
    return torch.zeros((), requires_grad=True) if rows.spans else None


@torch.no_grad()
def sample(hidden: torch.Tensor, rows: SpanRows, logits: Logits, generator: torch.Generator) -> torch.Tensor:
    """hidden [N, hidden] -> a token [N] drawn from each position's softmax, on the CPU by `generator`."""
    drawn = []
    for start in range(0, len(hidden), CHUNK):
        stop = min(start + CHUNK, len(hidden))
        shares = torch.softmax(logits(hidden[start:stop], rows.cut(start, stop)).float(), 1).cpu()
        drawn.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
    return torch.cat(drawn).to(hidden.device)


class _TokenLoss(torch.autograd.Function):
    """Parts at the head get their gradients in the forward pass too: the loss is the end of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        rows: SpanRows,
        logits: Logits,
        tap: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `token_loss`."""
        each, gradient = torch.empty(len(hidden), device=hidden.device), torch.zeros_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, min(start + CHUNK, len(hidden)))
            scores, of_hidden = _scores(hidden[part], rows.cut(part.start, part.stop), logits)
            target = targets[part, None]
            total = torch.logsumexp(scores.detach().float(), 1, keepdim=True)
            each[part] = (total - scores.detach().gather(1, target)).squeeze(1)
            of_scores = (scores.detach().float() - total).exp_()
            of_scores.scatter_add_(1, target, torch.full_like(total, -1.0)).mul_(weights[part, None])
            gradient[part] = of_hidden(of_scores.to(scores.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient is a factor, 1 where the loss itself is run backward."""
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient, None, None, None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        rows: SpanRows,
        logits: Logits,
        tap: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `log_probs`."""
        found = torch.empty(len(hidden), device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, min(start + CHUNK, len(hidden)))
            scores = logits(hidden[part], rows.cut(part.start, part.stop)).float()
            found[part] = scores.gather(1, targets[part, None]).squeeze(1) - torch.logsumexp(scores, 1)
        ctx.save_for_backward(hidden, targets)
        ctx.rows, ctx.logits = rows, logits
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Computes the logits again, chunk by chunk."""
        hidden, targets = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, min(start + CHUNK, len(hidden)))
            if not gradient[part].any():
                continue
            scores, back = _scores(hidden[part], ctx.rows.cut(part.start, part.stop), ctx.logits)
            of_scores = torch.softmax(scores.detach().float(), 1).neg_()
            of_scores.scatter_add_(1, targets[part, None], torch.ones_like(of_scores[:, :1]))
            of_hidden[part] = back(of_scores.mul_(gradient[part, None]).to(scores.dtype))
        return of_hidden, None, None, None, None


def _scores(
    hidden: torch.Tensor, rows: SpanRows, logits: Logits
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Logits of a chunk, and what their gradient comes to for its hidden states."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        scores = logits(leaf, rows)

    def back(of_scores: torch.Tensor) -> torch.Tensor:
        torch.autograd.backward(scores, of_scores)
        if leaf.grad is None:
            raise RuntimeError("the logits do not depend on the hidden states")
        return leaf.grad

    return scores, back
