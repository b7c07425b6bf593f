"""Streams of the real process that are ended early, or run while adapters change."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from loramux import Client
from loramux.errors import DeadlineExceeded, NotFound, ResourceExhausted
from loramux.local_server import LocalServer
from loramux.retry import NO_RETRY
from loramux_protos.v1 import inference_pb2, inference_pb2_grpc
from support.live import GREEDY, PROMPT, Answer, ask, is_idle, metric, until, until_idle
from support.servers import details
from support.tiny_adapters import tiny_files, write_files

LONG = 1500  # tokens: seconds of work, so that whatever ends it earlier is seen to
"""Within which blocks and leases are back: a step takes a few milliseconds, a scrape and a busy machine the rest."""
_LISTENER = """
import sys
from loramux import Client
for part in Client(sys.argv[1]).stream("x", adapter="large", max_tokens=1500, temperature=0.0, ignore_eos=True):
    print("part", flush=True)
"""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def _check_freed(server: LocalServer, client: Client) -> None:
    """Soon no request, block or lease of the adapter used here is held."""

    def is_free() -> bool:
        return client.adapter("large").residency.leases == 0 and is_idle(server)

    until(is_free, "requests, blocks or leases are still held")


def test_a_deadline_shorter_than_the_prefill_frees_everything(server: LocalServer, client: Client) -> None:
    context = client.model().limits.context_tokens
    with pytest.raises(DeadlineExceeded):
        client.generate(token_ids=[7] * (context - 10), adapter="large", timeout=0.03, cache_salt="17", **GREEDY)
    _check_freed(server, client)


def test_a_deadline_in_the_midst_of_an_answer_ends_it(server: LocalServer, client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, adapter="large", max_tokens=LONG, timeout=0.3, **GREEDY)
    _check_freed(server, client)


def test_a_cancelled_stream_frees_everything_and_leaves_others_equal(
    server: LocalServer, client: Client, pool: ThreadPoolExecutor
) -> None:
    alone = ask(client, "small", 150)
    neighbor = pool.submit(ask, client, "small", 150)
    streams = [client.stream(PROMPT, adapter="large", max_tokens=LONG, **GREEDY) for _ in range(3)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]  # a generator: closing it cancels the call
    neighbor.result(30).check_equals(alone)
    _check_freed(server, client)


def test_a_killed_client_frees_everything(server: LocalServer, client: Client) -> None:
    with subprocess.Popen([sys.executable, "-c", _LISTENER, server.address], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"part\n"
        process.send_signal(signal.SIGKILL)
    _check_freed(server, client)


def test_a_client_that_stops_reading_is_ended_and_delays_nobody(server: LocalServer, client: Client) -> None:
    """Seven choices with twenty alternatives a token are more than a window of 64 KiB holds."""
    request = inference_pb2.GenerateRequest(text=PROMPT)
    request.sampling.temperature, request.sampling.n, request.sampling.seed = 1.0, 7, 3
    request.stopping.max_tokens, request.stopping.ignore_eos = 400, True
    request.response.logprobs = 20
    begun = time.monotonic()
    alone = ask(client, "small", 40)
    alone_seconds = time.monotonic() - begun
    stalled = ("ABORTED", "/loramux.v1.InferenceService/GenerateStream")
    before = metric(server, "loramux_calls_total").get(stalled, 0)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        stream = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request)
        next(stream)
        begun = time.monotonic()
        ask(client, "small", 40).check_equals(alone)
        assert time.monotonic() - begun < 20 * alone_seconds + 10.0  # it shares the steps with seven others
        until(lambda: metric(server, "loramux_calls_total").get(stalled, 0) > before, "the stalled stream ended", 30)
        _check_freed(server, client)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert details(caught.value)["ErrorInfo"].reason == "CLIENT_STALLED"  # type: ignore[arg-type]


def test_overload_is_refused_at_once_with_a_retry(server: LocalServer) -> None:
    def one(_: int) -> tuple[str, float]:
        with Client(server.address, retry=NO_RETRY) as own:
            own.is_healthy()  # connected
            begun = time.monotonic()
            try:
                ask(own, "", 60)
            except ResourceExhausted as error:
                return "refused" if error.retry_after else "refused without a delay", time.monotonic() - begun
            return "done", time.monotonic() - begun

    with ThreadPoolExecutor(48) as pool:
        outcomes = list(pool.map(one, range(48)))
    seconds = {what: sorted(time for word, time in outcomes if word == what) for what, _ in outcomes}
    assert seconds.keys() == {"done", "refused"}
    assert len(seconds["done"]) >= 16
    assert seconds["refused"][len(seconds["refused"]) // 2] < seconds["done"][-1]
    until_idle(server)


def test_requests_of_a_replaced_or_deleted_adapter_end_on_their_version(
    client: Client, adapter_dirs: dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    first = client.push(adapter_dirs["large"], "moving").adapter
    alone = {name: ask(client, name, 160) for name in ("", "large", "small")}

    def begin(reference: str) -> tuple[str | None, Future[Answer]]:
        """A request that is known to be running, and its end."""
        stream = client.stream(PROMPT, adapter=reference, max_tokens=160, logprobs=0, return_token_ids=True, **GREEDY)
        part = next(stream)
        assert part.prompt is not None
        return part.prompt.adapter_digest, pool.submit(_rest, part, stream)

    base, (old, running) = begin(""), begin("moving")
    second = client.push(adapter_dirs["small"], "moving").adapter
    assert old == first.digest != second.digest
    ask(client, "moving", 30).check_begins(alone["small"])  # new requests: the new version
    new, younger = begin("moving")
    assert new == second.digest
    client.delete("moving")
    for reference in ("moving", f"moving@{first.digest}"):
        with pytest.raises(NotFound):
            ask(client, reference)
    running.result(60).check_equals(alone["large"])
    younger.result(60).check_equals(alone["small"])
    base[1].result(60).check_equals(alone[""])


def _rest(part: Any, stream: Iterator[Any]) -> Answer:
    parts = [part, *stream]
    return Answer(
        tuple(token for each in parts for token in each.token_ids),
        tuple(entry.logprob for each in parts for entry in each.logprobs),
    )


def test_hot_loads_leave_every_other_stream_equal(
    server: LocalServer, client: Client, adapter_dirs: dict[str, Path], pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    names = ["", *adapter_dirs]
    alone = {name: ask(client, name, 120) for name in names}
    running = {name: pool.submit(ask, client, name, 120) for name in names}
    loads = metric(server, "loramux_adapter_loads_total")[("ok",)]
    pushed = []
    while not all(future.done() for future in running.values()) or len(pushed) < 4:
        name = f"hot-{len(pushed)}"
        files = tiny_files(1000 + len(pushed), rank=8, targets=("q_proj", "down_proj"))
        client.push(write_files(tmp_path / name, files), name)
        pushed.append((name, ask(client, name, 4)))
    for name, future in running.items():
        future.result().check_equals(alone[name])
    assert metric(server, "loramux_adapter_loads_total")[("ok",)] >= loads + len(pushed)
    for name, answer in pushed:
        ask(client, name, 4).check_equals(answer)  # what a neighbor of others was is what it is alone
        client.delete(name)
    until_idle(server)


def test_cached_prefixes_are_shared_within_a_salt_and_a_digest_only(
    client: Client, adapter_dirs: dict[str, Path]
) -> None:
    text = "Once upon a time there was a river that ran uphill, and nobody who lived beside it found that odd. " * 2

    def cached(adapter: str = "", salt: str = "row-41") -> int:
        answer = client.generate(text, adapter=adapter, cache_salt=salt, max_tokens=4, **GREEDY)
        return answer.choices[0].finish.usage.cached

    assert cached() == 0
    whole = cached()
    assert whole > 0
    assert cached(salt="row-41 of another") == 0
    assert cached(salt="") == 0
    for name in ("small", "large"):
        assert cached(name) == 0  # not the base's, not each other's
        assert cached(name) == whole
        assert cached(name, "row-41 of another") == 0
    client.push(adapter_dirs["small"], "cached")
    assert cached("cached") == whole  # the same content under another name is the same digest
    client.push(adapter_dirs["mlp"], "cached")
    assert cached("cached") == 0
    assert cached("cached") == whole
    client.push(adapter_dirs["small"], "cached")
    assert cached("cached") == whole  # it is `small` again
    client.delete("cached")
