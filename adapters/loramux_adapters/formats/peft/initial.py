"""Adapters that took their initial values from the base: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ.

Training began with W - s B0 A0 in place of W, so that the file is right on that residual base alone. There are three
ways to serve it: PEFT converts it while saving; the initial pair comes along, and is subtracted again, at rank 2r,
exactly; or the base that is served is the residual one, and the upload says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loramux_adapters.adapter_files import CONFIG_FILE, INITIAL_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.declared_base import FINGERPRINT_KEY, RESIDUAL_KEY, declares_residual
from loramux_adapters.formats.peft.tuner import Tuner
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import BaseModelSpec

# What it subtracts is the error of a quantization, of which the pair holds a part.
_NOT_BY_THE_PAIR = "loftq"


def needs_initial_pair(
    tuner: Tuner,
    files: Mapping[str, Path],
    declared: str | None,
    declarations: Mapping[str, Mapping[str, object]],
    base: BaseModelSpec,
) -> bool:
    """Whether INITIAL_FILE is to be read and subtracted.

    Raises AdapterInvalid where the adapter would be wrong on this base, or the file has no meaning.
    """
    has_pair, moved = INITIAL_FILE in files, tuner.moved_base
    is_residual = declares_residual(declarations)
    if moved is None:
        if has_pair or is_residual:
            what = INITIAL_FILE if has_pair else RESIDUAL_KEY
            raise AdapterInvalid(
                f"{what}: init_lora_weights says that the base was not moved, so it has no meaning",
                subject=what,
                remedy="leave it out, or save the adapter with the init_lora_weights that it was trained with",
            )
        return False
    if is_residual and not has_pair and declared == base.fingerprint:
        return False
    if has_pair and not is_residual and not moved.startswith(_NOT_BY_THE_PAIR):
        return True
    by_pair = "" if moved.startswith(_NOT_BY_THE_PAIR) else (
        f"convert it (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or add the adapter that was "
        f"saved before training as {INITIAL_FILE}, or "
    )  # fmt: skip
    raise AdapterInvalid(
        f"{CONFIG_FILE}: init_lora_weights: {quote(moved)} moved the base weights, so the adapter is wrong here",
        subject=f"{CONFIG_FILE}: init_lora_weights",
        remedy=f"{by_pair}serve the residual base and say so in loramux.json: {FINGERPRINT_KEY}, {RESIDUAL_KEY} true",
    )
