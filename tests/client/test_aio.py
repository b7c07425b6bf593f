"""The asyncio client against a fake server; what differs from its synchronous twin."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loramux import AsyncClient, errors
from loramux.retry import NO_RETRY, RetryPolicy
from loramux.types import TransferProgress
from support.fake_service import DIGEST, FakeServer

QUICK = RetryPolicy(first=0.01, longest=0.1)


@pytest.mark.asyncio
async def test_generate_concurrently(fake: FakeServer) -> None:
    async with AsyncClient(fake.address) as client:
        answers = await asyncio.gather(*(client.generate(f"p{i}") for i in range(8)))
    assert [answer.text for answer in answers] == [f"base: p{i}" for i in range(8)]


@pytest.mark.asyncio
async def test_stream_and_early_close(fake: FakeServer) -> None:
    async with AsyncClient(fake.address) as client:
        assert [part.text async for part in client.stream("a b")] == ["a", " b"]
        stream = client.stream(" ".join(["word"] * 20000))
        fake.state.cancelled.clear()
        await anext(stream)
        await stream.aclose()
        assert await asyncio.to_thread(fake.state.cancelled.wait, 5)


@pytest.mark.asyncio
async def test_errors_and_retries(fake: FakeServer) -> None:
    async with AsyncClient(fake.address, retry=QUICK) as client:
        with pytest.raises(errors.NotFound):
            await client.generate("x", adapter="nobody")
        fake.state.faults.unavailable_calls = 1
        assert (await client.model()).model_id == "fake"
        fake.state.faults.unavailable_calls = 1
        assert [part.text async for part in client.stream("a")] == ["a"]
        fake.state.faults.fail_stream_after = 0
        with pytest.raises(errors.ServerFault):
            _ = [part async for part in client.stream("a b")]
        fake.state.faults.unavailable_calls = 100
        with pytest.raises(errors.Unavailable):
            await client.tokenize("x")


@pytest.mark.asyncio
async def test_push_resume_pull_and_manage(fake: FakeServer, adapter_dir: Path, tmp_path: Path) -> None:
    async with AsyncClient(fake.address, retry=QUICK) as client:
        fake.state.faults.cut_upload_after = 600_000
        pushed = await client.push(adapter_dir, "bot")
        assert pushed.resumed_bytes >= 600_000
        assert pushed.left_out == ("README.md", "optimizer.pt")
        calls = fake.state.calls
        with pytest.raises(errors.LocalFilesError, match="overwrite=True"):
            await client.pull("bot", adapter_dir)
        assert fake.state.calls == calls
        pulled = await client.pull("bot", tmp_path / "back")
        assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == (
            adapter_dir / "adapter_model.safetensors"
        ).read_bytes()
        assert pulled.digest == (await client.verify("bot")).digest == DIGEST
        assert [adapter.name async for adapter in client.adapters(page_size=1)] == ["bot"]
        assert (await client.update("bot", merge=True)).residency.merged == "ready"
        assert (await client.adapter("bot")).name == "bot"
        await client.delete("bot")
        with pytest.raises(errors.NotFound):
            await client.adapter("bot")


@pytest.mark.asyncio
async def test_a_file_that_vanishes_during_a_push_is_the_reason_given(fake: FakeServer, adapter_dir: Path) -> None:
    def vanish(_: TransferProgress) -> None:
        (adapter_dir / "adapter_model.safetensors").unlink(missing_ok=True)

    async with AsyncClient(fake.address, retry=QUICK) as client:
        with pytest.raises(errors.LocalFilesError, match=r"cannot read .*adapter_model.safetensors"):
            await client.push(adapter_dir, "bot", progress=vanish)


@pytest.mark.asyncio
async def test_an_upload_refused_early_tells_its_status(fake: FakeServer, adapter_dir: Path) -> None:
    fake.state.faults.unavailable_calls = 1
    async with AsyncClient(fake.address, retry=NO_RETRY) as client:
        with pytest.raises(errors.Unavailable, match="not ready"):
            await client.push(adapter_dir, "bot")


@pytest.mark.asyncio
async def test_no_status_is_lost_however_writes_and_refusal_cross(fake: FakeServer, adapter_dir: Path) -> None:
    """grpc.aio puts an INTERNAL of its own over the status when a write is under way: some of these runs have it."""
    async with AsyncClient(fake.address, retry=NO_RETRY) as client:
        for run in range(60):
            fake.state.uploads.clear()
            if run % 2:
                fake.state.faults.cut_upload_after = 1 + (run * 20_000) % 1_200_000
            else:
                fake.state.faults.unavailable_calls = 1
            with pytest.raises(errors.Unavailable, match="cut" if run % 2 else "not ready"):
                await client.push(adapter_dir, "bot")


@pytest.mark.asyncio
async def test_health_tokens_and_abort(fake: FakeServer) -> None:
    async with AsyncClient(fake.address) as client:
        await client.wait_healthy(5)
        assert await client.tokenize("ab") == (97, 98)
        assert await client.detokenize([97, 98]) == "ab"
        assert await client.abort("running")
        fake.set_serving(False)
        with pytest.raises(errors.Unavailable, match="NOT_SERVING"):
            await client.wait_healthy(2, poll=0.05)
