"""Token ids of requests are judged by what answers them: the base, or an adapter that knows more or fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from loramux_protos.v1 import common_pb2, inference_pb2
from support.fake_runner import VOCABULARY
from support.servers import Inside, Served, adapter_files, details, read_fake_adapter, served, upload_messages
from support.stores import FakeWeights

pytestmark = pytest.mark.asyncio
KNOWN = {b"wide": VOCABULARY + 3, b"narrow": VOCABULARY - 4, b"plain": 0}


def read(files: Mapping[str, Path], *, allow_base_mismatch: bool) -> FakeWeights:
    spec = read_fake_adapter(files, allow_base_mismatch=allow_base_mismatch).spec
    content = next(path.read_bytes() for name, path in files.items() if "model" in name)
    return FakeWeights(replace(spec, vocabulary=KNOWN[content]))


async def push_all(server: Served) -> None:
    for content in KNOWN:
        name = content.decode()
        await server.adapters.UploadAdapter(iter(upload_messages(name, adapter_files(content), f"upload-{name}")))


def requests_with(token: int, adapter: str) -> dict[str, inference_pb2.GenerateRequest]:
    """Field at fault -> a request that holds the id there."""
    return {
        "token_ids.ids[1]": _request(adapter, ids=[1, token]),
        "sampling.logit_bias[0]": _request(adapter, logit_bias={token: 1.0}),
        "stopping.stop_token_ids[0]": _request(adapter, stop=[token]),
    }


def _request(adapter: str, ids: Any = (1, 2), logit_bias: Any = None, stop: Any = ()) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        adapter=adapter,
        token_ids=common_pb2.TokenIds(ids=ids),
        sampling=inference_pb2.Sampling(temperature=0.0, logit_bias=logit_bias or {}),
        stopping=inference_pb2.Stopping(max_tokens=2, stop_token_ids=stop),
    )


@pytest.mark.parametrize(
    ("adapter", "known"),
    [("", VOCABULARY), ("plain", VOCABULARY), ("wide", VOCABULARY + 3), ("narrow", VOCABULARY - 4)],
)
async def test_ids_are_those_of_what_answers(tmp_path: Path, adapter: str, known: int) -> None:
    async with served(tmp_path, Inside(read=read)) as server:
        await push_all(server)
        for field, request in requests_with(known, adapter).items():
            with pytest.raises(aio.AioRpcError) as caught:
                await server.inference.Generate(request)
            error = details(caught.value)
            assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
            assert error["BadRequest"].field_violations[0].field == field
            assert error["ErrorInfo"].metadata["vocabulary"] == str(known)
        for request in requests_with(known - 1, adapter).values():
            answer = await server.inference.Generate(request)
            assert answer.choices[0].finish.usage.completion_tokens >= 1


async def test_an_id_is_refused_before_a_use_is_taken(tmp_path: Path) -> None:
    """A request that could not run costs nothing."""
    async with served(tmp_path, Inside(read=read)) as server:
        await server.adapters.UploadAdapter(iter(upload_messages("wide", adapter_files(b"wide"), max_uses=1)))
        with pytest.raises(aio.AioRpcError):
            await server.inference.Generate(_request("wide", ids=[VOCABULARY + 3]))
        await server.inference.Generate(_request("wide", ids=[VOCABULARY + 2]))


async def test_several_adapters_know_what_one_of_them_knows(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(read=read)) as server:
        await push_all(server)
        for token, is_known in ((VOCABULARY + 2, True), (VOCABULARY + 3, False)):
            for request in requests_with(token, "").values():
                for name, weight in (("wide", 1.0), ("plain", 0.5)):
                    request.adapters.add(adapter=name, weight=weight)
                if is_known:
                    assert (await server.inference.Generate(request)).choices
                else:
                    with pytest.raises(aio.AioRpcError, match=f"outside the vocabulary of {VOCABULARY + 3}"):
                        await server.inference.Generate(request)
