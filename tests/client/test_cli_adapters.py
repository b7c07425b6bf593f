"""`loramux adapters`: what an operator sees of desired state, and of adapters that another base was served with."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from loramux.types import Adapter
from loramux_protos.v1 import adapters_pb2
from support.fake_service import BASE, FakeServer


def adapters(fake: FakeServer, *arguments: str) -> str:
    """What the command prints; a table cell is never cut."""
    environment = {"COLUMNS": "300"}
    result = CliRunner(env=environment).invoke(app, ["adapters", *arguments, "--address", fake.address])
    assert result.exit_code == 0, result.output
    return result.stdout


def add(fake: FakeServer, name: str, **fields: object) -> adapters_pb2.Adapter:
    return fake.state.adapters.setdefault(name, adapters_pb2.Adapter(name=name, digest="d" * 64, **fields))


def remarks(fake: FakeServer) -> dict[str, str]:
    """Name -> the last column of `ls`."""
    header, *lines = adapters(fake, "ls").splitlines()
    start = header.index("REMARKS")
    return {line.split()[0]: line[start:].strip() for line in lines}


def test_ls_remarks_what_was_accepted_for_other_bases_only(fake: FakeServer) -> None:
    other = "c" * 64
    add(fake, "here", accepted_bases=[BASE])
    add(fake, "both", accepted_bases=[BASE, other])
    add(fake, "unknown")
    add(fake, "elsewhere", accepted_bases=[other])
    add(fake, "agreed", accepted_bases=[other], base_fingerprint="e" * 64, base_mismatch=True)
    assert remarks(fake) == {
        "here": "base: undeclared",
        "both": "base: undeclared",
        "unknown": "base: undeclared",
        "elsewhere": "other base, base: undeclared",
        "agreed": "other base, base mismatch",
    }


@pytest.mark.parametrize(("bases", "shown"), [([BASE], BASE), ([], "not known")])
def test_show_tells_bases_and_desired_state(fake: FakeServer, bases: list[str], shown: str) -> None:
    adapter = add(fake, "bot", accepted_bases=bases, pinned=True)
    rows = dict(line.split(maxsplit=1) for line in adapters(fake, "show", "bot").splitlines() if " " in line)
    assert rows["accepted"] == f"for  {shown}"
    assert (rows["pinned"], rows["merge"], rows["merged"]) == ("yes", "no", "none")
    adapter.merge = True
    assert json.loads(adapters(fake, "show", "bot", "--json"))["merge"] is True


def test_a_push_with_an_end_says_so_and_so_do_ls_and_show(fake: FakeServer, adapter_dir: Path) -> None:
    pushed = adapters(fake, "push", str(adapter_dir), "brief", "--ttl", "7200.9", "--max-uses", "3")
    assert "ends by itself: in 2 h, 3 of 3 uses left" in pushed
    assert "ends by itself" not in adapters(fake, "push", str(adapter_dir), "stays")
    header, brief, stays = adapters(fake, "ls").splitlines()
    start, end = header.index("ENDS"), header.index("ALIASES")
    assert (brief[start:end].strip(), stays[start:end].strip()) == ("in 2 h, 3 of 3 uses left", "")
    assert "never by itself" in adapters(fake, "show", "stays")
    shown = json.loads(adapters(fake, "show", "brief", "--json"))
    assert (shown["max_uses"], shown["uses_left"]) == (3, 3)
    assert datetime.fromisoformat(shown["expires"]) > datetime.now(UTC)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--ttl", "0", "ttl: 0 is out of range: must be over 0 and at most 3.1536e+08"),
        ("--ttl", "-5", "ttl: -5 is out of range: must be over 0"),
        ("--max-uses", "0", "max_uses: 0 is out of range; it must be from 1 to 1000000000"),
        ("--max-uses", "-1", "max_uses: -1 is out of range; it must be from 1 to 1000000000"),
    ],
)
def test_an_end_that_is_none_is_refused_before_anything_is_sent(
    fake: FakeServer, adapter_dir: Path, option: str, value: str, said: str
) -> None:
    arguments = ["adapters", "push", str(adapter_dir), "brief", option, value, "--address", fake.address]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == ExitCode.REFUSED
    assert said in result.stderr
    assert fake.state.calls == 0


def test_taking_a_desired_state_back_waits_for_nothing(fake: FakeServer) -> None:
    """The copy may stay for the sake of another name of the same version, which is nothing to wait for."""
    add(fake, "bot")
    assert "merged weights ready" in adapters(fake, "merge", "bot")
    assert adapters(fake, "merge", "bot", "--off") == "bot: merged weights none\n"
    fake.state.keeps_sets = True
    adapters(fake, "merge", "bot")
    said = adapters(fake, "merge", "bot", "--off")
    assert said == "bot: merged weights ready, desired by another name of this version\n"


def test_a_refused_merge_says_that_it_stays_desired(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    add(fake, "bot")

    def refused(_: object, adapter: Adapter, **__: object) -> Adapter:
        residency = replace(adapter.residency, merged="refused", merged_reason="prompts are in no weight")
        return replace(adapter, residency=residency)

    monkeypatch.setattr("loramux.cli.waiting.wait_merged", refused)
    said = CliRunner().invoke(app, ["adapters", "merge", "bot", "--address", fake.address])
    assert said.exit_code == ExitCode.REFUSED
    assert "bot is not merged: prompts are in no weight" in said.stderr
    assert "it stays desired" in said.stderr
    assert "loramux adapters merge bot --off" in said.stderr
    assert json.loads(adapters(fake, "show", "bot", "--json"))["merge"] is True


def test_merged_weights_of_a_shared_version_are_not_taken_for_desired_by_each_name(fake: FakeServer) -> None:
    ready = adapters_pb2.Residency(merged=adapters_pb2.MERGED_STATE_READY)
    add(fake, "asked", merge=True, pinned=True, residency=ready)
    add(fake, "same", residency=ready)
    header, *lines = adapters(fake, "ls").splitlines()
    start, end = header.index("MERGED"), header.index("ENDS")
    cells = {line.split()[0]: line[start:end].split(maxsplit=1) for line in lines}
    assert header[start:end].split() == ["MERGED", "DESIRED"]
    assert {name: [cell.strip() for cell in row] for name, row in cells.items()} == {
        "asked": ["ready", "pin, merge"],
        "same": ["ready"],
    }
    shown = {name: adapters(fake, "show", name) for name in ("asked", "same")}
    assert "desired by another name" not in shown["asked"]
    assert "ready, desired by another name of this version" in shown["same"]


def test_show_tells_what_the_certificate_came_to(fake: FakeServer) -> None:
    replay = adapters_pb2.CertificateReplay(difference=7e-7, divergence=1e-13, tolerance=1e-3, compute_dtype="float32")
    add(fake, "plain")
    add(fake, "certified", certificate=replay, residency=adapters_pb2.Residency(merged_certificate=replay))
    bad = adapters_pb2.CertificateReplay(difference=0.5, tolerance=1e-3, compute_dtype="float32")
    add(fake, "parted", certificate=replay, residency=adapters_pb2.Residency(merged_certificate=bad))

    def shown(name: str) -> tuple[str, str]:
        rows = adapters(fake, "show", name).splitlines()
        lines = (next(row for row in rows if row.startswith(key)) for key in ("certificate", "when merged"))
        gathered, merged = (" ".join(line.split()) for line in lines)
        return gathered, merged

    assert shown("plain") == ("certificate none: uploaded without one", "when merged not replayed")
    for text in shown("certified"):
        assert "certified: log-probabilities differ by at most 7e-07 from the training's" in text
        assert "0.001 allowed in float32), KL 1e-13" in text
    assert "when merged refused: log-probabilities differ by at most 0.5" in shown("parted")[1]
