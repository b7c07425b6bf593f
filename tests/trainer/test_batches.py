"""The data order: complete, reproducible, and padded no more than needed."""

from hypothesis import given
from hypothesis import strategies as st

from loramux_trainer.batches import StepOrder


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_each_epoch_sees_each_example_once(lengths: list[int], batch_size: int, accumulation: int, seed: int) -> None:
    order = StepOrder(lengths, batch_size=batch_size, accumulation=accumulation, seed=seed)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [batch for step in steps for batch in order.micro_batches(step)]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(0 < len(batch) <= batch_size for batch in batches)


def test_order_depends_on_seed_and_step_only() -> None:
    lengths = [5 + i % 7 for i in range(64)]
    first = StepOrder(lengths, batch_size=4, accumulation=2, seed=1)
    second = StepOrder(lengths, batch_size=4, accumulation=2, seed=1)
    assert second.micro_batches(11) == first.micro_batches(11)  # straight into the second epoch
    assert [first.micro_batches(i) for i in range(8)] != [first.micro_batches(i) for i in range(8, 16)]
    assert StepOrder(lengths, batch_size=4, accumulation=2, seed=2).micro_batches(0) != first.micro_batches(0)


def test_bucketing_keeps_padding_small() -> None:
    lengths = [3 + (i * 37) % 100 for i in range(640)]
    order = StepOrder(lengths, batch_size=8, accumulation=1, seed=0)
    batches = [batch for step in range(order.steps_per_epoch) for batch in order.micro_batches(step)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
