"""How both clients reach a server: the default address, the channel options, and which proxy stands between.

Opens nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT = 30.0
"""Seconds for each try of a call that answers at once; others have no limit unless the caller sets one."""

MAX_ANSWER_BYTES = 64 << 20  # prompt log-probabilities of a long context pass gRPC's own 4 MB
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # as gRPC looks for them, in its order
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    # The bounded retries above count on a channel that tries again soon; the default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name: what one attempt to connect may take. A busy server needs more than a few milliseconds.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A peer that is gone without a word (a host that lost power, a NAT that forgot) would be waited for forever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # a long generation sends none; servers of ours allow a ping each 10 s
    ("grpc.use_local_subchannel_pool", 1),  # no shared back-off with other channels of this process
)


def channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """The options of a channel to `address`: what is on this machine is reached without a proxy."""
    return (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if is_local(address) else _OPTIONS


def is_local(address: str) -> bool:
    """Whether `address` is a unix socket or a loopback address of this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = host_of(address)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    return ip.is_loopback or ip.is_unspecified


def host_of(address: str) -> str:
    """The host of HOST:PORT, of [v6]:PORT, and of both with gRPC's scheme (`dns:///`, `ipv4:`, `ipv6:`) before it."""
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        if address.startswith(scheme):
            address = address.removeprefix(scheme).rpartition("/")[2]
    return address.rpartition(":")[0].strip("[]").lower()


def find_proxy(address: str, environ: Mapping[str, str] | None = None) -> str:
    """The name of the environment variable whose proxy gRPC takes to `address`, empty without one."""
    environ = os.environ if environ is None else environ
    variable = next((name for name in _PROXIES if environ.get(name)), "")
    if not variable or is_local(address):
        return ""
    exceptions = next((environ[name] for name in _EXCEPTIONS if environ.get(name)), "")
    host = host_of(address)
    excepted = [entry.strip().lstrip(".").lower() for entry in exceptions.split(",") if entry.strip()]
    return "" if any(host == entry or host.endswith(f".{entry}") for entry in excepted) else variable
