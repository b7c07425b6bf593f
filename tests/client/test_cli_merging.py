"""`loramux adapters merge-files`: what it writes is told, and what it refuses has an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from support.adapters import edit_config
from support.tiny_adapters import tiny_files, write_files


def merge(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["adapters", "merge-files", *map(str, arguments)])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one = write_files(tmp_path / "one", tiny_files(1, rank=4))
    return one, write_files(tmp_path / "two=2", tiny_files(2, rank=3, targets=("q_proj", "v_proj")))


def test_the_sum_is_a_directory_that_a_server_accepts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    out = tmp_path / "out"
    told = merge(f"{one}=0.5", two, out)
    assert told.exit_code == ExitCode.OK, told.output
    assert told.stdout == f"{out}: 8 modules, ranks 3 to 7, of no declared base\n"
    verified = CliRunner().invoke(app, ["adapters", "verify", str(out), "--base", "loramux-tiny", "--json"])
    found = json.loads(verified.stdout)["adapter"]
    assert (found["ranks"], found["targets"], found["modules"]) == ([3, 7], ["q_proj", "v_proj"], 8)
    refused = merge(one, two, out)
    assert refused.exit_code == ExitCode.REFUSED
    assert merge(one, f"{two}=-1.5", out, "--force").exit_code == ExitCode.OK


def test_svd_tells_what_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told = merge(*pair, tmp_path / "out", "--combination", "svd", "--rank", "2", "--json")
    merged = json.loads(told.stdout)["merged"]
    assert merged["ranks"] == [2]
    assert 0.2 < merged["energy_kept"] < 1
    shown = merge(*pair, tmp_path / "again", "--combination", "svd", "--rank", "2").stdout
    assert f"the worst module, {merged['worst_module']}, keeps {merged['energy_kept']:.2%} of its energy" in shown


def test_what_is_wrong_with_the_call_is_a_usage_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    out = tmp_path / "out"
    for arguments in (
        [one, two, out, "--rank", "2"],
        [one, two, out, "--combination", "svd"],
        [f"{one}=much", two, out],
        [f"{one}=0", two, out],
        [f"{one}=nan", two, out],
        [out],
    ):
        assert merge(*arguments).exit_code == ExitCode.USAGE, arguments
    assert not out.exists()


def test_what_cannot_be_summed_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    edit_config(one, use_dora=True)
    refused = merge(one, two, tmp_path / "out")
    assert refused.exit_code == ExitCode.REFUSED
    assert f"{one}: it has no exact sum as a file: the magnitudes of DoRA" in refused.output
    assert merge(two, tmp_path, tmp_path / "out").exit_code == ExitCode.REFUSED
    assert not (tmp_path / "out").exists()
