"""A trained adapter as a directory that its format's package loads, declaring the base it belongs to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from loramux_adapters.adapter_files import CERTIFICATE_FILE, CONFIG_FILE
from loramux_adapters.formats.registry import read
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from loramux_trainer.certify import Certified
from loramux_trainer.checkpoints import TEMPORARY, move_durably
from loramux_trainer.finished import REPORT
from loramux_trainer.methods.layouts import LIMITS, write
from loramux_trainer.methods.trained import TrainedAdapter

__all__ = ["REPORT", "export"]

Certify = Callable[[AdapterWeights], Certified]
"""What was exported, read back -> its certificate. Raises OutputFailed where it is not what was trained."""


def export(
    output: Path, adapter: TrainedAdapter, base: BaseModelSpec, certify: Certify, report: Callable[[Certified], str]
) -> None:
    """Write the adapter, its certificate and the report into `output`.

    All files are complete beside their places, and read as a server reads them, before the first one takes its own, on
    the same disk: a full one leaves nothing. The config comes last, so that a torn export is not taken for an adapter.
    """
    for leftover in output.glob(TEMPORARY + "*"):  # of an export that was killed
        shutil.rmtree(leftover)
    config, tensors = adapter.files()
    weights_file = adapter.layout.weights_file
    with tempfile.TemporaryDirectory(dir=output, prefix=TEMPORARY) as scratch:
        write(Path(scratch), adapter.layout, config, tensors, base)
        certified = certify(read({name: Path(scratch) / name for name in (weights_file, CONFIG_FILE)}, base, LIMITS))
        (Path(scratch) / CERTIFICATE_FILE).write_bytes(certified.certificate.to_json())
        (Path(scratch) / REPORT).write_text(report(certified), encoding="utf-8")
        for name in (weights_file, CERTIFICATE_FILE, REPORT, CONFIG_FILE):
            move_durably(Path(scratch) / name, output / name)
