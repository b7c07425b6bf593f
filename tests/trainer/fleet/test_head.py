"""Losses from hidden states in chunks against plain cross-entropy over the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from loramux_adapters.kernels.select import select_kernels
from loramux_trainer.fleet import head
from loramux_trainer.fleet.rows import SpanRows

CPU = torch.device("cpu")
CHUNKS = [slice(0, 5), slice(5, 10), slice(10, 13)]


def _rows(count: int) -> SpanRows:
    return SpanRows(count, (), select_kernels(deterministic=False, device=CPU, dtype=torch.float32), CPU)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of three chunks, targets, and a head."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(13, 8, generator=generator), torch.randn(30, 8, generator=generator)
    return hidden, torch.randint(0, 30, (13,), generator=generator), weight


def test_token_loss_is_weighted_cross_entropy(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, targets, weight = case
    weights = torch.linspace(0.1, 2.0, 13)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    loss, each = head.token_loss(ours, targets, weights, _rows(13), lambda h, _: h @ weight.T, CHUNKS)
    (3 * loss).backward()
    expected = F.cross_entropy(plain @ weight.T, targets, reduction="none")
    (3 * (expected * weights).sum()).backward()
    torch.testing.assert_close(each, expected.detach())
    torch.testing.assert_close(loss.detach(), (expected * weights).sum().detach())
    torch.testing.assert_close(ours.grad, plain.grad)


def test_log_probs_take_any_function_of_them(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, targets, weight = case
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    seen: list[int] = []

    def logits(h: torch.Tensor, _: SpanRows) -> torch.Tensor:
        seen.append(len(h))
        return h @ weight.T

    found = head.log_probs(ours, targets, _rows(13), logits, CHUNKS)
    (found[:5].sin().sum() + found[12] ** 2).backward()
    expected = (plain @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected[:5].sin().sum() + expected[12] ** 2).backward()
    torch.testing.assert_close(found.detach(), expected.detach())
    torch.testing.assert_close(ours.grad, plain.grad)
    assert seen == [5, 5, 3, 5, 3]  # the chunk without a gradient is not computed again


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = head.sample(
        torch.zeros(4000, 1),
        _rows(4000),
        lambda h, _: logits.expand(len(h), 3),
        torch.Generator().manual_seed(0),
        [slice(0, 1000), slice(1000, 4000)],
    )
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.03, rtol=0)
