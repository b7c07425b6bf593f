"""Each loss against its formula written out in float64, how shares of chunks add up, and what rows it asks for.

Needs no trl; test_trl.py compares with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.errors import JobInvalid
from loramux_trainer.losses.dpo import DPO_TYPES
from loramux_trainer.losses.kto import KtoLoss
from loramux_trainer.losses.protocol import Loss, Totals
from loramux_trainer.losses.select import build_loss, check_batch_size
from loramux_trainer.schema.engine import TRL_LOSSES
from loramux_trainer.schema.loss_config import LOSS_TYPES, LossConfig

VOCABULARY = 50
SMOOTHING = {"robust": 0.1, "exo_pair": 0.001}
ALL = [
    LossConfig(name, kind, label_smoothing=SMOOTHING.get(kind or ""))
    for name, kinds in LOSS_TYPES.items()
    if name not in TRL_LOSSES
    for kind in (kinds or (None,))
]


def _example(prompt: int, answer: int, seed: int) -> Example:
    numbers = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(VOCABULARY, (prompt + answer,), generator=numbers).tolist())
    return Example(ids, (*[IGNORE] * prompt, *ids[prompt:]))


def _units(name: str) -> list[Unit]:
    if name in ("dpo", "orpo"):
        return [Unit((_example(3 + i, 2 + i, i), _example(3 + i, 5 - i, 9 + i))) for i in range(4)]
    return [Unit((_example(3 + i, 2 + 2 * i, i),), label=i % 3 == 0 if name == "kto" else None) for i in range(4)]


def _log_probs(rows: Sequence[Example], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As of a random model that sees nothing but the token before: the same for the same row."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = (2 * table).log_softmax(-1)
    return [
        torch.stack(
            [table[a, b] for a, b, label in zip(row.ids, row.ids[1:], row.labels[1:], strict=False) if label != IGNORE]
        ).to(dtype)
        for row in rows
    ]


def _value(
    loss: Loss, units: Sequence[Unit], totals: Totals | None = None
) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    """Loss, gradients of each row, metrics."""
    rows = loss.rows(units)
    policy = [row.requires_grad_() for row in _log_probs(rows, seed=1)]
    reference = _log_probs(rows, seed=2) if loss.needs_reference else None
    value, metrics = loss.value(policy, reference, units, totals or loss.totals(units))
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), [torch.zeros_like(row) if row.grad is None else row.grad for row in policy], dict(metrics)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _by_hand(kind: str, c: float, r: float, lc: int, lr: int, beta: float = 0.1) -> float:
    """The loss of one pair of log-ratios, of answers of so many tokens, as the papers write it."""
    h, e = beta * (c - r), SMOOTHING.get(kind, 0.0)
    p, q = _sigmoid(h), _sigmoid(-h)
    formulas: dict[str, Callable[[], float]] = {
        "sigmoid": lambda: -math.log(p),
        "sigmoid_norm": lambda: -math.log(_sigmoid(beta * (c / lc - r / lr))),
        "hinge": lambda: max(0.0, 1 - h),
        "ipo": lambda: (c / lc - r / lr - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: p * math.log(p / (1 - e)) + q * math.log(q / e),
        "nca_pair": lambda: (
            -math.log(_sigmoid(beta * c)) - 0.5 * math.log(_sigmoid(-beta * c)) - 0.5 * math.log(_sigmoid(-beta * r))
        ),
        "robust": lambda: (-(1 - e) * math.log(p) + e * math.log(q)) / (1 - 2 * e),
        "bco_pair": lambda: -math.log(_sigmoid(beta * c)) - math.log(_sigmoid(-beta * r)),
        "sppo_hard": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - _sigmoid(beta * c) + _sigmoid(beta * r),
        "apo_down": lambda: _sigmoid(beta * c) + 1 - _sigmoid(h),
    }
    return formulas[kind]()


@pytest.mark.parametrize("kind", LOSS_TYPES["dpo"])
def test_dpo_is_the_mean_of_its_formula_over_the_pairs(kind: str) -> None:
    units = _units("dpo")
    loss = build_loss(LossConfig("dpo", kind, label_smoothing=SMOOTHING.get(kind)), max_length=64)
    rows = loss.rows(units)
    assert rows == tuple(row for unit in units for row in unit.rows)
    policy, reference = ([float(row.sum()) for row in _log_probs(rows, seed)] for seed in (1, 2))
    ratios = [a - b for a, b in zip(policy, reference, strict=True)]
    lengths = [row.supervised for row in rows]
    pairs = zip(ratios[0::2], ratios[1::2], lengths[0::2], lengths[1::2], strict=True)
    expected = sum(_by_hand(kind, *pair) for pair in pairs) / len(units)
    value, gradients, metrics = _value(loss, units)
    assert float(value) == pytest.approx(expected, rel=2e-7)
    assert all(gradient.unique().numel() == 1 for gradient in gradients)  # every token of an answer counts alike
    accuracy = sum(c > r for c, r in zip(ratios[0::2], ratios[1::2], strict=True)) / len(units)
    assert metrics["rewards/accuracies"] == pytest.approx(accuracy)
    assert metrics["rewards/margins"] == pytest.approx(
        0.1 * (sum(ratios[0::2]) - sum(ratios[1::2])) / len(units), rel=1e-5
    )
    assert metrics["logps/chosen"] == pytest.approx(sum(policy[0::2]) / len(units), rel=1e-5)


def test_every_loss_type_of_dpo_has_a_function() -> None:
    assert tuple(DPO_TYPES) == LOSS_TYPES["dpo"]


@pytest.mark.parametrize("kind", LOSS_TYPES["kto"])
def test_kto_measures_each_answer_against_the_divergence_of_its_chunk(kind: str) -> None:
    units = _units("kto")
    loss = build_loss(LossConfig("kto", kind, 0.3, None, 1.5, 0.5), max_length=64)
    rows = loss.rows(units)
    ratios = [float((a - b).sum()) for a, b in zip(_log_probs(rows, 1), _log_probs(rows, 2), strict=True)]
    divergence = max(0.0, sum(ratios[4:]) / 4) if kind == "kto" else 0.0
    expected = 0.0
    for unit, ratio in zip(units, ratios[:4], strict=True):
        gain = 0.3 * (ratio - divergence)
        expected += 1.5 * (1 - _sigmoid(gain)) if unit.label else 0.5 * (1 - _sigmoid(-gain))
    value, gradients, metrics = _value(loss, units)
    assert float(value) == pytest.approx(expected / 4, rel=1e-6)
    assert not any(gradient.any() for gradient in gradients[4:]), "the divergence has a gradient"
    assert metrics.get("kl", 0.0) == pytest.approx(divergence)
    desirable = [0.3 * ratio for unit, ratio in zip(units, ratios[:4], strict=True) if unit.label]
    assert metrics["rewards/chosen"] == pytest.approx(sum(desirable) / len(desirable), rel=1e-5)


def test_the_divergence_of_kto_is_never_negative() -> None:
    units = _units("kto")[:2]
    loss = KtoLoss(64)
    rows = [torch.tensor([-1.0], dtype=torch.float64)] * 4
    for base, kl in ((-3.0, 2.0), (1.0, 0.0)):
        _, metrics = loss.value(rows, [torch.full((1,), base, dtype=torch.float64)] * 4, units, loss.totals(units))
        assert metrics["kl"] == kl


def test_kto_asks_each_prompt_with_the_answer_before_it() -> None:
    units = [
        Unit((Example((1, 2, 3), (IGNORE, 2, 3)),), label=True),
        Unit((Example((4, 5, 6, 7), (IGNORE, IGNORE, IGNORE, 7)),), label=False),
        Unit((Example((8, 9, 10, 11, 12), (IGNORE, IGNORE, 10, IGNORE, 12)),), label=True),
    ]
    assert KtoLoss(5).rows(units)[3:] == (
        Example((1, 10, 11, 12), (IGNORE, 10, IGNORE, 12)),
        Example((4, 5, 6, 2, 3), (IGNORE, IGNORE, IGNORE, 2, 3)),
        Example((8, 9, 7), (IGNORE, IGNORE, 7)),
    )
    assert KtoLoss(4).rows(units)[4] == Example((4, 5, 6, 2), (IGNORE, IGNORE, IGNORE, 2))
    assert KtoLoss(5, kind="apo_zero_unpaired").rows(units) == tuple(unit.rows[0] for unit in units)


def test_kto_refuses_batches_of_one() -> None:
    with pytest.raises(JobInvalid, match=r"training\.batch_size: kto needs at least 2 in a batch"):
        check_batch_size(build_loss(LossConfig("kto"), max_length=8), 1)
    check_batch_size(build_loss(LossConfig("kto"), max_length=8), 2)
    check_batch_size(build_loss(LossConfig("kto", "apo_zero_unpaired"), max_length=8), 1)


def test_orpo_learns_the_chosen_row_and_its_odds_over_the_rejected() -> None:
    units = _units("orpo")
    loss = build_loss(LossConfig("orpo", beta=0.4), max_length=64)
    rows = loss.rows(units)
    assert [row.labels for row in rows[0::2]] == [unit.rows[0].ids for unit in units]
    assert rows[1::2] == tuple(unit.rows[1] for unit in units)
    whole = torch.cat(_log_probs(rows[0::2], 1))
    answers = [_log_probs([unit.rows[0]], 1)[0].mean() for unit in units]
    rejected = [row.mean() for row in _log_probs(rows[1::2], 1)]
    odds = [
        math.log(math.exp(c) / (1 - math.exp(c))) - math.log(math.exp(r) / (1 - math.exp(r)))
        for c, r in zip(answers, rejected, strict=True)
    ]
    penalty = sum(-math.log(_sigmoid(o)) for o in odds) / len(units)
    value, _, metrics = _value(loss, units)
    assert float(value) == pytest.approx(float(-whole.mean()) + 0.4 * penalty, rel=1e-9)
    assert metrics["nll_loss"] == pytest.approx(float(-whole.mean()), rel=1e-5)
    assert metrics["log_odds_ratio"] == pytest.approx(-penalty, rel=1e-5)


@pytest.mark.parametrize("kind", LOSS_TYPES["sft"])
def test_sft_is_a_mean_over_tokens(kind: str) -> None:
    units = [*_units("sft"), Unit((_example(2, 3, 20), _example(4, 1, 21)))]
    loss = build_loss(LossConfig("sft", kind), max_length=64)
    assert loss.totals(units) == Totals(units=5, tokens=2 + 4 + 6 + 8 + 3 + 1)
    tokens = torch.cat(_log_probs(loss.rows(units), 1))
    weights = tokens.exp() if kind == "dft" else torch.ones_like(tokens)
    value, gradients, _ = _value(loss, units)
    assert float(value) == pytest.approx(float(-(weights * tokens).mean()), rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients), -weights / len(tokens))  # the weight has no gradient


@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.name}-{config.kind}")
def test_shares_of_chunks_add_up_to_the_step(config: LossConfig) -> None:
    """But for the divergence of KTO, which is that of a chunk: without it too."""
    units = _units(config.name)
    loss = build_loss(config, max_length=64)
    whole, gradients, metrics = _value(loss, units)
    if config.kind == "kto":
        assert abs(float(_value(loss, units[:2], loss.totals(units))[0])) > 0
        return
    chunks = [units[:1], units[1:3], units[3:]]
    totals = sum(map(loss.totals, chunks), Totals())
    assert totals == loss.totals(units)
    parts = [_value(loss, chunk, totals) for chunk in chunks]
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole), rel=1e-6)
    for one, other in zip([row for part in parts for row in part[1]], gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)
    for name, number in metrics.items():
        assert sum(part[2].get(name, 0.0) for part in parts) == pytest.approx(number, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.name}-{config.kind}")
def test_a_sum_of_the_reference_will_do(config: LossConfig) -> None:
    loss = build_loss(config, max_length=64)
    if not loss.needs_reference:
        assert loss.value(_log_probs(loss.rows(u := _units(config.name)), 1), None, u, loss.totals(u))[0].isfinite()
        return
    units = _units(config.name)
    rows, totals = loss.rows(units), loss.totals(units)
    policy, reference = _log_probs(rows, 1), _log_probs(rows, 2)
    whole = loss.value(policy, reference, units, totals)
    assert loss.value(policy, [row.sum()[None] for row in reference], units, totals) == whole
    with pytest.raises(ValueError, match="log-probabilities of the frozen base"):
        loss.value(policy, None, units, totals)


@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.name}-{config.kind}")
def test_another_number_of_rows_is_refused(config: LossConfig) -> None:
    units = _units(config.name)
    loss = build_loss(config, max_length=64)
    rows: Any = _log_probs(loss.rows(units), 1)
    with pytest.raises(ValueError, match="rows of log-probabilities are needed"):
        loss.value(rows[:-1], rows if loss.needs_reference else None, units, loss.totals(units))
