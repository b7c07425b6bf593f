"""The `loss` of a job: names and options of trl, and no option that would not take effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from loramux_adapters.validation import Section, ValuesInvalid, read
from loramux_trainer.schema.loss_config import LossChoice, LossConfig

SFT = LossConfig("sft")


@dataclass(frozen=True)
class _Job(Section):
    loss: LossChoice = SFT


def _read(loss: Any) -> LossConfig:
    return read(_Job, {"loss": loss}).loss


def test_a_name_is_a_loss_with_the_defaults_of_trl() -> None:
    assert read(_Job, {}).loss == LossConfig("sft")
    assert [(_read(name).kind, _read(name).strength) for name in ("sft", "dpo", "kto", "orpo")] == [
        ("nll", 0.1),
        ("sigmoid", 0.1),
        ("kto", 0.1),
        ("", 0.1),
    ]


def test_options_are_read() -> None:
    given = {"name": "dpo", "loss_type": "robust", "beta": "2e-1", "label_smoothing": 0.1}
    assert _read(given) == LossConfig("dpo", "robust", 0.2, 0.1)
    assert _read({"name": "kto", "desirable_weight": 1.3}) == LossConfig("kto", desirable_weight=1.3)
    assert _read({"name": "dpo", "precompute_ref_log_probs": True}).precompute_ref_log_probs
    assert _read({"name": "kto", "loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True})


@pytest.mark.parametrize(
    ("loss", "key", "says"),
    [
        ("ppo", "loss.name", "must be one of sft, dpo, kto, orpo, grpo, reward, not 'ppo'"),
        (3, "loss", "must be a mapping of name, loss_type, beta"),
        ({"name": "dpo", "loss_tpye": "ipo"}, "loss.loss_tpye", "did you mean loss_type?"),
        ({"name": "dpo", "loss_type": "discopop"}, "loss.loss_type", "of dpo must be one of sigmoid, sigmoid_norm"),
        ({"name": "dpo", "loss_type": "aot"}, "loss.loss_type", "aot is not computed here, as it sorts the pairs of"),
        ({"name": "dpo", "loss_type": ["sigmoid"]}, "loss.loss_type", "must be a non-empty string"),
        ({"name": "kto", "loss_type": "sigmoid"}, "loss.loss_type", "of kto must be one of kto, apo_zero_unpaired"),
        ({"name": "orpo", "loss_type": "sigmoid"}, "loss.loss_type", "is not read by loss orpo, but by sft, dpo, kto"),
        ({"beta": 0.1}, "loss.beta", "is not read by loss sft, but by dpo, kto, orpo, grpo: leave it out"),
        ({"name": "dpo", "beta": 0}, "loss.beta", "must be above 0"),
        ({"name": "dpo", "desirable_weight": 1}, "loss.desirable_weight", "is not read by loss dpo, but by kto"),
        (
            {"name": "dpo", "label_smoothing": 0.1},
            "loss.label_smoothing",
            "takes effect with loss_type robust or exo_pair only",
        ),
        ({"name": "dpo", "loss_type": "robust", "label_smoothing": 0.5}, "loss.label_smoothing", "must be below 0.5"),
        ({"name": "dpo", "loss_type": "exo_pair"}, "loss.label_smoothing", "is required with loss_type exo_pair"),
        ({"name": "sft", "precompute_ref_log_probs": True}, "loss.precompute_ref_log_probs", "is not read by loss sft"),
        (
            {"name": "kto", "precompute_ref_log_probs": True},
            "loss.precompute_ref_log_probs",
            "prompts meet other answers in each epoch",
        ),
    ],
)
def test_what_would_not_take_effect_is_refused(loss: Any, key: str, says: str) -> None:
    with pytest.raises(ValuesInvalid) as caught:
        _read(loss)
    [(field, rule)] = caught.value.findings
    assert field == key
    assert says in rule
