"""Fixtures of the client's tests: a fake server and an adapter directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_service import FakeServer, serve_fake


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serve_fake() as server:
        yield server


@pytest.fixture(autouse=True)
def no_wait_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands against an address where no server is fail at once."""
    for name in ("START_SECONDS", "GENERATE_START_SECONDS"):
        monkeypatch.setattr(f"loramux.cli.connecting.{name}", 0.0)


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    """What save_pretrained leaves: an adapter and files that no upload carries. 1.2 MB, so several chunks."""
    directory = tmp_path / "support-bot"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(1_200_000))
    (directory / "README.md").write_text("a model card")
    (directory / "optimizer.pt").write_bytes(b"pickle")
    return directory
