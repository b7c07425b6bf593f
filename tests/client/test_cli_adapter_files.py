"""`loramux adapters verify DIRECTORY` and `diff`: no server is asked about a directory, and exit codes tell."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from loramux_adapters.embedded.tiny import tiny_path
from support.adapters import edit_config
from support.fake_service import FakeServer
from support.tiny_adapters import tiny_files, write_files

NOWHERE = "127.0.0.1:1"
TINY = "loramux-tiny"


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["adapters", *map(str, arguments)])


def verify(directory: str | Path, *more: str) -> Result:
    return run("verify", directory, "--address", NOWHERE, *more)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_files(tmp_path / "shout", tiny_files(1, rank=4))


def test_a_directory_is_told_as_a_server_with_the_base_would_see_it(adapter: Path) -> None:
    told = json.loads(verify(adapter, "--base", TINY, "--json").stdout)
    assert (told["accepted"], told["checked_against_base"]) == (True, True)
    found = told["adapter"]
    assert (found["kind"], found["ranks"], found["targets"], found["modules"]) == ("lora", [4], ["q_proj"], 4)
    assert (found["base"], found["declared_base"]) == (TINY, None)
    assert found["cost"]["rank_rows"] == 8
    assert found["cost"]["nbytes"] > found["nbytes"] // 2
    shown = verify(adapter, "--base", TINY)
    assert shown.exit_code == ExitCode.OK
    assert found["digest"] in shown.stdout
    assert "8 rank rows" in shown.stdout


def test_a_refusal_has_the_servers_words_and_is_told_by_exit_code(adapter: Path) -> None:
    edit_config(adapter, r=5)
    refused = verify(adapter, "--base", TINY)
    assert refused.exit_code == ExitCode.REFUSED
    assert refused.stderr.startswith("refused: adapter_model.safetensors: tensor ")
    assert "should be [5, " in refused.stderr
    told = json.loads(verify(adapter, "--base", TINY, "--json").stdout)
    assert (told["accepted"], told["reason"]) == (False, "ADAPTER_INCOMPATIBLE")
    assert refused.stderr == f"refused: {told['refusal']}\n"


def test_a_tokenizer_that_a_server_would_refuse_is_refused_here(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{}")
    refused = verify(adapter, "--base", TINY)
    assert refused.exit_code == ExitCode.REFUSED
    assert "not the base's tokenizer with added tokens" in refused.stderr
    (adapter / "tokenizer.json").write_bytes((tiny_path() / "tokenizer.json").read_bytes())
    shown = verify(adapter, "--base", TINY)
    assert shown.exit_code == ExitCode.OK
    assert "tokenizer.json: the same as the base" in shown.stdout


def test_what_texts_an_adapter_brings_is_told_and_can_be_left_out(adapter: Path) -> None:
    own = json.loads((tiny_path() / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    own["added_tokens"].append({"id": 264, "content": "<tool>", **flags})
    (adapter / "tokenizer.json").write_text(json.dumps(own))
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<tool>"}')
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    files = "tokenizer.json, tokenizer_config.json, chat_template.jinja"
    shown = verify(adapter, "--base", TINY).stdout
    assert f"{files}: 1 added token, a chat template of its own, eos_token '<tool>'" in shown
    told = json.loads(verify(adapter, "--base", TINY, "--json").stdout)
    assert (told["text"]["added"][0]["content"], told["text"]["roles"]) == ("<tool>", {"eos_token": "<tool>"})
    assert f"{files}: compared with no base's" in verify(adapter).stdout
    left = verify(adapter, "--base", TINY, "--no-tokenizer")
    assert left.exit_code == ExitCode.OK
    assert "by the base's tokenizer and chat template" in left.stdout
    assert json.loads(verify(adapter, "--base", TINY, "--no-tokenizer", "--json").stdout)["text"] is None


def test_what_was_pushed_without_its_tokenizer_is_compared_without_it(adapter: Path, fake: FakeServer) -> None:
    (adapter / "tokenizer.json").write_text("{}")
    run("push", adapter, "bot", "--no-tokenizer", "--address", fake.address)
    against = ("verify", "bot", "--against", adapter, "--address", fake.address)
    assert run(*against).exit_code == ExitCode.NO
    assert run(*against, "--no-tokenizer").exit_code == ExitCode.OK


def test_without_a_base_it_says_what_the_files_tell_and_that_this_is_all(adapter: Path) -> None:
    shown = verify(adapter)
    assert shown.exit_code == ExitCode.OK
    assert "undeclared" in shown.stdout
    assert "give one with --base" in shown.stderr
    (adapter / "adapter_model.safetensors").write_bytes(b"PK" + b"x" * 100)
    assert verify(adapter).exit_code == ExitCode.REFUSED


def test_a_directory_without_an_adapter_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    refused = verify(tmp_path)
    assert refused.exit_code == ExitCode.REFUSED
    assert "adapter_model.bin is a pickle" in refused.stderr


def test_a_base_that_cannot_be_had_is_a_usage_error(adapter: Path) -> None:
    refused = verify(adapter, "--base", "nonsense")
    assert refused.exit_code == ExitCode.USAGE
    assert "base: " in refused.stderr


def test_a_name_stays_a_name_even_where_a_directory_has_it(
    fake: FakeServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.state.files["shout"] = {"adapter_config.json": b"{}"}
    monkeypatch.chdir(adapter.parent)
    assert "shout@dddddddddddd verified" in run("verify", "shout", "--address", fake.address).stdout
    for directory in ("./shout", "shout/", f"..{os.sep}{adapter.parent.name}/shout"):
        assert "FIELD" in verify(directory).stdout
    monkeypatch.chdir(adapter)
    assert "FIELD" in verify(".").stdout
    refused = run("verify", "shout", "--base", TINY)
    assert refused.exit_code == ExitCode.USAGE
    assert "write ./shout for a directory" in refused.stderr
    assert verify("./x", "--against", "y").exit_code == ExitCode.USAGE


def test_diff_of_directories(adapter: Path, tmp_path: Path) -> None:
    other = write_files(tmp_path / "other", tiny_files(1, rank=4))
    same = run("diff", adapter, other)
    assert (same.exit_code, "hold the same tensors and arithmetic" in same.stdout) == (ExitCode.OK, True)
    write_files(other, tiny_files(2, rank=4))
    edit_config(other, lora_alpha=8, revision="x")
    differing = run("diff", adapter, other)
    assert differing.exit_code == ExitCode.NO
    assert "lora_alpha: 4 in" in differing.stdout
    assert "model.layers.0.self_attn.q_proj" in differing.stdout
    assert "beside the arithmetic: revision" in differing.stdout
    told = json.loads(run("diff", adapter, other, "--json").stdout)
    assert (told["same"], told["digest_a"]) == (False, None)
    relatives = [entry["relative"] for entry in told["differences"]["modules"]]
    assert relatives == sorted(relatives, reverse=True)


def test_diff_of_names_and_directories(fake: FakeServer, adapter: Path, tmp_path: Path) -> None:
    files = tiny_files(1, rank=4)
    fake.state.files["one"] = files
    fake.state.files["two"] = files
    at = ("--address", fake.address)
    assert run("diff", "one", "two", *at).stdout == f"one and two are one version: {'d' * 64}\n"
    assert json.loads(run("diff", "one", adapter, "--json", *at).stdout)["same"] is True
    assert run("diff", "one", "nobody", *at).exit_code == ExitCode.NOT_FOUND
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("diff", "one", empty, *at).exit_code == ExitCode.REFUSED
