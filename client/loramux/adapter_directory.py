"""What can be seen of a directory before it is pushed: why it holds no adapter, and whether its adapter does nothing.

Looks at names and bytes; knows no tensor library and no server. The server checks what is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_WEIGHTS, HUB_INTERFACE = "adapter.safetensors", "adapter_interface.json"
"""Those of AdapterHub's package, whose config is named as PEFT's."""

# PEFT begins with zeros in these: B of a linear map, A of an embedding.
_ZERO_AT_FIRST = (".lora_B.weight", ".lora_embedding_A")
_MAX_HEADER_BYTES = 16 << 20
_READ_BYTES = 1 << 20


def hint(directory: Path, present: set[str]) -> str:
    """A sentence for a directory that lacks one of its files: what it seems to be, and what to push. OSError."""
    if shard := _first(present, r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)"):
        return (
            f"its adapter is in shards ({shard}): load it with PEFT and save it in one file, "
            "save_pretrained(DIRECTORY, max_shard_size='100GB')"
        )
    if "adapter_model.bin" in present:
        return "adapter_model.bin is a pickle and is never sent: save again with safe_serialization=True"
    if "pytorch_adapter.bin" in present:
        return (
            "pytorch_adapter.bin is a pickle of AdapterHub's and is never sent: save again with "
            "save_adapter(DIRECTORY, NAME, with_head=False, use_safetensors=True)"
        )
    if "adapters.safetensors" in present:
        return (
            "adapters.safetensors is an adapter of MLX, with other names and transposed matrices: "
            "convert it to PEFT's format first"
        )
    if inside := _adapters_below(directory, present):
        return f"it holds adapters in directories of their own ({', '.join(inside)}): push {directory / inside[-1]}"
    if "checkpoints" in present:
        return "it is the output of an unfinished run: end it with loramux train --resume, then push it"
    if _first(present, r"(model|pytorch_model)\b.*\.(safetensors|bin|json)"):
        return (
            "it holds a whole model, into which an adapter may have been merged: push the adapter that was saved "
            "before merge_and_unload, or serve the model itself with loramux serve --model"
        )
    return "is it the directory that save_pretrained wrote?"


def find_head(present: set[str]) -> str:
    """A file of a prediction head that AdapterHub's package saved beside an adapter; empty if there is none."""
    return _first(present, r"model_head\.safetensors|pytorch_model_head\.bin") if HUB_WEIGHTS in present else ""


def remark(directory: Path) -> str:
    """What its owner should know of a complete PEFT adapter; empty if nothing. OSError."""
    with (directory / WEIGHTS).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= _MAX_HEADER_BYTES else {}
            zeros = [tuple(entry["data_offsets"]) for name, entry in header.items() if name.endswith(_ZERO_AT_FIRST)]
            others = any(name.endswith(".bias") for name in header)
            if others or not zeros or any(any(data) for data in _read(directory, 8 + length, zeros)):
                return ""
        except (ValueError, TypeError, KeyError, AttributeError):
            return ""  # the server says what is wrong with it
    return (
        "it changes nothing: every lora_B is zero, as before the first training step; was it saved from the model that "
        "was trained?"
    )


def _read(directory: Path, start: int, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
    with (directory / WEIGHTS).open("rb") as file:
        for begin, end in ranges:
            file.seek(start + begin)
            left = end - begin
            while left > 0 and (data := file.read(min(left, _READ_BYTES))):
                yield data
                left -= len(data)


def _adapters_below(directory: Path, present: set[str]) -> list[str]:
    """Directories with an adapter in them, the last checkpoint last."""
    found = [name for name in present if (directory / name / CONFIG).is_file()]
    return sorted(found, key=lambda name: (int((re.findall(r"\d+", name) or ["0"])[-1]), name))


def _first(present: set[str], pattern: str) -> str:
    return min((name for name in present if re.fullmatch(pattern, name)), default="")
