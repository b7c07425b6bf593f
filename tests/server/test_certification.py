"""Certificates at the server: what a stranger sends is read beside the event loop, which streams depend on."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from loramux_adapters.certificate.document import Certificate, refused
from loramux_adapters.errors import CertificateRefused
from loramux_server import certification
from loramux_server.certification import Certifier, ServedBase

BASE = ServedBase("b" * 64, "", "float32", 512, 256, 256)


@pytest.fixture
def read_by(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that read a certificate."""
    threads: list[threading.Thread] = []

    def parse(content: bytes) -> Certificate:
        threads.append(threading.current_thread())
        raise refused("is malformed")

    monkeypatch.setattr(certification, "parse", parse)
    return threads


@pytest.mark.asyncio
async def test_a_certificate_is_not_read_on_the_event_loop(read_by: list[threading.Thread]) -> None:
    certifier = Certifier(cast("Any", None), BASE)
    with pytest.raises(CertificateRefused):
        await certifier.replay("default", cast("Any", None), b"{}")
    assert not await certifier.concerns(b"{}")
    assert len(read_by) == 2
    assert threading.current_thread() not in read_by
