"""`loramux status`, and the completion of adapter names: what a shell and its user are told of a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loramux.cli.completion import complete_adapters
from loramux.cli.main import app
from loramux_protos.v1 import adapters_pb2
from support.fake_service import BASE, FakeServer


def _add(fake: FakeServer, name: str, *aliases: str) -> None:
    adapter = adapters_pb2.Adapter(name=name, digest="d" * 64, aliases=aliases)
    adapter.residency.tier = adapters_pb2.TIER_RESIDENT
    fake.state.adapters[name] = adapter


def test_status_says_what_is_served(fake: FakeServer) -> None:
    _add(fake, "german")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["status", "--address", fake.address])
    assert result.exit_code == 0, result.output
    shown = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert fake.address in shown["address"]
    assert BASE in shown["fingerprint"]
    assert "1 resident" in shown["adapters"]
    assert shown["state"].endswith("serving")


def test_status_as_json(fake: FakeServer) -> None:
    fake.set_serving(False)
    result = CliRunner().invoke(app, ["status", "--json", "--address", fake.address])
    found = json.loads(result.stdout)
    assert (found["address"], found["serving"]) == (fake.address, False)
    assert found["model"]["fingerprint"] == BASE
    assert found["adapters"] == {"resident": 0, "loaded": 0, "registered": 0}


class _Context:
    def __init__(self, address: str) -> None:
        self.params = {"address": address}


def test_adapters_complete_by_name_and_alias(fake: FakeServer) -> None:
    _add(fake, "german", "gutenberg")
    _add(fake, "polish")
    context = _Context(fake.address)
    assert complete_adapters(context, "g") == ["german", "gutenberg"]  # type: ignore[arg-type]
    assert complete_adapters(context, "x") == []  # type: ignore[arg-type]


def test_completion_is_silent_without_a_server() -> None:
    assert complete_adapters(_Context("127.0.0.1:1"), "g") == []  # type: ignore[arg-type]


@pytest.mark.parametrize("words", ["loramux adapters show g", "loramux generate --adapter g", "loramux adapters rm g"])
def test_a_shell_gets_the_names(fake: FakeServer, words: str) -> None:
    _add(fake, "german")
    environ = {**os.environ, "LORAMUX_ADDRESS": fake.address, "_LORAMUX_COMPLETE": "complete_bash"}
    environ |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    script = "import sys; sys.argv[0] = 'loramux'; from loramux.cli.main import app; app(prog_name='loramux')"
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["german"], done.stderr
