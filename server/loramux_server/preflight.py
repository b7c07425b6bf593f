"""What can be known about this machine before torch is imported: ports, paths, the model, a GPU.

Each check raises StartError with the remedy, so that a start that cannot succeed fails in
well under two seconds. Changes nothing but to create the data directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from loramux_adapters.base.source import find_base
from loramux_adapters.errors import BaseInvalid
from loramux_server.config import ServeConfig
from loramux_server.errors import StartError
from loramux_server.options import is_unix, split_address, unix_path


def check_start(config: ServeConfig, environ: Mapping[str, str] | None = None) -> None:
    """Run every check, cheapest first. Raises StartError."""
    check_address("listen", config.listen)
    if config.metrics_listen != "none":
        check_address("metrics_listen", config.metrics_listen)
    check_setup(config, environ)


def check_setup(config: ServeConfig, environ: Mapping[str, str] | None = None) -> None:
    """The checks that hold whether or not a server of this configuration is running already. Raises StartError."""
    check_model(config.model, os.environ if environ is None else environ, config.revision)
    check_data_dir(config.data_dir)
    if config.device.startswith("cuda"):
        check_cuda(config.device)


def check_address(name: str, address: str) -> None:
    """Whether the server could listen there now. SO_REUSEPORT stays off: a second server must not share the port."""
    if is_unix(address):
        _check_socket(name, unix_path(address))
        return
    host, port = split_address(address)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(
            f"{name}: the host of {address} is unknown ({error.strerror})", remedy="use an address of this machine"
        ) from error
    family, kind, protocol, _, where = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            flag = "--" + name.replace("_", "-")
            raise StartError(
                f"{name}: cannot listen on {address}: {error.strerror}",
                remedy=f"stop what uses the port, or choose another with {flag} {host}:PORT (0: any free one)",
            ) from error


def _check_socket(name: str, path: str) -> None:
    """Whether there may be a unix socket of that path: gRPC replaces what is there, another server's own included."""
    file = Path(path)
    if file.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except OSError:
                return  # left behind by a server that was killed
        in_use = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        raise StartError(
            f"{name}: cannot listen on unix:{path}: {in_use.strerror}",
            remedy=f"stop what listens there, or choose another path with --{name.replace('_', '-')} unix:PATH",
        ) from in_use
    if file.exists():
        raise StartError(f"{name}: {path} is there and not a socket", remedy="choose another path, or remove it")
    folder = file.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "is not writable" if folder.is_dir() else "does not exist"
        raise StartError(f"{name}: cannot make the socket {path}: {folder} {why}", remedy="choose another directory")


def check_model(model: str, environ: Mapping[str, str], revision: str | None = None) -> None:
    """Whether `model` can be a base: the embedded one, a checkpoint directory, or a hub id within reach."""
    try:
        find_base(model, environ, revision=revision)
    except BaseInvalid as error:
        raise StartError(f"model: {error}", remedy=error.remedy) from error


def check_data_dir(path: Path) -> None:
    """Create the data directory if need be; it must be writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise StartError(
            f"data_dir: cannot use {path}: {error.strerror}", remedy="choose another with --data-dir"
        ) from error
    if not writable:
        raise StartError(f"data_dir: {path} is not writable", remedy="choose another with --data-dir")


def check_cuda(device: str) -> None:
    """Whether the driver knows the GPU asked for. Asks libcuda itself: importing torch would take seconds."""
    index = int(device.partition(":")[2] or 0)
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        known = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        known = False
    if not known or count.value == 0:
        raise StartError(
            f"device: {device} asked for, and no CUDA driver with a GPU is here", remedy="use --device cpu or auto"
        )
    if index >= count.value:
        raise StartError(
            f"device: {device} asked for, and there are {count.value} GPUs",
            remedy=f"use cuda:0 to cuda:{count.value - 1}",
        )
