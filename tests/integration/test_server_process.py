"""Requests to the real process on the embedded base: what is refused, and how."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from loramux import Client
from loramux.errors import AlreadyExists, InvalidArgument, LoramuxError, NotFound
from loramux.local_server import LocalServer
from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from support.live import GREEDY, PROMPT, Answer, Peak, ask, cpu_seconds, is_idle
from support.raw_requests import raw_request
from support.servers import details, upload_messages
from support.tiny_adapters import tiny_files

GENERATE = "/loramux.v1.InferenceService/Generate"
STREAM = "/loramux.v1.InferenceService/GenerateStream"
UPLOAD = "/loramux.v1.AdapterService/UploadAdapter"
NAN, INF = math.nan, math.inf


def _refused(call: Any) -> dict[str, Any]:
    """Code, message and rich details of a call of raw gRPC that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return {**details(caught.value), "message": caught.value.details()}  # type: ignore[arg-type,attr-defined]


def test_a_mixed_burst_gives_each_request_what_it_gives_alone(client: Client, adapter_dirs: dict[str, Path]) -> None:
    names = ["", *adapter_dirs]
    alone = {name: ask(client, name) for name in names}
    assert len({answer.tokens for answer in alone.values()}) == len(names)
    with ThreadPoolExecutor(8) as pool:
        for name, answer in zip(names * 2, pool.map(lambda name: ask(client, name), names * 2), strict=True):
            answer.check_equals(alone[name])


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd", b"\x1a\xff\xff\xff\xff\x0f"])
def test_garbage_and_invalid_utf8_are_refused(server: LocalServer, client: Client, garbage: bytes) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for call in (
            lambda: channel.unary_unary(GENERATE)(garbage, timeout=20),
            lambda: list(channel.unary_stream(STREAM)(garbage, timeout=20)),
            lambda: channel.stream_unary(UPLOAD)(iter([garbage]), timeout=20),
        ):
            error = _refused(call)
            assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
            assert error["ErrorInfo"].reason == "INVALID_REQUEST"
            assert not any(word in error["message"] for word in ("Error", "Exception", "Traceback", "/", "google"))
    assert client.is_healthy()


def test_oversized_messages_and_unknown_methods_are_refused(server: LocalServer, client: Client) -> None:
    request = inference_pb2.GenerateRequest(text="x").SerializeToString()
    large = inference_pb2.GenerateRequest(text="x" * (5 << 20)).SerializeToString()
    too_much = grpc.StatusCode.RESOURCE_EXHAUSTED
    with grpc.insecure_channel(server.address) as channel:
        for path, payload, metadata, expected in (
            (GENERATE, large, (), too_much),
            (GENERATE, request, (("x-large", "v" * (64 << 10)),), too_much),
            ("/loramux.v1.InferenceService/Nope", b"", (), grpc.StatusCode.UNIMPLEMENTED),
            ("/no.such.Service/Nope", b"", (), grpc.StatusCode.UNIMPLEMENTED),
        ):
            error = _refused(lambda p=path, d=payload, m=metadata: channel.unary_unary(p)(d, metadata=m, timeout=20))
            assert error["code"] is expected
    assert client.is_healthy()


FIELDS: list[tuple[str, dict[str, Any]]] = [
    *(("sampling.temperature", {"temperature": value}) for value in (NAN, INF, -INF, -0.1)),
    *(("sampling.top_p", {"top_p": value}) for value in (NAN, INF, -0.5, 0.0, 1.5)),
    *(("sampling.min_p", {"min_p": value}) for value in (NAN, -0.5)),
    *(("sampling.repetition_penalty", {"repetition_penalty": value}) for value in (NAN, 0.0, -1.0)),
    *(("sampling.presence_penalty", {"presence_penalty": value}) for value in (NAN, INF)),
    *(("sampling.n", {"n": value}) for value in (0, 1 << 31)),
    *(("response.logprobs", {"logprobs": value}) for value in (1_000_000,)),
    *(("response.prompt_logprobs", {"prompt_logprobs": value}) for value in (1_000_000,)),
    ("stopping.stop_strings[0]", {"stop": [""]}),
    ("stopping.stop_strings", {"stop": ["x"] * 10_000}),
    ("stopping.max_tokens", {"max_tokens": 0}),
    ("stopping.min_tokens", {"max_tokens": 3, "min_tokens": 4}),
    ("sampling.logit_bias[5]", {"logit_bias": {5: NAN}}),
    ("request_id", {"request_id": "a b"}),
    ("cache_salt", {"cache_salt": "x" * 100_000}),
]


def test_fields_are_refused_by_path_before_anything_is_allocated(server: LocalServer, client: Client) -> None:
    with Peak(server.pid) as peak, grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for path, options in FIELDS:
            request = raw_request(PROMPT, options)  # our own client would refuse most of them itself
            for call in (stub.Generate, lambda *args, **more: list(stub.GenerateStream(*args, **more))):
                error = _refused(lambda c=call, r=request: c(r, timeout=20))
                assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
                assert error["BadRequest"].field_violations[0].field == path, options
    assert peak.growth < 8 << 20
    assert is_idle(server)


def test_ids_out_of_the_vocabulary_leave_neighbors_equal(client: Client, adapter_dirs: dict[str, Path]) -> None:
    vocabulary = client.model().limits.vocabulary
    bad: list[tuple[str, dict[str, Any]]] = [
        ("token_ids.ids[1]", {"token_ids": [1, vocabulary]}),
        ("token_ids.ids[0]", {"token_ids": [4_000_000_000]}),
        ("sampling.logit_bias[0]", {"token_ids": [1], "logit_bias": {vocabulary: 1.0}}),
        ("stopping.stop_token_ids[2]", {"token_ids": [1], "stop_token_ids": [0, 1, vocabulary]}),
    ]
    names = ["", *adapter_dirs]
    alone = {name: ask(client, name, 120) for name in names}
    answers: dict[str, Answer] = {}
    threads = [threading.Thread(target=lambda n=name: answers.setdefault(n, ask(client, n, 120))) for name in names]
    for thread in threads:
        thread.start()
    refused = 0
    while any(thread.is_alive() for thread in threads):
        path, options = bad[refused % len(bad)]
        with pytest.raises(InvalidArgument) as caught:
            client.generate(**options)
        assert caught.value.violations[0].field == path
        refused += 1
    assert refused >= len(bad)
    for name in names:
        answers[name].check_equals(alone[name])


def test_impossible_inputs_are_refused_with_the_limit(server: LocalServer, client: Client) -> None:
    context = client.model().limits.context_tokens
    for path, request in (
        ("input", inference_pb2.GenerateRequest()),
        ("text", inference_pb2.GenerateRequest(text="")),
        ("token_ids.ids", inference_pb2.GenerateRequest(token_ids={})),
        ("chat.messages", inference_pb2.GenerateRequest(chat={})),
    ):
        with grpc.insecure_channel(server.address) as channel:
            error = _refused(lambda c=channel, r=request: c.unary_unary(GENERATE)(r.SerializeToString(), timeout=20))
        assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert error["BadRequest"].field_violations[0].field == path
    # Both of two inputs cannot be sent by a generated client: of a oneof, the last on the wire is what counts.
    for options in (
        {"token_ids": [1] * context},
        {"text": "word " * context},
        {"token_ids": [1] * 10, "max_tokens": context},
        {"token_ids": [1] * 10, "max_tokens": context - 9},
    ):
        with pytest.raises(InvalidArgument) as caught:
            client.generate(**options)  # type: ignore[arg-type]
        assert caught.value.metadata["context_tokens"] == str(context)


def test_max_tokens_left_out_means_what_is_left(client: Client) -> None:
    context = client.model().limits.context_tokens
    rest = client.generate(token_ids=[5] * (context - 3), **GREEDY)
    assert rest.choices[0].finish.usage.completion == 3
    assert rest.choices[0].finish.reason == "length"


def test_unknown_and_unfinished_adapters_are_never_the_base(server: LocalServer, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        messages = upload_messages("half", tiny_files(1), "upload-half")
        _refused(lambda: stub.UploadAdapter(iter(messages[:-1]), timeout=20))
        progress = stub.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id="upload-half"), timeout=20)
    assert all(entry.received == entry.size for entry in progress.files)  # every byte is there, only no commit
    digest = client.adapter("small").digest
    other = f"{(int(digest[:12], 16) + 1) % (1 << 48):012x}"
    for reference in ("nobody", "half", f"half@{digest}", f"small@{other}", f"nobody@{digest}"):
        for call in (
            lambda r=reference: client.generate(PROMPT, adapter=r, max_tokens=1),
            lambda r=reference: list(client.stream(PROMPT, adapter=r, max_tokens=1)),
        ):
            with pytest.raises(NotFound) as caught:
                call()
            assert caught.value.resource == reference
    ask(client, f"small@{digest[:8]}").check_equals(ask(client, "small"))


def test_a_duplicate_request_id_while_running_is_refused(client: Client) -> None:
    stream = client.stream(PROMPT, max_tokens=1500, request_id="same", **GREEDY)
    next(stream)
    for call in (
        lambda: client.generate(PROMPT, request_id="same", max_tokens=1),
        lambda: list(client.stream(PROMPT, request_id="same", max_tokens=1)),
    ):
        with pytest.raises(AlreadyExists) as caught:
            call()
        assert caught.value.resource == "same"
    assert client.abort("same")
    *_, last = stream
    assert last.finish is not None
    assert last.finish.reason == "aborted"
    assert not client.abort("same")
    assert client.generate(PROMPT, request_id="same", max_tokens=1, **GREEDY).choices[0].finish.reason == "length"


def test_what_was_pushed_comes_back_and_is_listed(
    client: Client, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    client.pull("small", tmp_path / "back")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (adapter_dirs["small"] / file).read_bytes()
    listed = {adapter.name: adapter for adapter in client.adapters(page_size=100)}
    assert listed.keys() >= adapter_dirs.keys()
    assert listed["large"].max_rank == 16


def test_a_refusal_is_as_fast_as_it_is_cheap(server: LocalServer, client: Client) -> None:
    """Of the slowest kind, a prompt over the context: it is tokenized first."""
    used = cpu_seconds(server.pid)
    for _ in range(5):
        with pytest.raises(LoramuxError):
            client.generate("word " * 4000)
    assert cpu_seconds(server.pid) - used < 2.5
