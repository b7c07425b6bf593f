"""An adapter's way out: a directory that its package loads, and that names the base it was made on.

Writes into a directory the caller owns; making it appear at once (a temporary directory and a rename) is the
caller's. Same input, same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.formats.declared_base import FINGERPRINT_KEY


def write_files(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    fingerprint: str | None,
    *,
    weights_file: str = WEIGHTS_FILE,
) -> None:
    """Write both files, of whatever method, from an adapter_config.json and tensors by their names in the file.

    `fingerprint` is that of the base it declares, None to declare none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if fingerprint is None else {FINGERPRINT_KEY: fingerprint}
    # One key only: safetensors writes several in an order that changes from call to call.
    weights = directory / weights_file
    save_file(dict(tensors), weights, metadata=metadata)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    (directory / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")
    # safetensors makes its file readable for its owner alone, whatever the umask says.
    weights.chmod((directory / CONFIG_FILE).stat().st_mode & 0o777)
