"""Whether what a server computes is what the training computed: a certificate beside served log-probabilities.

Knows no engine and no model: who asks for the log-probabilities hands them in. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramux_adapters.certificate.document import Certificate, Probe, refused
from loramux_adapters.certificate.probes import drawn_tokens

ASKED = 32
"""Most likely tokens that a server should give of each position: more than a certificate names, since they may have
changed places."""

_WIDEST = 16.0
"""Of logits, the largest deviation that a difference is measured by; that of language models is 1 to 8. So that nobody
loosens a tolerance by a deviation which no server can check."""

Served = Sequence[Mapping[int, float]]
"""Of one probe: after each token but the last, token -> natural log-probability of the most likely next ones."""

_SAME_TEMPLATE = "serve the base with the chat template it was trained with, or train on this one"


@dataclass(frozen=True)
class Replay:
    """How far what is served is from what was certified, at the worst position.

    `difference`: of a log-probability, over the deviation of the position's logits, 16 at most. `divergence`:
    Kullback-Leibler from the certified to the served distribution, in nats, over the certified tokens and the rest as
    one.
    """

    difference: float
    divergence: float
    tolerance: float
    dtype: str  # that the server computes in
    where: str  # the position with that difference

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance."""
        return self.difference <= self.tolerance


def check_identity(
    certificate: Certificate, *, adapter: str, base: str, chat_template: str, vocabulary: int, context: int, room: int
) -> None:
    """Whether it is of this adapter on this base, and asks what it must: before anything is computed.

    `context`: the base's, less the adapter's virtual tokens and an answer; `room`: as much of it as is served. Raises
    CertificateRefused.
    """
    if certificate.base != base:
        remedy = f"serve it on base {certificate.base}, or remove the file to upload it without a certificate"
        raise refused(f"is of base {certificate.base[:12]}, this server holds {base[:12]}", remedy=remedy)
    if certificate.adapter != adapter:
        raise refused(f"is of adapter {certificate.adapter[:12]}, the files beside it hold {adapter[:12]}")
    if certificate.chat_template != chat_template:
        trained, served = (each[:12] or "none" for each in (certificate.chat_template, chat_template))
        raise refused(f"is of chat template {trained}, this server has {served}", remedy=_SAME_TEMPLATE)
    drawn = drawn_tokens(adapter, vocabulary, context)
    if tuple(probe.tokens for probe in certificate.probes[: len(drawn)]) != drawn:
        raise refused("asks other probes than those that follow from its adapter")
    for number, probe in enumerate(certificate.probes):
        if max(probe.tokens) >= vocabulary or any(max(top) >= vocabulary for top in probe.top_tokens):
            raise refused(f"has a token in probe {number} that this base does not have")
        if len(probe.tokens) > room:
            raise refused(f"has {len(probe.tokens)} tokens in probe {number}, this server has room for {room}")


def compare(certificate: Certificate, served: Sequence[Served], dtype: str) -> Replay:
    """`served` of each probe, by a server that computes in `dtype`. ValueError where positions are missing."""
    difference, where, divergence = -1.0, "", 0.0
    for number, (probe, positions) in enumerate(zip(certificate.probes, served, strict=True)):
        for place, (found, _) in enumerate(zip(positions, probe.deviations, strict=True)):
            own, token = _difference(probe, place, found)
            divergence = max(divergence, _divergence(probe, place, found))
            if own > difference:
                certified = dict(zip(probe.top_tokens[place], probe.top_log_probs[place], strict=True))
                served_as, trained = _told(token, found), _told(token, certified)
                where = f"probe {number} after {place + 1} tokens: token {token} has {served_as}, trained {trained}"
                difference = own
    return Replay(difference, divergence, certificate.tolerance_on(dtype), dtype, where)


def check_replay(replay: Replay) -> None:
    """Raises CertificateRefused where what is served parts from what was trained."""
    if not replay.holds:
        raise refused(
            f"parts from what this server computes: {replay.where}, {replay.difference:.2g} of the logits' deviation "
            f"where {replay.tolerance:g} is allowed"
        )


def _difference(probe: Probe, place: int, found: Mapping[int, float]) -> tuple[float, int]:
    """The largest of the position, and its token: one that is certified, or one that is served and more likely than
    what is certified as the most likely.
    """
    certified = dict(zip(probe.top_tokens[place], probe.top_log_probs[place], strict=True))
    unserved, uncertified = min(found.values()), min(certified.values())  # at most as likely as these
    apart = {
        token: abs(found[token] - trained) if token in found else max(0.0, trained - unserved)
        for token, trained in certified.items()
    }
    apart |= {token: max(0.0, own - uncertified) for token, own in found.items() if token not in certified}
    apart |= {token: math.inf for token, own in found.items() if math.isnan(own)}
    token = max(apart, key=apart.__getitem__)
    return apart[token] / min(probe.deviations[place], _WIDEST), token


def _told(token: int, log_probs: Mapping[int, float]) -> str:
    return f"{log_probs[token]:.4f}" if token in log_probs else f"below {min(log_probs.values()):.4f}"


def _divergence(probe: Probe, place: int, found: Mapping[int, float]) -> float:
    least = min(found.values())
    trained = [(math.exp(value), value) for value in probe.top_log_probs[place]]
    served = [found.get(token, least) for token in probe.top_tokens[place]]
    total = sum(share * (value - other) for (share, value), other in zip(trained, served, strict=True))
    rest, other_rest = (
        max(1e-12, 1.0 - sum(shares)) for shares in ([s for s, _ in trained], [math.exp(v) for v in served])
    )
    return max(0.0, total + rest * (math.log(rest) - math.log(other_rest)))
