"""The examination every base passes before it serves or trains: one answer, with the reason where it is no."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from loramux_adapters.base.load import BaseRefused, LoadedBase
from loramux_adapters.guard.exactness import ask_untouched, check_exact
from loramux_adapters.guard.layers import AttentionLayer
from loramux_adapters.guard.probe import probe_attention
from loramux_adapters.guard.products import own_products
from loramux_adapters.guard.reference import ReferencePacked
from loramux_adapters.guard.rope import RopeChoice, settle_rope

FLOAT32_BYTES = 4 << 30
"""What copies of the parameters that are not in 4 bits may take while the examination lasts."""

ROOM_BESIDE = 1024
"""Positions a reference cache has beyond the context: it grows as it is filled."""


@dataclass(frozen=True)
class Examined:
    """How the base attends, and where rows choose their rotary factors if it is of type longrope."""

    layers: tuple[AttentionLayer, ...]
    rope: RopeChoice | None


def examine(base: LoadedBase, context: int) -> Examined:
    """Probes the model's attention and computes packed steps by the plain reference against the model untouched, in
    float32 where there is memory for it: in half precision a small difference of kind would pass for rounding.

    To be called before anything is put into the model; leaves its attention implementation as it was. Raises
    BaseRefused with the architecture and the reason.
    """
    before = base.model.config._attn_implementation
    try:
        with refusals_of(base):
            rope = settle_rope(base.model)
            layers = tuple(probe_attention(base.model, context))
            with in_float32(base) as exact:
                truth = ask_untouched(exact, layers, context, room=context + ROOM_BESIDE)
                with own_products(exact.model, exact.compute_dtype):
                    check_exact(truth, ReferencePacked(exact.model, layers, rope), exact.compute_dtype)
    finally:
        base.model.set_attn_implementation(before)
    return Examined(layers, rope)


@contextmanager
def in_float32(base: LoadedBase) -> Iterator[LoadedBase]:
    """Within, `base` computes in float32, its 4-bit weights included, if the copies take no more than FLOAT32_BYTES."""
    half = [p for p in base.model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    if base.compute_dtype == torch.float32 or sum(p.numel() for p in half) * 4 > FLOAT32_BYTES:
        yield base
        return
    kept = [parameter.data for parameter in half]
    try:
        for parameter in half:
            parameter.data = parameter.data.float()
        yield replace(base, compute_dtype=torch.float32)
    finally:
        for parameter, data in zip(half, kept, strict=True):
            parameter.data = data


@contextmanager
def refusals_of(base: LoadedBase) -> Iterator[None]:
    """Whatever fails within is a refusal of the base, not a fault of ours: models are code of others."""
    name = type(base.model).__name__
    try:
        yield
    except BaseRefused as refusal:
        raise BaseRefused(f"{name} cannot be served exactly: {refusal}") from refusal
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise BaseRefused(
            f"{name} cannot be served by this version: its forward failed ({type(error).__name__}: {said})"
        ) from error
