"""What is left of the project's former name: it is read, moved, or refused with the present one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import grpc
import platformdirs
import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from loramux_adapters.errors import StoreUnavailable
from loramux_adapters.store.former_directory import move_former
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.lock import DirectoryLock
from loramux_server.config import resolve_config
from loramux_server.errors import ConfigInvalid
from support.servers import serve_config, served


def test_every_variable_of_the_former_name_is_refused_with_the_present_one() -> None:
    kubernetes = {"LORICA_SERVICE_HOST": "10.0.0.1", "LORICA_PORT": "tcp://10.0.0.1:50051"}
    with pytest.raises(ConfigInvalid) as caught:
        resolve_config(environ={"LORICA_MAX_RUNNING": "4", "LORICA_CONFIG": "x.yaml", **kubernetes})
    text = str(caught.value)
    assert "LORICA_MAX_RUNNING was renamed to LORAMUX_MAX_RUNNING" in text
    assert "set LORAMUX_CONFIG" in text
    assert "2 options are wrong" in text
    resolve_config(environ=kubernetes)


def test_the_former_address_is_refused_by_every_command() -> None:
    result = CliRunner(env={"LORICA_ADDRESS": "127.0.0.1:1"}).invoke(app, ["health"])
    assert result.exit_code == ExitCode.USAGE
    assert "env LORICA_ADDRESS was renamed to LORAMUX_ADDRESS" in result.stderr
    assert "set LORAMUX_ADDRESS" in result.stderr


def test_the_former_name_of_the_embedded_base_leads_to_the_present_one() -> None:
    result = CliRunner().invoke(app, ["serve", "--model", "lorica-tiny"])
    assert result.exit_code == ExitCode.USAGE
    assert "did you mean loramux-tiny?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "present"),
    [
        (["serve", "--materialised-bytes", "1"], "--merged-bytes"),
        (["config", "show", "--materialised-bytes=1"], "--merged-bytes"),
        (["adapters", "materialise", "shout"], "adapters merge"),
    ],
)
def test_renamed_flags_and_commands_are_refused_with_the_present_name(arguments: list[str], present: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == ExitCode.USAGE
    assert f"was renamed to {present}" in result.stderr.replace("`", "")


def test_a_renamed_option_of_a_file_is_refused_with_the_present_name(tmp_path: Path) -> None:
    file = tmp_path / "loramux.yaml"
    file.write_text("materialised_bytes: 0\n")
    with pytest.raises(ConfigInvalid, match="materialised_bytes was renamed to merged_bytes"):
        resolve_config(file=file)
    for variable in ("LORICA_MATERIALISED_BYTES", "LORAMUX_MATERIALISED_BYTES"):
        with pytest.raises(ConfigInvalid) as caught:
            resolve_config(environ={variable: "0"})
        assert variable in str(caught.value)
        assert caught.value.remedy == "set LORAMUX_MERGED_BYTES"


def _former_store(tmp_path: Path) -> Path:
    LocalStore(tmp_path / "lorica").close()
    return tmp_path / "lorica"


def test_a_former_store_moves_whole(tmp_path: Path) -> None:
    former = _former_store(tmp_path)
    before = {path.relative_to(former): path.is_file() and path.read_bytes() for path in former.rglob("*")}
    present = tmp_path / "loramux"
    present.mkdir()  # as an earlier check of the configuration leaves it
    assert move_former(present) == former
    assert not former.exists()
    after = {path.relative_to(present): path.is_file() and path.read_bytes() for path in present.rglob("*")}
    assert after.keys() == before.keys()
    assert after[Path("catalog.sqlite3")] == before[Path("catalog.sqlite3")]
    LocalStore(present).close()
    assert move_former(present) is None


def test_a_former_store_stays_where_the_present_directory_is_in_use(tmp_path: Path) -> None:
    former = _former_store(tmp_path)
    LocalStore(tmp_path / "loramux").close()
    assert move_former(tmp_path / "loramux") is None
    assert (former / "catalog.sqlite3").exists()
    assert move_former(tmp_path / "elsewhere" / "loramux") is None


def test_a_former_store_in_use_is_not_moved(tmp_path: Path) -> None:
    former = _former_store(tmp_path)
    lock = DirectoryLock(former)
    try:
        with pytest.raises(StoreUnavailable, match="in use by process"):
            move_former(tmp_path / "loramux")
    finally:
        lock.release()
    assert former.exists()
    assert not (tmp_path / "loramux").exists()


def test_the_first_start_moves_the_former_store_and_says_so(tmp_path: Path) -> None:
    script = (
        "import sys, types, loramux_server.app as app\n"
        "from loramux_server.config import ServeConfig\n"
        "def assemble(*_): raise SystemExit(7)\n"
        "app.App = lambda config, **_: assemble()\n"
        "app.serve(ServeConfig(listen='127.0.0.1:0', metrics_listen='none'))"
    )
    environ = {**os.environ, "XDG_DATA_HOME": str(tmp_path)}
    former = _former_store(tmp_path)
    assert platformdirs.user_data_dir("lorica", appauthor=False).endswith("/lorica")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 7, done.stderr
    assert f"moved {former} to {tmp_path / 'loramux'}" in done.stdout
    assert (tmp_path / "loramux" / "catalog.sqlite3").exists()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_former_client_hears_what_its_method_is_called_now(tmp_path: Path, is_streamed: bool) -> None:
    method = "/lorica.v1.InferenceService/Generate"
    async with served(tmp_path) as server:
        call = server.channel.unary_stream(method)(b"") if is_streamed else server.channel.unary_unary(method)(b"")
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "was renamed to /loramux.v1.InferenceService/Generate: update" in await call.details()
        unknown = server.channel.unary_unary("/other.v1.Service/Call")(b"")
        assert await unknown.details() == "Method not found!"


def test_serve_config_is_no_default_directory(tmp_path: Path) -> None:
    """A directory that somebody chose is never taken for the default one."""
    assert serve_config(tmp_path).data_dir != Path(platformdirs.user_data_dir("loramux", appauthor=False))
