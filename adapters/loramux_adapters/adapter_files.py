"""The files an adapter may consist of: the one list that formats, store and trainer share. Imports values only."""

from __future__ import annotations

from collections.abc import Mapping

from loramux_adapters.former_name import DECLARATION_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INITIAL_FILE = "initial_adapter_model.safetensors"
"""The adapter as it was before its first step, of methods that subtract it from the base (PiSSA and its like)."""

DECLARATION_FILES = ("loramux.json", DECLARATION_FILE)
"""Where the base may be declared beside the weights' own metadata."""

REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)

MAX_FILE_BYTES: Mapping[str, int | None] = {
    CONFIG_FILE: 1 << 20,
    WEIGHTS_FILE: None,
    INITIAL_FILE: None,
    **dict.fromkeys(DECLARATION_FILES, 1 << 20),
}
"""Every allowed file and how large it may be; None: bounded by the upload quota alone."""
