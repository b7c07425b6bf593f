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

Served = Sequence[Mapping[int, float]]
"""Of one probe: after each token but the last, token -> natural log-probability of the most likely next ones."""

_SAME_TEMPLATE = "serve the base with the chat template it was trained with, or train on this one"


@dataclass(frozen=True)
class Replay:
    """How far what is served is from what was certified, at the worst position.

    `difference`: of a log-probability, over the deviation of the position's logits. `divergence`: Kullback-Leibler from
    the certified to the served distribution, in nats, over the certified tokens and the rest as one.
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
    """`served` of each probe, by a server that computes in `dtype`."""
    difference, where, divergence = -1.0, "", 0.0
    for number, (probe, positions) in enumerate(zip(certificate.probes, served, strict=True)):
        for place, found in enumerate(positions):
            own, token = _difference(probe, place, found)
            divergence = max(divergence, _divergence(probe, place, found))
            if own > difference:
                trained = dict(zip(probe.top_tokens[place], probe.top_log_probs[place], strict=True))[token]
                answer = f"{found[token]:.4f}" if token in found else f"below {min(found.values()):.4f}"
                where = f"probe {number} after {place + 1} tokens: token {token} has {answer}, trained {trained:.4f}"
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
    """The largest of the position, and its token. One that is not served is at most the least likely that is."""
    least = min(found.values())
    worst, token = -1.0, probe.top_tokens[place][0]
    for own, trained in zip(probe.top_tokens[place], probe.top_log_probs[place], strict=True):
        apart = abs(found[own] - trained) if own in found else max(0.0, trained - least)
        apart = math.inf if math.isnan(apart) else apart / probe.deviations[place]
        if apart > worst:
            worst, token = apart, own
    return worst, token


def _divergence(probe: Probe, place: int, found: Mapping[int, float]) -> float:
    least = min(found.values())
    trained = [(math.exp(value), value) for value in probe.top_log_probs[place]]
    served = [found.get(token, least) for token in probe.top_tokens[place]]
    total = sum(share * (value - other) for (share, value), other in zip(trained, served, strict=True))
    rest, other_rest = (
        max(1e-12, 1.0 - sum(shares)) for shares in ([s for s, _ in trained], [math.exp(v) for v in served])
    )
    return max(0.0, total + rest * (math.log(rest) - math.log(other_rest)))
