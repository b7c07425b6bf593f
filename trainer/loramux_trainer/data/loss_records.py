"""Which records a loss reads, and what to do where they are of another kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loramux_trainer.data.record_types import Completion, Conversation, Judged, Pair, Record, Tokens
from loramux_trainer.schema.loss_config import LossConfig

_READ: Final[Mapping[str, tuple[type, ...]]] = {
    "sft": (Completion, Conversation, Tokens),
    "dpo": (Pair,),
    "orpo": (Pair,),
    "kto": (Judged, Pair),
    "reward": (Pair,),
}
_NEEDS: Final[Mapping[str, str]] = {
    "sft": "answers without label",
    "dpo": "pairs: prompt, chosen and rejected",
    "orpo": "pairs: prompt, chosen and rejected",
    "reward": "pairs: prompt, chosen and rejected",
    "kto": "a label (true or false) beside each answer, or pairs of chosen and rejected",
}


def reads(loss: LossConfig, record: Record) -> bool:
    """Whether the record has what the loss compares."""
    return isinstance(record, _READ[loss.name])


def explain_unread(loss: LossConfig, record: Record) -> str:
    """Why a record is not for the loss, and the remedy."""
    if isinstance(record, Pair):
        remedy = "set loss: dpo or loss: orpo, or keep the chosen one, as completion or as the last message"
        what = "a preference record (chosen, rejected)"
    elif isinstance(record, Judged):
        remedy = "set loss: kto, or keep the good answers, without label"
        what = "a KTO record (label)"
    else:
        remedy = "set loss: sft, or add the other answer" if loss.name != "kto" else "set loss: sft, or add the label"
        what = "a record with one answer" if not isinstance(record, Tokens) else "a record of token ids (input_ids)"
    return f"{what}, and loss {loss.name} needs {_NEEDS[loss.name]}: {remedy}"
