"""What is said of a directory before it is pushed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from loramux import Client
from loramux.adapter_directory import remark
from loramux.cli.main import app
from loramux.errors import LocalFilesError
from loramux.upload import collect
from support.fake_service import FakeServer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([CONFIG], r"holds no adapter_model\.safetensors; is it the directory that save_pretrained wrote\?"),
        (
            [CONFIG, "adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"],
            r"its adapter is in shards \(adapter_model-00001-of-00002\.safetensors\): .* save it in one file",
        ),
        ([CONFIG, "adapter_model.bin"], r"adapter_model\.bin is a pickle and is never sent"),
        ([CONFIG, "pytorch_adapter.bin"], r"is a pickle of AdapterHub's .* with_head=False, use_safetensors=True"),
        ([CONFIG, "adapter.safetensors", "model_head.safetensors"], r"a prediction head \(model_head\.safetensors\)"),
        (["adapter.safetensors"], r"holds no adapter_config\.json"),
        ([CONFIG, "adapters.safetensors", "0000100_adapters.safetensors"], "an adapter of MLX"),
        (["config.json", "model.safetensors", "tokenizer.json"], "it holds a whole model, into which"),
        (["config.json", "model.safetensors.index.json"], "serve the model itself with loramux serve --model"),
        (
            [f"checkpoint-{step}/{CONFIG}" for step in (900, 1000, 50)],
            r"directories of their own \(checkpoint-50, checkpoint-900, checkpoint-1000\): push .*/checkpoint-1000",
        ),
        ([f"default/{CONFIG}"], r"directories of their own \(default\): push .*/default"),
        (["checkpoints/step-00000001/state.safetensors"], "loramux train --resume"),
    ],
)
def test_a_directory_without_an_adapter_is_told_what_it_is(tmp_path: Path, files: list[str], words: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with Client("127.0.0.1:1") as client, pytest.raises(LocalFilesError, match=words):
        client.push(tmp_path, "name")


def write(directory: Path, **tensors: torch.Tensor) -> None:
    names = {f"base_model.model.q.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    save_file(names, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))


ZERO, ONE = torch.zeros(300, 2), torch.zeros(300, 2).index_put((torch.tensor(299), torch.tensor(1)), torch.tensor(1.0))


def test_an_adapter_that_was_never_trained_is_remarked(tmp_path: Path) -> None:
    a = torch.ones(2, 3)
    write(tmp_path, lora_A__weight=a, lora_B__weight=ZERO)
    assert remark(tmp_path).startswith("it changes nothing: every lora_B is zero")
    write(tmp_path, lora_embedding_A=ZERO, lora_embedding_B=a)
    assert remark(tmp_path)
    for trained in (
        {"lora_A__weight": a, "lora_B__weight": ONE},
        {"lora_A__weight": a, "lora_B__weight": ZERO, "base_layer__bias": torch.ones(3)},
        {"lora_embedding_A": ONE, "lora_embedding_B": a},
    ):
        write(tmp_path, **trained)
        assert remark(tmp_path) == ""


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_file_is_the_servers_to_refuse(tmp_path: Path, data: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(data)
    assert remark(tmp_path) == ""


def test_a_push_says_that_the_adapter_changes_nothing(fake: FakeServer, tmp_path: Path) -> None:
    write(tmp_path, lora_A__weight=torch.ones(2, 3), lora_B__weight=ZERO)
    result = CliRunner().invoke(app, ["adapters", "push", str(tmp_path), "idle", "--address", fake.address])
    assert result.exit_code == 0
    assert "warning: it changes nothing: every lora_B is zero" in " ".join(result.stderr.split())
    with Client(fake.address) as client:
        assert client.push(tmp_path, "idle").remark


def test_a_directory_of_adapterhubs_is_sent_with_its_interface(tmp_path: Path) -> None:
    for file in (CONFIG, "adapter.safetensors", "adapter_interface.json", "head_config.json"):
        (tmp_path / file).write_bytes(b"{}")
    bundle = collect(tmp_path, "name", {}, allow_base_mismatch=False)
    assert [entry.file for entry in bundle.files] == [CONFIG, "adapter.safetensors", "adapter_interface.json"]
    assert bundle.left_out == ("head_config.json",)
    (tmp_path / WEIGHTS).write_bytes(b"{}")
    bundle = collect(tmp_path, "name", {}, allow_base_mismatch=False)
    assert [entry.file for entry in bundle.files] == [CONFIG, WEIGHTS]
