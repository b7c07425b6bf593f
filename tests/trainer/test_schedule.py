"""The learning-rate curves against transformers' own."""

import pytest
import torch
from transformers import get_scheduler

from loramux_trainer.errors import JobInvalid
from loramux_trainer.schedule import factor, warmup_length


@pytest.mark.parametrize(
    ("kind", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant_with_warmup", "constant_with_warmup")]
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (5, 100), (1, 1)])
def test_curve_equals_transformers(kind: str, theirs: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert factor(kind, step, warmup, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)  # type: ignore[arg-type]
        optimizer.step()
        scheduler.step()


def test_warmup_is_a_share_below_one_and_steps_from_one_on() -> None:
    assert [warmup_length(0.03, 1000), warmup_length(0.0, 10), warmup_length(1, 10), warmup_length(5, 10)] == [
        30,
        0,
        1,
        5,
    ]


def test_warmup_leaves_a_step_to_train() -> None:
    for warmup in (0.0, 0.03, 1, 7):
        assert warmup_length(warmup, 1) == 0
    for warmup, total in ((10, 10), (11, 10), (0.99, 10)):
        with pytest.raises(JobInvalid, match=f"leaves none of {total}"):
            warmup_length(warmup, total)
