"""A certificate beside served log-probabilities: distances by hand, and what belongs to something else."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_adapters.certificate.document import Arithmetic, Certificate, Probe
from loramux_adapters.certificate.probes import drawn_tokens
from loramux_adapters.certificate.replay import check_identity, check_replay, compare
from loramux_adapters.errors import CertificateRefused

Forge = Callable[[Probe, torch.Tensor], Probe]
ADAPTER, BASE, TEMPLATE = "a" * 64, "b" * 64, "c" * 64
VOCABULARY, TOP = 40, 6
SERVER: dict[str, Any] = {
    "adapter": ADAPTER, "base": BASE, "chat_template": TEMPLATE, "vocabulary": VOCABULARY, "context": 4, "room": 4,
}  # fmt: skip


def logits_of(seed: int) -> torch.Tensor:
    """[probes, positions, vocabulary]"""
    return 2 * torch.randn(2, 3, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def certified(logits: torch.Tensor) -> Certificate:
    probes = []
    for number, own in enumerate(logits):
        values, ids = torch.log_softmax(own, 1).topk(TOP)
        tokens = tuple(range(number, number + len(own) + 1))
        top = tuple(map(tuple, ids.tolist()))
        probes.append(Probe(tokens, tuple(own.std(1).tolist()), top, tuple(map(tuple, values.tolist()))))
    return Certificate(ADAPTER, BASE, TEMPLATE, Arithmetic("cpu", "float32", "float32"), {}, tuple(probes))


def served(logits: torch.Tensor, count: int = VOCABULARY) -> list[list[Mapping[int, float]]]:
    """The most likely `count` tokens of each position."""
    found = []
    for own in logits:
        values, ids = torch.log_softmax(own, 1).topk(count)
        found.append([dict(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)])
    return found


def test_equal_logits_are_no_distance_apart() -> None:
    replay = compare(certified(logits_of(1)), served(logits_of(1)), "float32")
    assert replay.difference < 1e-12
    assert replay.divergence < 1e-12
    check_replay(replay)


def test_distances_are_those_of_the_whole_distributions() -> None:
    """The difference by its definition, and the divergence against that over the named tokens and the rest as one."""
    trained, other = logits_of(1), logits_of(1) + 0.05 * logits_of(2)
    replay = compare(certified(trained), served(other), "float32")
    p, q = torch.log_softmax(trained, 2), torch.log_softmax(other, 2)
    ids = p.topk(TOP, dim=2).indices
    p, q = p.gather(2, ids), q.gather(2, ids)
    assert replay.difference == pytest.approx(float(((p - q).abs() / trained.std(2, keepdim=True)).max()))
    p, q = (torch.cat([each, (1 - each.exp().sum(2, keepdim=True)).log()], 2) for each in (p, q))
    assert replay.divergence == pytest.approx(float((p.exp() * (p - q)).sum(2).max()))
    with pytest.raises(CertificateRefused, match=r"probe \d after \d tokens: token \d+ has -\d.\d+, trained -\d"):
        check_replay(replay)


def test_what_was_not_served_does_not_hold() -> None:
    logits = logits_of(1)
    with pytest.raises(ValueError, match="zip"):
        compare(certified(logits), [[], *served(logits)[1:]], "float32")


def test_the_worst_position_is_named() -> None:
    other = logits_of(1)
    other[1, 2, int(other[1, 2].argmax())] -= 3.0
    replay = compare(certified(logits_of(1)), served(other), "float32")
    assert replay.where.startswith(f"probe 1 after 3 tokens: token {int(logits_of(1)[1, 2].argmax())} has ")


def test_a_token_that_is_not_served_is_at_most_the_least_likely_that_is() -> None:
    other = logits_of(1)
    best = int(other[0, 0].argmax())
    other[0, 0, best] = -50.0
    replay = compare(certified(logits_of(1)), served(other, TOP + 2), "float32")
    assert "below -" in replay.where
    assert replay.difference > 0.1


def _unlikely(probe: Probe, logits: torch.Tensor) -> Probe:
    """What is least likely, with its true log-probabilities, in place of what is most likely."""
    values, ids = torch.log_softmax(logits, 1).topk(TOP, largest=False)
    return replace(probe, top_tokens=tuple(map(tuple, ids.tolist())), top_log_probs=tuple(map(tuple, values.tolist())))


def _wide(probe: Probe, logits: torch.Tensor) -> Probe:
    return replace(probe, deviations=tuple(1e12 for _ in probe.deviations))


@pytest.mark.parametrize("forge", [_unlikely, _wide])
@pytest.mark.parametrize("count", [TOP + 2, VOCABULARY])
def test_nobody_forges_a_certificate_by_what_a_server_cannot_see(forge: Forge, count: int) -> None:
    trained = logits_of(1)
    genuine = certified(trained)
    forged = replace(genuine, probes=tuple(map(forge, genuine.probes, trained)))
    with pytest.raises(CertificateRefused, match="parts from what this server computes"):
        check_replay(compare(forged, served(logits_of(2), count), "float32"))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_never_holds(value: float) -> None:
    answers = [[dict(position) for position in probe] for probe in served(logits_of(1))]
    answers[0][1][int(logits_of(1)[0, 1].argmax())] = value
    with pytest.raises(CertificateRefused):
        check_replay(compare(certified(logits_of(1)), answers, "float32"))


def test_a_narrower_server_may_be_farther_off() -> None:
    other = logits_of(1) + 0.01 * logits_of(2)
    assert not compare(certified(logits_of(1)), served(other), "float32").holds
    assert compare(certified(logits_of(1)), served(other), "bfloat16").holds


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": "0" * 64}, f"is of base {BASE[:12]}, this server holds 000000000000"),
        ({"adapter": "0" * 64}, f"is of adapter {ADAPTER[:12]}, the files beside it hold 000000000000"),
        ({"chat_template": ""}, f"is of chat template {TEMPLATE[:12]}, this server has none"),
        ({"vocabulary": VOCABULARY - 1}, "asks other probes"),
        ({"context": 12}, "asks other probes"),
        ({"room": 3}, "4 tokens in probe 0, this server has room for 3"),
    ],
)
def test_what_it_is_of_is_compared_before_anything_is_computed(changes: dict[str, Any], says: str) -> None:
    genuine = certified(logits_of(1))
    drawn = drawn_tokens(ADAPTER, VOCABULARY, 4)
    genuine = replace(
        genuine, probes=tuple(replace(own, tokens=tokens) for own, tokens in zip(genuine.probes, drawn, strict=True))
    )
    check_identity(genuine, **SERVER)
    with pytest.raises(CertificateRefused, match=says):
        check_identity(genuine, **{**SERVER, **changes})


def test_tokens_beyond_the_base_are_refused() -> None:
    genuine = certified(logits_of(1))
    drawn = drawn_tokens(ADAPTER, VOCABULARY, 4)
    probes = [replace(own, tokens=tokens) for own, tokens in zip(genuine.probes, drawn, strict=True)]
    stranger = replace(probes[0], tokens=(1, 2, 3, VOCABULARY))
    with pytest.raises(CertificateRefused, match="a token in probe 2 that this base does not have"):
        check_identity(replace(genuine, probes=(*probes, stranger)), **SERVER)
    long = replace(probes[0], tokens=(1, 2, 3, 4, 5))
    with pytest.raises(CertificateRefused, match="5 tokens in probe 2, this server has room for 4"):
        check_identity(replace(genuine, probes=(*probes, long)), **SERVER)
