"""A job's base before its weights are loaded: what its configuration and its tokenizer say about data and targets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

from loramux_adapters.base.load import BaseRefused
from loramux_adapters.base.outline import BaseOutline, read_outline
from loramux_adapters.base.source import explain_load
from loramux_trainer.data.examples import ExampleEncoder
from loramux_trainer.errors import ModelInvalid
from loramux_trainer.job import TrainConfig


@dataclass(frozen=True)
class BaseReading:
    """Enough of a base to encode records for it and to choose among its modules."""

    outline: BaseOutline
    tokenizer: Any
    encoder: ExampleEncoder


def read_base(job: TrainConfig, source: str) -> BaseReading:
    """Reads `source`, where the base of the job is. Raises ModelInvalid."""
    with loading(job):
        outline = read_outline(source, name=job.model)
        tokenizer = AutoTokenizer.from_pretrained(source)
    encoder = ExampleEncoder(tokenizer, _end_ids(outline.generation, tokenizer), outline.vocab_size)
    return BaseReading(outline, tokenizer, encoder)


@contextmanager
def loading(job: TrainConfig) -> Iterator[None]:
    """Turns what a load raises into ModelInvalid, which names the base as the job does."""
    try:
        yield
    except BaseRefused as refusal:
        raise ModelInvalid(f"{job.model} cannot be loaded: {refusal}") from refusal
    except (OSError, ValueError, SafetensorError) as error:
        explained = explain_load(job.model, error, os.environ)
        raise ModelInvalid(str(explained), remedy=explained.remedy) from error


def _end_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    declared = getattr(generation, "eos_token_id", None)
    ids = set(declared if isinstance(declared, list) else [declared])
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
