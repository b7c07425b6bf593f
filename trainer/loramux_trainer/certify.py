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
class Certified:
    """`difference`: of the logits of what was exported from those of what was trained, over their deviation."""

    certificate: Certificate
    difference: float


@torch.no_grad()
def certify(model: FleetModel, trained: StepParts, exported: AdapterWeights, reading: BaseReading) -> Certified:
    """Computes in the training's own arithmetic, with `model` open. `trained`: what was exported, as it is trained."""
    base, spec = model.base.spec, exported.spec
    room = base.context_length - spec.virtual_tokens - 1
    conversation, template = _conversation(reading)
    asked = probe_tokens(spec.digest, base.vocab_size, room, conversation)
    parts = StepParts({name: module.parts for name, module in exported.modules.items()})
    logits = [_logits(model, parts, tokens, spec.virtual_tokens) for tokens in asked]
    as_trained = [_logits(model, trained, tokens, spec.virtual_tokens) for tokens in asked]
    difference = max(
        float(((ours - theirs).abs().amax(1) / theirs.std(1)).max())
        for ours, theirs in zip(logits, as_trained, strict=True)
    )
    certificate = Certificate(
        adapter=spec.digest,
        base=base.fingerprint,
        chat_template=template,
        computed=Arithmetic(model.base.device.type, _name(model.base.compute_dtype), _name(model.products)),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        probes=tuple(_probe(tokens, each) for tokens, each in zip(asked, logits, strict=True)),
    )
    return Certified(certificate, difference)


def _logits(model: FleetModel, parts: StepParts, tokens: Sequence[int], virtual_tokens: int) -> torch.Tensor:
    """What is predicted after each token but the last: [len(tokens) - 1, vocabulary], float32."""
    example = Example(tuple(tokens), tuple(tokens))
    with model.running([MemberRows(parts, (example,), 0, virtual_tokens)]) as hidden:
        return model.logits(hidden)


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
