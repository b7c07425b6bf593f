"""The certificate of a trained adapter: what the training graph computes on probes, beside what was exported.

The logits of the tensors as they are trained and of the files as a server reads them are compared here; those of the
files are certified, for a server to compute again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch

from loramux_adapters.certificate.document import Arithmetic, Certificate, Dtype, Probe
from loramux_adapters.certificate.probes import CONVERSATION, probe_tokens
from loramux_adapters.spec import AdapterSpec, BaseModelSpec
from loramux_adapters.tokenization import find_chat_template
from loramux_adapters.weights import AdapterWeights
from loramux_trainer.base_reading import BaseReading
from loramux_trainer.data.examples import Example
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.parts import StepParts

_TOP = 8
_DIGITS = 6
_LEAST = 10.0**-_DIGITS  # of a head that says nothing
_PACKAGES = ("loramux", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class Asked:
    """What is asked of an adapter: token ids by probe, and the sha256 of the chat template that made some of them."""

    probes: tuple[tuple[int, ...], ...]
    template: str


@dataclass(frozen=True)
class Certified:
    """`difference`: of the logits of what was exported from those of what was trained, over their deviation."""

    certificate: Certificate
    difference: float


def questions(exported: AdapterSpec, base: BaseModelSpec, reading: BaseReading) -> Asked:
    """For an adapter as it was exported."""
    room = base.context_length - exported.virtual_tokens - 1
    conversation, template = _conversation(reading)
    return Asked(probe_tokens(exported.digest, base.vocab_size, room, conversation), template)


@torch.no_grad()
def fleet_logits(model: FleetModel, parts: StepParts, asked: Asked, virtual_tokens: int) -> list[torch.Tensor]:
    """Of each probe what is predicted after each token but the last: [len(tokens) - 1, vocabulary], float32.

    `model` is open.
    """
    logits = []
    for tokens in asked.probes:
        rows = MemberRows(parts, (Example(tokens, tokens),), 0, virtual_tokens)
        with model.running([rows]) as hidden:
            logits.append(model.logits(hidden))
    return logits


def certify(model: FleetModel, asked: Asked, exported: AdapterWeights, as_trained: Sequence[torch.Tensor]) -> Certified:
    """Computes in the training's own arithmetic, with `model` open. `as_trained`: the logits of what was exported, as
    it was trained, shaped as fleet_logits gives them.
    """
    base, spec = model.base, exported.spec
    parts = StepParts({name: module.parts for name, module in exported.modules.items()})
    logits = fleet_logits(model, parts, asked, spec.virtual_tokens)
    difference = max(
        float(((ours - theirs).abs().amax(1) / theirs.std(1)).max())
        for ours, theirs in zip(logits, as_trained, strict=True)
    )
    certificate = Certificate(
        adapter=spec.digest,
        base=base.spec.fingerprint,
        chat_template=asked.template,
        computed=Arithmetic(base.device.type, _name(base.compute_dtype), _name(model.products)),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        probes=tuple(_probe(tokens, each) for tokens, each in zip(asked.probes, logits, strict=True)),
    )
    return Certified(certificate, difference)


def _probe(tokens: tuple[int, ...], logits: torch.Tensor) -> Probe:
    values, ids = torch.log_softmax(logits, 1).topk(min(_TOP, logits.shape[1]), dim=1)
    return Probe(
        tokens=tokens,
        deviations=tuple(max(round(value, _DIGITS), _LEAST) for value in logits.std(1).tolist()),
        top_tokens=tuple(tuple(row) for row in ids.tolist()),
        top_log_probs=tuple(tuple(round(value, _DIGITS) for value in row) for row in values.tolist()),
    )


def _name(dtype: torch.dtype) -> Dtype:
    return cast("Dtype", str(dtype).removeprefix("torch."))


def _conversation(reading: BaseReading) -> tuple[list[int] | None, str]:
    """Token ids of a conversation up to its answer, where the template renders it, and the template's sha256."""
    template = find_chat_template(reading.tokenizer)
    if template is None:
        return None, ""
    ids: list[int] | None = None
    with suppress(RecordInvalid):  # templates refuse what they like
        ids = reading.encoder.encode_prompt(CONVERSATION)
    return ids, hashlib.sha256(template.encode()).hexdigest()
