"""A trained adapter as a directory that its format's package loads, declaring the base it belongs to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.adapter_files import CERTIFICATE_FILE, CONFIG_FILE
from loramux_adapters.formats.peft.writer import write_files
from loramux_adapters.formats.registry import read
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from loramux_trainer.certify import Certified
from loramux_trainer.checkpoints import TEMPORARY, move_durably
from loramux_trainer.finished import REPORT
from loramux_trainer.methods.layouts import LIMITS
from loramux_trainer.methods.trained import TrainedAdapter

__all__ = ["REPORT", "export", "export_files"]

Certify = Callable[[AdapterWeights], Certified]
"""What was exported, read back -> its certificate. Raises OutputFailed where it is not what was trained."""


def export(
    output: Path, adapter: TrainedAdapter, base: BaseModelSpec, certify: Certify, report: Callable[[Certified], str]
) -> None:
    """Write the adapter, its certificate and the report into `output`, see export_files."""
    config, tensors = adapter.files()

    def describe(scratch: Path) -> Mapping[str, bytes]:
        files = {name: scratch / name for name in (adapter.layout.weights_file, CONFIG_FILE)}
        certified = certify(read(files, base, LIMITS))
        return {CERTIFICATE_FILE: certified.certificate.to_json(), REPORT: report(certified).encode()}

    export_files(output, adapter.layout.weights_file, config, tensors, base, describe)


def export_files(
    output: Path,
    weights_file: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    base: BaseModelSpec,
    describe: Callable[[Path], Mapping[str, bytes]],
) -> None:
    """All files are complete beside their places before the first one takes its own, on the same disk: a full one
    leaves nothing. The config comes last, so that a torn export is not taken for an adapter. `describe` judges what
    lies in a directory, and gives what else belongs beside it.
    """
    for leftover in output.glob(TEMPORARY + "*"):  # of an export that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=output, prefix=TEMPORARY) as scratch:
        write_files(Path(scratch), config, tensors, base.fingerprint, weights_file=weights_file)
        beside = describe(Path(scratch))
        for name, content in beside.items():
            (Path(scratch) / name).write_bytes(content)
        for name in (weights_file, *beside, CONFIG_FILE):
            move_durably(Path(scratch) / name, output / name)
