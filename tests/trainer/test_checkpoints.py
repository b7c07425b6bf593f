"""Checkpoints on disk: round trip, retention, and nothing torn is ever seen."""

import json
from pathlib import Path

import pytest
import torch

from loramux_trainer import checkpoints
from loramux_trainer.checkpoints import Checkpoint, list_checkpoints, read_checkpoint, write_checkpoint
from loramux_trainer.errors import CheckpointInvalid


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((3,), float(step)), "rng": torch.get_rng_state()}, {"note": "x"})


def test_round_trip_and_retention(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (5, 10, 15):
        write_checkpoint(root, _checkpoint(step), keep=2)
    assert [path.name for path in list_checkpoints(root)] == ["step-00000010", "step-00000015"]
    read = read_checkpoint(list_checkpoints(root)[-1])
    assert (read.step, read.meta["note"]) == (15, "x")
    assert torch.equal(read.tensors["w"], torch.full((3,), 15.0))
    assert torch.equal(read.tensors["rng"], torch.get_rng_state())


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, _checkpoint(1), keep=1)
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint.json", "state.safetensors"]
    assert json.loads((directory / "checkpoint.json").read_text())["step"] == 1


def test_a_crash_while_writing_leaves_the_old_one_and_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, _checkpoint(1), keep=1)

    def power_cut(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_durably", power_cut)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, _checkpoint(2), keep=1)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert [read_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [1]
    write_checkpoint(tmp_path, _checkpoint(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "meta", "gone"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    directory = write_checkpoint(tmp_path, _checkpoint(1), keep=1)
    state, meta = directory / "state.safetensors", directory / "checkpoint.json"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        state.write_bytes(content)
    elif damage == "cut":
        state.write_bytes(content[:-8])
    elif damage == "meta":
        meta.write_text("{}")
    else:
        state.unlink()
    with pytest.raises(CheckpointInvalid, match="remove this checkpoint"):
        read_checkpoint(directory)
