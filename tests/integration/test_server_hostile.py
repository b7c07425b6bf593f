"""Hostile adapters sent to the real process.

Each is refused with INVALID_ARGUMENT and its subject named, quickly and in flat memory, and leaves nothing behind.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from loramux import Client
from loramux.errors import from_call
from loramux.local_server import LocalServer
from loramux_protos.v1 import adapters_pb2_grpc
from support import hostile
from support.hostile import Hostile
from support.live import Peak, ask, cpu_seconds
from support.servers import upload_messages
from support.tiny_adapters import tiny_files

QUICK_SECONDS = 0.05  # of the server's processor time: how long that takes depends on who else wants the cores
LONGEST_SECONDS = 5.0
TRIES = 3  # of which the quickest counts: the server may be busy with something else
PARSED_BYTES = 160 << 20
"""Memory that a header of as many tensors as are allowed may take while it is parsed."""


class Sender:
    """Uploads to the real server, as raw as they come."""

    def __init__(self, channel: grpc.Channel, pid: int) -> None:
        self._stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._pid = pid

    def refuse(self, case: Hostile) -> float:
        """Send it; seconds of processor time until the refusal, which must be as it should."""
        # An id of its own: an adapter of another base stays for a resume with consent.
        messages = upload_messages("hostile", case.files, uuid.uuid4().hex, chunk=1 << 20)
        used = cpu_seconds(self._pid)
        with pytest.raises(grpc.RpcError) as caught:
            self._stub.UploadAdapter(iter(messages), timeout=60)
        used = cpu_seconds(self._pid) - used
        assert used < LONGEST_SECONDS, case.case
        error = from_call(caught.value, "")  # type: ignore[arg-type]
        assert error.code == "INVALID_ARGUMENT", case.case
        assert error.reason in ("ADAPTER_INVALID", "ADAPTER_INCOMPATIBLE"), case.case
        assert case.subject in error.violations[0].field, case.case
        return used


@pytest.fixture
def refuse_all(server: LocalServer, client: Client) -> Callable[[Iterable[Hostile]], None]:
    def refuse(cases: Iterable[Hostile]) -> None:
        count = 0
        with grpc.insecure_channel(server.address) as channel:
            sender = Sender(channel, server.pid)
            for case in cases:
                seconds = sender.refuse(case)
                for _ in range(TRIES - 1):
                    if seconds > QUICK_SECONDS and case.quick:
                        seconds = min(seconds, sender.refuse(case))
                assert seconds < QUICK_SECONDS or not case.quick, case.case
                count += 1
        assert count > 0
        assert "hostile" not in {adapter.name for adapter in client.adapters()}
        assert client.is_healthy()

    return refuse


def test_well_formed_adapters_of_another_base_or_shape_are_refused(
    refuse_all: Callable[[Iterable[Hostile]], None], client: Client
) -> None:
    refuse_all(hostile.foreign(client.model().fingerprint))


def test_other_formats_renamed_to_safetensors_are_never_unpickled(
    refuse_all: Callable[[Iterable[Hostile]], None], tmp_path: Path
) -> None:
    trace = tmp_path / "unpickled"
    refuse_all(hostile.renamed(trace))
    assert not trace.exists()


def test_files_that_are_not_of_an_adapter_are_refused_by_name(refuse_all: Callable[[Iterable[Hostile]], None]) -> None:
    refuse_all(
        Hostile(file, {**tiny_files(1), file: b"x"}, "manifest")
        for file in ("adapter_model.bin", "../adapter_config.json", "evil.py", "", "a/b")
    )


def test_safetensors_with_false_headers_are_refused(
    refuse_all: Callable[[Iterable[Hostile]], None], server: LocalServer
) -> None:
    with Peak(server.pid) as peak:
        refuse_all(hostile.lying_headers())
    assert peak.growth < 32 << 20


def test_malformed_files_that_safetensors_accepts_are_refused(
    refuse_all: Callable[[Iterable[Hostile]], None], server: LocalServer
) -> None:
    for case in hostile.accepted_by_the_library():
        with Peak(server.pid) as peak:
            refuse_all([case])
        assert peak.growth < (PARSED_BYTES if case.case == "65,000 tensors" else 40 << 20), case.case


def test_hostile_adapter_configs_are_refused(
    refuse_all: Callable[[Iterable[Hostile]], None], server: LocalServer
) -> None:
    with Peak(server.pid) as peak:
        refuse_all(hostile.configs())
    assert peak.growth < 32 << 20


def test_others_are_served_while_the_hostile_are_refused(
    refuse_all: Callable[[Iterable[Hostile]], None], client: Client
) -> None:
    alone = ask(client, "small", 200)
    with ThreadPoolExecutor(1) as pool:
        neighbor = pool.submit(ask, client, "small", 200)
        refuse_all(replace(case, quick=False) for case in (*hostile.lying_headers(), *hostile.configs()))
        neighbor.result(60).check_equals(alone)
