"""Loading a base says nothing of its own accord: no bar, no advice; and nothing else is silenced with them. Nothing of
bitsandbytes is compiled on the way."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from loramux_adapters.embedded.tiny import tiny_path
from support.tiny import load_tiny

ROOT = Path(__file__).resolve().parents[3]
LOAD = f"""
import sys
import torch
compile = torch.compile
import loramux_adapters.base.bitsandbytes_compat
assert not [name for name in sys.modules if name.startswith("torch._inductor")]
assert torch.compile is compile
from loramux_adapters.base.load import load_base
load_base({str(tiny_path())!r}, compute_dtype=torch.float32)
"""


def test_a_load_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_only_the_one_piece_of_advice_is_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module")
        logger.warning("the library was compiled for another CPU")
    assert [record.getMessage() for record in caplog.records] == ["the library was compiled for another CPU"]


def test_bars_of_others_stay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # whatever a command in this process has said

    def count(bar: object, args: object, options: object) -> object:
        made.append(options)
        return bar(*args, **options)  # type: ignore[operator]

    made: list[object] = []
    before = transformers_logging.set_tqdm_hook(count)
    try:
        assert load_tiny().compute_dtype is torch.float32
        assert made == []
        list(transformers_logging.tqdm([1], desc="someone's own"))
        assert len(made) == 1
    finally:
        transformers_logging.set_tqdm_hook(before)
    assert "someone's own" in capsys.readouterr().err


def test_bitsandbytes_is_imported_in_one_place() -> None:
    """An import elsewhere might be the first, and be advised."""
    importers = []
    for root in ("adapters", "server", "trainer", "client"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                importers += [path.name for name in names if name.partition(".")[0] == "bitsandbytes"]
    assert set(importers) == {"bitsandbytes_compat.py"}
