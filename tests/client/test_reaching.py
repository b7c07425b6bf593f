"""Reaching a server: no proxy on this machine, true words where it fails, and a closed client that says so."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import grpc
import pytest
from typer.testing import CliRunner

from loramux import AsyncClient, Client
from loramux.channel import channel_options, find_proxy
from loramux.cli import connecting
from loramux.cli.main import app
from loramux.errors import ClientClosed, ErrorDetails, InvalidArgument, LoramuxError, Unavailable
from loramux.retry import NO_RETRY, Attempts
from loramux.unreachable import explain_too_large, explain_transport
from support.fake_service import FakeServer, serve_fake

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


@pytest.mark.parametrize("variable", PROXIES)
def test_no_proxy_stands_before_this_machine(fake: FakeServer, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for address in (fake.address, fake.address.replace("127.0.0.1", "localhost")):
        with Client(address, retry=NO_RETRY) as client:
            assert client.is_healthy()
            assert client.generate("hi").text == "base: hi"

    async def ask() -> bool:
        async with AsyncClient(fake.address, retry=NO_RETRY) as client:
            return await client.is_healthy()

    assert asyncio.run(ask())


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True), ("127.3.2.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("unix:/a", True),
        ("dns:///localhost:1", True), ("ipv4:127.0.0.1:1", True), ("10.0.0.1:1", False), ("gpu.example:1", False),
        ("[2001:db8::1]:1", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(address: str, local: bool) -> None:
    assert (dict(channel_options(address)).get("grpc.enable_http_proxy") == 0) is local
    assert find_proxy(address, {"http_proxy": "http://p:1"}) == ("" if local else "http_proxy")


def test_the_proxy_that_counts_is_named() -> None:
    environ = {"http_proxy": "http://a", "https_proxy": "http://b", "grpc_proxy": "", "no_proxy": "x.org, .example"}
    assert find_proxy("gpu.test:1", environ) == "https_proxy"
    assert find_proxy("gpu.example:1", environ) == ""
    assert find_proxy("x.org:1", environ) == ""
    assert find_proxy("max.org:1", environ) == "https_proxy"


def test_a_failure_through_a_proxy_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with Client("192.0.2.1:50051", retry=NO_RETRY) as client, pytest.raises(Unavailable) as caught:
        client.generate("x", timeout=10)
    said = "no server reachable at 192.0.2.1:50051 through the proxy of https_proxy; unset it, or add 192.0.2.1 to "
    assert str(caught.value) == f"{said}no_proxy"


def test_tls_to_a_server_without_it(fake: FakeServer) -> None:
    credentials = grpc.ssl_channel_credentials()
    with Client(fake.address, credentials=credentials, retry=NO_RETRY) as client, pytest.raises(Unavailable) as caught:
        client.generate("x")
    assert str(caught.value) == f"the server at {fake.address} does not speak TLS; connect without credentials"


@contextmanager
def _listener(answer: bytes) -> Iterator[str]:
    """Answers each connection's first bytes with `answer` and closes it."""

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1024)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.0 400 No\r\n\r\n", "what listens at {} speaks HTTP/1, not gRPC; is it the port of the metrics?"),
        (b"", "what listens at {} closes connections; a server with TLS does so to a client without credentials"),
    ],
)  # fmt: skip
def test_what_is_no_plain_grpc_server(answer: bytes, said: str) -> None:
    with _listener(answer) as address, Client(address, retry=NO_RETRY) as client:
        with pytest.raises(Unavailable) as caught:
            client.generate("x")
        assert str(caught.value) == said.format(address)


def test_words_about_certificates_and_urls() -> None:
    failed = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:45505: "
    handshake = f"{failed}Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: "
    assert "is not trusted" in explain_transport(f"{handshake}CERTIFICATE_VERIFY_FAILED: self signed", "h:1")
    assert "another host name" in explain_transport(
        f"{failed}UNAUTHENTICATED: Hostname Verification Check failed", "h:1"
    )
    resolving = "errors resolving http://h:1: Misformatted domain name"
    assert explain_transport(resolving, "http://h:1") == "http://h:1 is a URL: leave out http://, as in h:1"


@pytest.mark.parametrize("call", ["generate", "stream", "push", "adapters", "pull", "is_healthy", "wait_healthy"])
def test_a_closed_client_says_so(fake: FakeServer, tmp_path: Path, adapter_dir: Path, call: str) -> None:
    client = Client(fake.address)
    client.generate("x")
    client.close()
    calls: dict[str, Callable[[Any], Any]] = {
        "generate": lambda c: c.generate("x"), "stream": lambda c: c.stream("x"), "adapters": lambda c: c.adapters(),
        "push": lambda c: c.push(adapter_dir, "a"), "pull": lambda c: c.pull("a", tmp_path / "copy"),
        "is_healthy": lambda c: c.is_healthy(), "wait_healthy": lambda c: c.wait_healthy(5.0),
    }  # fmt: skip
    with pytest.raises(ClientClosed, match="the client is closed; make a new one"):
        next(calls[call](client))

    async def ask() -> None:
        other = AsyncClient(fake.address)
        await other.close()
        found = calls[call](other)
        await (anext(found) if hasattr(found, "__anext__") else found)

    with pytest.raises(ClientClosed):
        asyncio.run(ask())
    assert issubclass(ClientClosed, LoramuxError)


def test_streams_are_generators_to_type_checkers() -> None:
    assert get_type_hints(Client.stream)["return"].__origin__ is Generator
    assert get_type_hints(AsyncClient.stream)["return"].__origin__ is AsyncGenerator


def test_a_request_over_the_servers_size_is_refused_in_words() -> None:
    message = "SERVER: Received message larger than max (6291490 vs. 4194304)"
    said = "the request has 6,291,490 bytes, and the server takes at most 4,194,304 (max_message_bytes)"
    assert explain_too_large(message) == said
    assert explain_too_large("the request queue is full") == ""


def test_a_request_over_the_servers_size_is_an_invalid_argument(fake: FakeServer) -> None:
    with Client(fake.address) as client, pytest.raises(InvalidArgument, match="6,0"):
        client.generate("x" * 6_000_000)
    result = CliRunner().invoke(app, ["generate", "--address", fake.address, "-"], input="x" * 6_000_000)
    assert result.exit_code == 3


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("flags", [[], ["--wait", "30"]])
def test_generate_waits_for_a_server_that_is_about_to_listen(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    if not flags:
        monkeypatch.setattr(connecting, "GENERATE_START_SECONDS", 30.0)
    address = _free_address()
    started, done = threading.Event(), threading.Event()

    def serve() -> None:
        started.wait()
        with serve_fake(address):
            done.wait()

    thread = threading.Thread(target=serve)
    thread.start()
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        started.set()  # only once the command waits

    monkeypatch.setattr(connecting, "say", say)
    try:
        result = CliRunner().invoke(app, ["generate", "hi", "--address", address, *flags])
    finally:
        started.set()
        done.set()
        thread.join()
    assert (result.exit_code, result.stdout) == (0, "hi\n")
    assert said == [f"no server is listening at {address} yet; waiting up to 30 s for it"]


def test_the_wait_for_a_server_is_bounded_and_can_be_left_out() -> None:
    address = _free_address()
    for wait, lines in (("0", 0), ("0.6", 1)):
        result = CliRunner().invoke(app, ["generate", "hi", "--address", address, "--wait", wait])
        assert result.exit_code == 5
        assert result.stderr.count("no server is listening") == lines
        assert f"no server reachable at {address}; start one with `loramux serve`" in result.stderr


def test_the_wait_that_is_announced_is_bounded_by_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(connecting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(connecting, "say", said.append)
    absent = Unavailable("x", ErrorDetails(metadata={"transport": "Connection refused"}))
    warming = Unavailable("x", ErrorDetails(reason="WARMING_UP"))

    def try_twice(timeout: float | None) -> None:
        attempts = Attempts(connecting.StartRetryPolicy(address="a:1", start_seconds=30.0), timeout)
        for error in (absent, warming):
            now[0] += 0.25
            attempts.pause(error, idempotent=False)

    try_twice(2.0)
    assert said == [
        "no server is listening at a:1 yet; waiting up to 1.8 s for it",
        "the server is warming up; waiting up to 1.5 s for it",
    ]
    said.clear()
    try_twice(None)
    assert [line.partition("; ")[2] for line in said] == ["waiting up to 30 s for it", "waiting up to 60 s for it"]
    said.clear()
    with pytest.raises(Unavailable):
        try_twice(0.5)
    assert said == []  # nothing is waited for


def test_only_a_server_of_this_machine_is_waited_for_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "GENERATE_START_SECONDS", 30.0)
    found = [connecting.generate_start_seconds(address) for address in ("127.0.0.1:1", "unix:/a", "gpu.example:1")]
    assert found == [30.0, 30.0, 0.0]


def test_the_warm_up_is_waited_for_from_when_the_server_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(connecting.time, "monotonic", lambda: now[0])
    policy = connecting.StartRetryPolicy(warm_up_seconds=60.0, start_seconds=30.0)
    absent = Unavailable("x", ErrorDetails(metadata={"transport": "Connection refused"}))
    warming = Unavailable("x", ErrorDetails(reason="WARMING_UP"))
    assert policy.pause(absent, 1, idempotent=False) == 0.5
    now[0] = 29.9
    assert policy.pause(absent, 2, idempotent=False) == pytest.approx(0.1)
    now[0] = 80.0
    assert policy.pause(absent, 3, idempotent=False) is None
    assert policy.pause(warming, 1, idempotent=False) == 0.5
    now[0] = 139.0
    assert policy.pause(warming, 2, idempotent=False) == 0.5
    now[0] = 140.0
    assert policy.pause(warming, 3, idempotent=False) is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--top-k", "-1"], "top_k: -1 is out of range; 0 or unset means off"),
        (["-m", "-1", "--seed", "-1"], "max_tokens: -1 is out of range; unset means what the context leaves"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_by_name(fake: FakeServer, flags: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["generate", "hi", "--address", fake.address, *flags])
    assert result.exit_code == 3
    assert said in result.stderr


def test_an_address_that_is_a_url_is_refused() -> None:
    result = CliRunner().invoke(app, ["generate", "hi", "--address", "http://127.0.0.1:50051/"])
    assert result.exit_code == 2
    assert "leave out http://, as in 127.0.0.1:50051" in result.stderr
