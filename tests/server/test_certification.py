"""Certificates at the server: what a stranger sends is read beside the event loop, which streams depend on."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any, Self, cast

import pytest

from loramux_adapters.certificate.document import Arithmetic, Certificate, Probe, refused
from loramux_adapters.certificate.probes import drawn_tokens
from loramux_adapters.errors import CertificateRefused
from loramux_server import certification
from loramux_server.certification import Certifier, ServedBase
from loramux_server.errors import Unavailable
from loramux_server.requests import FinishReason, Submission, TokenEvent, TokenLogprob

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


class AbortingEngine:
    """Serves every probe but the first `aborted`, which it ends as a server does that is stopped."""

    def __init__(self, aborted: int) -> None:
        self._aborted = aborted

    def submit(self, submission: Submission) -> Stream:
        self._aborted -= 1
        if self._aborted >= 0:
            return Stream(TokenEvent(0, finish=FinishReason.ABORTED))
        served = tuple(TokenLogprob(token, -1.0, ((token, -1.0),)) for token in submission.prompt[1:])
        return Stream(TokenEvent(0, finish=FinishReason.LENGTH, prompt_logprobs=(None, *served)))


class Stream:
    def __init__(self, event: TokenEvent) -> None:
        self._event = event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        yield self._event


@pytest.mark.asyncio
@pytest.mark.parametrize("aborted", [1, 2])
async def test_a_replay_that_is_cut_off_certifies_nothing(aborted: int) -> None:
    """It had no position that differs, and was taken for one that holds."""
    spec = cast("Any", Spec())
    probes = tuple(
        Probe(tokens, (1.0,) * 23, tuple((token,) for token in tokens[1:]), ((-1.0,),) * 23)
        for tokens in drawn_tokens(spec.digest, BASE.vocabulary, BASE.context - 1)
    )
    arithmetic = Arithmetic("cpu", "float32", "float32")
    content = Certificate(spec.digest, BASE.fingerprint, "", arithmetic, {}, probes).to_json()
    complete = await Certifier(cast("Any", AbortingEngine(0)), BASE).replay("default", spec, content)
    assert (complete.difference, complete.holds) == (0.0, True)
    with pytest.raises(Unavailable, match="before it was complete"):
        await Certifier(cast("Any", AbortingEngine(aborted)), BASE).replay("default", spec, content)


class Spec:
    digest = "a" * 64
    virtual_tokens = 0
    invocation: tuple[int, ...] = ()
