"""Checkpoints: the whole state of a run as safetensors and JSON, written so that a torn one is never seen.

A checkpoint is a directory `step-00000100`, made under a temporary name, flushed, then renamed. Knows nothing of
what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from loramux_trainer.errors import CheckpointInvalid

if TYPE_CHECKING:
    import torch

CHECKPOINTS = "checkpoints"
"""Where they lie in a job's output."""

_STATE, _META = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"step-(\d{8})")
TEMPORARY = ".partial-"
"""Begins the names of files and directories that are still being written."""


@dataclass(frozen=True)
class Checkpoint:
    """`meta` is JSON values. `tensors` are on the CPU."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any]


def write_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write durably and return its directory; older ones beyond `keep` are removed after it is safe.

    A run that is stopped before it takes a step finds its step already there: the state it came from, which stays.
    """
    from safetensors.torch import save  # here, since it imports torch: listing checkpoints does not need it

    final = root / f"step-{checkpoint.step:08d}"
    if final.exists():
        return final
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(TEMPORARY + "*"):
        shutil.rmtree(leftover)
    state = save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    meta = {**checkpoint.meta, "step": checkpoint.step, "state_sha256": hashlib.sha256(state).hexdigest()}
    partial = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
    try:
        write_durably(partial / _STATE, state)
        write_durably(partial / _META, json.dumps(meta, indent=2).encode())
        _sync_directory(partial)
        partial.rename(final)
    except OSError:  # mostly a full disk, which the partial file would keep full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_directory(root)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify. Raises CheckpointInvalid."""
    from safetensors.torch import load

    try:
        meta = json.loads((directory / _META).read_text(encoding="utf-8"))
        state = (directory / _STATE).read_bytes()
        if hashlib.sha256(state).hexdigest() != meta["state_sha256"]:
            raise CheckpointInvalid(f"{directory}: {_STATE} is not the file that was written; remove this checkpoint")
        return Checkpoint(int(meta["step"]), load(state), meta)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointInvalid(f"{directory} cannot be read ({error}); remove this checkpoint") from error


def write_durably(path: Path, content: bytes) -> None:
    """Write and flush to the device."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def move_durably(source: Path, target: Path) -> None:
    """Flush `source` and put it at `target` in one step: readers see the old file or the new one."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)
    _sync_directory(target.parent)


def remove_checkpoint(directory: Path) -> None:
    """Remove one as far as that is possible, and the directory of checkpoints when it was the last."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):  # not empty
        directory.parent.rmdir()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
