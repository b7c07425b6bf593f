"""Files -> AdapterWeights: which files an adapter may have, and which format they are, by what they hold.

A new method of PEFT's is one file in `peft/` and one line in `PEFT_METHODS`; bottlenecks are in `adapterhub/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loramux_adapters.adapter_files import (
    ADAPTERHUB_SAVE,
    ADAPTERHUB_WEIGHTS_FILE,
    CONFIG_FILE,
    INTERFACE_FILE,
    MAX_FILE_BYTES,
    REQUIRED_FILES,
    TEXT_FILES,
    WEIGHTS_FILE,
    remedy_for,
)
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.adapterhub.config import is_adapterhub
from loramux_adapters.formats.adapterhub.reader import read_adapterhub
from loramux_adapters.formats.digest import digest_with_text
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.adalora import AdaLoraTuner
from loramux_adapters.formats.peft.beft import BeftTuner
from loramux_adapters.formats.peft.boft import BoftTuner
from loramux_adapters.formats.peft.c3a import C3aTuner
from loramux_adapters.formats.peft.deft import DeftTuner
from loramux_adapters.formats.peft.delora import DeloraTuner
from loramux_adapters.formats.peft.fourierft import FourierftTuner
from loramux_adapters.formats.peft.glora import GloraTuner
from loramux_adapters.formats.peft.gralora import GraloraTuner
from loramux_adapters.formats.peft.hira import HiraTuner
from loramux_adapters.formats.peft.hra import HraTuner
from loramux_adapters.formats.peft.ia3 import Ia3Tuner
from loramux_adapters.formats.peft.ln_tuning import LnTuner
from loramux_adapters.formats.peft.loha import LohaTuner
from loramux_adapters.formats.peft.lokr import LokrTuner
from loramux_adapters.formats.peft.lora import LoraTuner
from loramux_adapters.formats.peft.miss import MissTuner
from loramux_adapters.formats.peft.oft import OftTuner
from loramux_adapters.formats.peft.prefix import CartridgeTuner, PrefixTuner
from loramux_adapters.formats.peft.prompts import MultitaskPromptTuner, PromptTuner, PTuner
from loramux_adapters.formats.peft.pvera import PveraTuner
from loramux_adapters.formats.peft.randlora import RandloraTuner
from loramux_adapters.formats.peft.reader import read_peft
from loramux_adapters.formats.peft.road import RoadTuner
from loramux_adapters.formats.peft.shira import ShiraTuner
from loramux_adapters.formats.peft.supertuning import SupertuningTuner
from loramux_adapters.formats.peft.tinylora import TinyLoraTuner
from loramux_adapters.formats.peft.trainable_tokens import TrainableTokensTuner
from loramux_adapters.formats.peft.tuner import Tuner
from loramux_adapters.formats.peft.unilora import UniLoraTuner
from loramux_adapters.formats.peft.unserved import refuse_unserved
from loramux_adapters.formats.peft.vblora import VbLoraTuner
from loramux_adapters.formats.peft.vera import VeraTuner
from loramux_adapters.formats.peft.waveft import WaveftTuner
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights

PEFT_METHODS: tuple[type[Tuner], ...] = (
    LoraTuner,
    AdaLoraTuner,
    VeraTuner,
    LohaTuner,
    LokrTuner,
    GraloraTuner,
    MissTuner,
    HraTuner,
    Ia3Tuner,
    LnTuner,
    TrainableTokensTuner,
    PromptTuner,
    PTuner,
    MultitaskPromptTuner,
    PrefixTuner,
    CartridgeTuner,
    OftTuner,
    BoftTuner,
    RoadTuner,
    FourierftTuner,
    RandloraTuner,
    ShiraTuner,
    C3aTuner,
    WaveftTuner,
    HiraTuner,
    VbLoraTuner,
    DeloraTuner,
    DeftTuner,
    PveraTuner,
    UniLoraTuner,
    TinyLoraTuner,
    GloraTuner,
    BeftTuner,
    SupertuningTuner,
)

_BY_TYPE = {tuner.peft_type: tuner for tuner in PEFT_METHODS}


def read(
    files: Mapping[str, Path], base: BaseModelSpec, limits: ReadLimits, *, allow_base_mismatch: bool = False
) -> AdapterWeights:
    """Read an adapter for `base` from `files`, keyed by their names in MAX_FILE_BYTES.

    Raises AdapterInvalid when the files are malformed, unsafe or unsupported; AdapterIncompatible when they are for
    another base (unless `allow_base_mismatch`) or over `limits`; OSError when the disk fails.
    """
    weights = _read(files, base, limits, allow_base_mismatch=allow_base_mismatch)
    text_files = tuple(sorted((name, _sha256(files[name])) for name in files if name in TEXT_FILES))
    if not text_files:
        return weights
    digest = digest_with_text(weights.spec.digest, text_files)
    return replace(weights, spec=replace(weights.spec, digest=digest, text_files=text_files))


def _read(
    files: Mapping[str, Path], base: BaseModelSpec, limits: ReadLimits, *, allow_base_mismatch: bool
) -> AdapterWeights:
    for name in files:
        if name not in MAX_FILE_BYTES:
            raise AdapterInvalid(
                f"{quote(name)} is not a file of an adapter",
                subject=quote(name),
                remedy=remedy_for(name),
            )
    if CONFIG_FILE not in files:
        raise _missing(CONFIG_FILE, f"send {' and '.join(REQUIRED_FILES)}")
    config = strict_json.read_object(files[CONFIG_FILE], CONFIG_FILE, limits.max_config_bytes)
    if is_adapterhub(config):
        _check_files(files, ADAPTERHUB_WEIGHTS_FILE, (WEIGHTS_FILE,), f"save the adapter with {ADAPTERHUB_SAVE}")
        return read_adapterhub(files, config, base, limits, allow_base_mismatch=allow_base_mismatch)
    _check_files(files, WEIGHTS_FILE, (ADAPTERHUB_WEIGHTS_FILE, INTERFACE_FILE), f"send {' and '.join(REQUIRED_FILES)}")
    return read_peft(files, parse_config(config), base, limits, allow_base_mismatch=allow_base_mismatch)


def parse_config(config: Mapping[str, object]) -> Tuner:
    """The method of an adapter_config.json and its options. Raises AdapterInvalid naming the key."""
    method = config.get("peft_type")
    tuner = _BY_TYPE.get(method) if isinstance(method, str) else None
    if tuner is None:
        refuse_unserved(str(method))
        raise AdapterInvalid(
            f"{CONFIG_FILE}: peft_type {quote(method)} is not supported",
            subject=f"{CONFIG_FILE}: peft_type",
            remedy=f"supported: {', '.join(sorted(_BY_TYPE))}",
        )
    return tuner.parse(config)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(files: Mapping[str, Path], own: str, others: tuple[str, ...], remedy: str) -> None:
    if own not in files:
        raise _missing(own, remedy)
    for name in others:
        if name in files:
            raise AdapterInvalid(
                f"{name} is not a file of this adapter, whose weights are in {own}", subject=name, remedy="leave it out"
            )


def _missing(name: str, remedy: str) -> AdapterInvalid:
    return AdapterInvalid(f"{name} is missing", subject=name, remedy=remedy)
