"""Configuration: layers, origins, and refusals that say what, why and what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.terminal.failures import ExitCode
from loramux_adapters.errors import StoreCorrupt
from loramux_adapters.store.lock import DirectoryLock
from loramux_adapters.threads import limit_spinning
from loramux_server import app as server_app
from loramux_server.config import ServeConfig, groups, options, resolve_config
from loramux_server.errors import ConfigInvalid, StartError
from loramux_server.preflight import check_address, check_cuda, check_data_dir, check_model, check_start
from support.hub_cache import cache_tiny


def test_layers_override_in_order_and_keep_their_origin(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_running: 8\nmax_queued: 9\nkv_bytes: 64MiB\ndrain_seconds: 5\n")
    resolved = resolve_config(
        file=file,
        environ={"LORAMUX_MAX_QUEUED": "10", "LORAMUX_DRAIN_SECONDS": "6", "LORAMUX_DETERMINISTIC": "true"},
        flags={"drain_seconds": 7, "max_rank": None},
    )
    config = resolved.config
    assert (config.max_running, config.max_queued, config.kv_bytes) == (8, 10, 64 << 20)
    assert (config.drain_seconds, config.deterministic) == (7.0, True)
    assert config.max_rank == options()["max_rank"].default
    assert resolved.origins["max_running"] == f"file {file}"
    assert resolved.origins["max_queued"] == "env LORAMUX_MAX_QUEUED"
    assert resolved.origins["drain_seconds"] == "flag --drain-seconds"
    assert resolved.origins["max_rank"] == "default"


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_running: 3\n")
    assert resolve_config(environ={"LORAMUX_CONFIG": str(file)}).config.max_running == 3


def test_every_option_is_declared_and_its_default_is_within_its_own_bounds() -> None:
    assert set(options()) == set(ServeConfig.model_fields)
    for name, option in options().items():
        assert resolve_config(flags={name: option.default}).config is not None
        assert option.text, name


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"max_running": 0}, "at least 1"),
        ({"max_running": "many"}, "whole number"),
        ({"kv_bytes": "12 apples"}, "not a size"),
        ({"drain_seconds": "nan"}, "number of seconds"),
        ({"dtype": "int3"}, "unknown value"),
        ({"device": "tpu"}, "unknown device"),
        ({"listen": "50051"}, "HOST:PORT"),
        ({"listen": "localhost:99999"}, "0 to 65535"),
        ({"listen": "none"}, "must be an address"),
        ({"deterministic": "maybe"}, "neither true nor false"),
        ({"model": "  "}, "must not be empty"),
        ({"listen": "h:1", "metrics_listen": "h:1"}, "both"),
        ({"max_batch_tokens": 8, "max_running": 9}, "max_batch_tokens"),
        ({"max_runing": 9}, "unknown option"),
    ],
)
def test_a_wrong_value_is_refused_with_the_remedy(flags: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigInvalid, match=why) as caught:
        resolve_config(flags=flags)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("- a\n", "mapping"),
        ("a: [", r"serve\.yaml:1:5: not YAML: the file ends within a list"),
        ("max_runing: 1\n", "unknown option"),
        ("max_running: {}\n", "one value"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(ConfigInvalid, match=why):
        resolve_config(file=file)


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        resolve_config(flags={"max_runing": 9})
    assert "max_running" in caught.value.remedy


def test_every_wrong_option_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_runing: 1\nmax_rank: 0\n")
    with pytest.raises(ConfigInvalid) as caught:
        resolve_config(file=file, environ={"LORAMUX_DTYPE": "int4"}, flags={"max_queued": "many"})
    first, *lines = str(caught.value).splitlines()
    assert first == "4 options are wrong:"
    for line, words in zip(
        lines,
        (
            ("max_runing", "did you mean 'max_running'?"),
            ("max_rank = 0", "at least 1"),
            ("env LORAMUX_DTYPE", "float32"),
            ("flag --max-queued", "digits only"),
        ),
        strict=True,
    ):  # fmt: skip
        assert all(word in line for word in words)
    with pytest.raises(ConfigInvalid, match="2 options are wrong"):
        resolve_config(flags={"listen": "none", "metrics_listen": "unix:/tmp/m"})


@pytest.mark.parametrize(
    ("listen", "why"),
    [("unix:", "names no socket"), ("unix:/a/", "names no socket"), (f"unix:/{'a' * 110}", "at most 107")],
)
def test_a_unix_address_that_cannot_be_is_refused(listen: str, why: str) -> None:
    with pytest.raises(ConfigInvalid, match=why):
        resolve_config(flags={"listen": listen})


def test_a_unix_socket_is_free_until_somebody_listens(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    for address in (f"unix:{path}", f"unix://{path}"):
        check_address("listen", address)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(StartError, match="in use") as caught:
            check_address("listen", f"unix:{path}")
        assert isinstance(caught.value.__cause__, OSError)
    check_address("listen", f"unix:{path}")  # left behind by a killed server
    path.unlink()
    path.write_text("")
    with pytest.raises(StartError, match="not a socket"):
        check_address("listen", f"unix:{path}")
    with pytest.raises(StartError, match="does not exist"):
        check_address("listen", f"unix:{tmp_path}/absent/s.sock")


def test_help_lists_every_option_under_a_heading() -> None:
    assert set(groups()) == set(options())
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"]).stdout
    assert all(f" {title} " in shown for title in groups().values())


def test_an_app_that_is_embedded_limits_spinning_too() -> None:
    script = (
        "import os, sys, types, loramux_server.app as app\n"
        "os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "assemble = lambda config, hooks, lock: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
        "sys.modules['loramux_server.assembly'] = types.SimpleNamespace(assemble=assemble)\n"
        "app.build_engine(None, None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1000", "False"]


def test_a_torch_that_is_there_already_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not limit_spinning()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's own
    assert limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_a_port_in_use_is_refused_at_start() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(StartError, match="cannot listen") as caught:
            check_address("listen", address)
    assert "--listen" in caught.value.remedy
    check_address("listen", address)


def test_a_missing_model_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"GGUF")
    for model, why in (
        (str(tmp_path / "absent"), "no directory"),
        (str(tmp_path / "model"), "is a file, not a directory"),
        (str(tmp_path), "config.json"),
        ("org/name", "HF_HUB_OFFLINE"),
    ):
        with pytest.raises(StartError, match=why):
            check_model(model, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    cache_tiny(tmp_path / "hub", "org/name")
    check_model("org/name", {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    check_model("loramux-tiny", {})


def test_a_missing_gpu_is_refused_at_start() -> None:
    with pytest.raises(StartError, match="cuda:999"):
        check_cuda("cuda:999")


def test_an_unusable_data_dir_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="data_dir"):
        check_data_dir(tmp_path / "file" / "below")


def test_the_data_dir_of_another_server_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "loramux.cli.main", "serve", "--data-dir", str(tmp_path)]
    try:
        other = subprocess.run(
            [*command, "--listen", "127.0.0.1:0", "--metrics-listen", "none"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        lock.release()
    assert other.returncode == ExitCode.USAGE
    assert f"error: the store is in use by process {os.getpid()}\n" in other.stderr
    assert "stop that process or choose another store directory (--data-dir)" in other.stderr
    assert other.stdout == ""
    imported = {
        line.rpartition("|")[2].strip() for line in other.stderr.splitlines() if line.startswith("import time:")
    }
    assert "loramux_server.app" in imported
    assert "torch" not in imported


def test_a_store_that_cannot_be_opened_stops_a_start_as_any_other_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, *_: object, **__: object) -> None: ...

        async def start(self) -> None:
            raise StoreCorrupt("the catalog is damaged", remedy="repair it")

    monkeypatch.setattr(server_app, "App", Broken)
    monkeypatch.setattr(server_app, "configure_logs", lambda *_: None)  # this process' own stay as they are
    config = resolve_config(flags={"data_dir": str(tmp_path), "listen": "127.0.0.1:0", "metrics_listen": "none"}).config
    with pytest.raises(StartError, match="the catalog is damaged") as caught:
        server_app.serve(config)
    assert caught.value.remedy == "repair it"


def test_a_start_that_can_succeed_passes(tmp_path: Path) -> None:
    flags = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "data_dir": tmp_path / "data"}
    check_start(resolve_config(flags=flags).config, {})
    assert (tmp_path / "data").is_dir()


def test_configuration_and_preflight_import_no_torch() -> None:
    script = (
        "import sys, loramux_server.preflight as _\n"
        "print([m for m in ('torch', 'grpc', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
