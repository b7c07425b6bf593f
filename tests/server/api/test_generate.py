"""The use case without a transport: what one call becomes, and that it ends with its reader."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.errors import AdapterIncompatible
from loramux_protos.v1 import adapters_pb2
from loramux_server.api.calls import GenerateCall
from loramux_server.api.gate import Gate
from loramux_server.api.generate import GenerateUseCase
from loramux_server.api.generation import Generation
from loramux_server.api.tokenizer_pool import TokenizerPool
from loramux_server.engine.plan import StepPlan
from loramux_server.errors import Draining, InvalidRequest, RequestFailed, WarmingUp
from loramux_server.requests import RequestFailure, SamplingParams, StopConditions
from support.servers import EOS, Served, adapter_files, served, until, upload_messages

pytestmark = pytest.mark.asyncio
GREEDY = SamplingParams(temperature=0.0)


def _use_case(server: Served) -> GenerateUseCase:
    return GenerateUseCase(server.app._gate, server.app.metrics, TokenizerPool())


async def _text(generation: Generation) -> str:
    return "".join([delta.text async for deltas in generation for delta in deltas])


async def test_a_call_becomes_one_submission_with_what_the_server_decides(tmp_path: Path) -> None:
    call = GenerateCall(text="Hello", sampling=GREEDY, stop=StopConditions(min_tokens=2, stop_token_ids=(5, 3)), n=2)
    async with served(tmp_path) as server, _use_case(server).open(call, "t", None) as generation:
        submission = generation.submission
        assert (submission.tenant, submission.digest, len(submission.prompt), submission.n) == ("t", None, 5, 2)
        assert submission.max_tokens == 128 - 5
        assert submission.stop.eos_token_ids == {EOS}
        assert submission.sampling.suppressed == (3, 5, EOS)
        assert submission.sampling.min_tokens == submission.stop.min_tokens == 2


async def test_order_and_cache_are_as_the_call_says(tmp_path: Path) -> None:
    call = GenerateCall(text="a", sampling=GREEDY, request_id="r", priority=-3, cache_salt="mine")
    async with served(tmp_path) as server, _use_case(server).open(call, "t", 1e12) as generation:
        submission = generation.submission
        assert (submission.request_id, submission.priority, submission.cache_salt) == ("r", -3, "mine")
        assert submission.deadline == 1e12


async def test_a_seed_is_drawn_only_where_none_is_given(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        seeds: list[int] = []
        for number, seed in enumerate((None, None, 0)):
            call = GenerateCall(request_id=f"r{number}", text="a", seed=seed)
            async with _use_case(server).open(call, "t", None) as generation:
                seeds.append(generation.submission.sampling.seed)
    assert seeds[0] != seeds[1]
    assert seeds[2] == 0


async def test_min_tokens_is_never_more_than_what_is_left(tmp_path: Path) -> None:
    call = GenerateCall(text="x" * 126, sampling=GREEDY, stop=StopConditions(min_tokens=128))
    async with served(tmp_path) as server, _use_case(server).open(call, "t", None) as generation:
        assert generation.submission.stop.min_tokens == generation.submission.max_tokens == 2


@pytest.mark.parametrize(
    ("call", "echo"),
    [(GenerateCall(text="Hé"), "Hé"), (GenerateCall(token_ids=(7, 4)), "HE")],
)
async def test_an_echo_is_the_callers_own_text_or_that_of_its_tokens(
    tmp_path: Path, call: GenerateCall, echo: str
) -> None:
    async with served(tmp_path) as server, _use_case(server).open(call, "t", None) as generation:
        assert generation.prompt_text() == echo


async def test_the_version_is_held_until_the_generation_is_left(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await server.adapters.UploadAdapter(iter(upload_messages("german", adapter_files())))
        call = GenerateCall(adapter="german", text="a", sampling=GREEDY, max_tokens=3)
        async with _use_case(server).open(call, "default", None) as generation:
            assert generation.submission.digest is not None
            assert len(await _text(generation)) > 0
        await until(lambda: server.inside.is_idle)


async def test_several_adapters_are_one_submission_and_all_are_held(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        for name in ("style", "facts"):
            await server.adapters.UploadAdapter(iter(upload_messages(name, adapter_files(name.encode()))))
        call = GenerateCall(adapters=(("style", 0.5), ("facts", 1.0)), text="a", sampling=GREEDY, max_tokens=3)
        async with _use_case(server).open(call, "default", None) as generation:
            digest = generation.submission.digest
            assert digest is not None
            for name in ("style", "facts"):
                await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name))
            assert len(await _text(generation)) > 0
        await until(lambda: server.inside.is_idle and not server.inside.registry.existing([digest]))


async def test_a_combination_that_cannot_be_loaded_takes_no_use(tmp_path: Path) -> None:
    """Whether there is an exact sum is found when it is loaded: a refusal then is one like any other."""
    async with served(tmp_path) as server:
        store = server.inside.registry._store

        def left() -> list[int | None]:
            found = [store.get("default", name).lifetime for name in ("style", "facts")]
            return [lifetime and lifetime.uses_left for lifetime in found]

        for name in ("style", "facts"):
            messages = upload_messages(name, adapter_files(name.encode()), f"upload-{name}", max_uses=3)
            await server.adapters.UploadAdapter(iter(messages))
        call = GenerateCall(adapters=(("style", 0.5), ("facts", 1.0)), text="a", sampling=GREEDY, max_tokens=3)
        async with _use_case(server).open(call, "default", None) as generation:
            digest = generation.submission.digest
            assert digest is not None
            assert len(await _text(generation)) > 0
        assert left() == [2, 2]
        await until(lambda: server.inside.is_idle)
        server.inside.pool._errors[digest] = AdapterIncompatible("no exact sum")
        with pytest.raises(RequestFailed, match="no exact sum"):
            async with _use_case(server).open(call, "default", None) as generation:
                await _text(generation)
        assert left() == [2, 2]
        async with _use_case(server).open(call, "default", None):
            pass  # accepted, and left before it began
        assert left() == [1, 1]
        assert not store._ends._uses._open  # type: ignore[attr-defined]


async def test_leaving_early_aborts_what_runs(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        runner, has_left, begun = server.inside.runner, threading.Event(), list[StepPlan]()

        def hold(plan: StepPlan) -> dict[str, RequestFailure]:
            if plan.chunks:
                begun.append(plan)
                assert len(begun) == 1 or has_left.wait(20)  # the second token is not made before the reader has left
            return {}

        runner.inject = hold
        async with _use_case(server).open(GenerateCall(text="a", sampling=GREEDY), "t", None) as generation:
            await anext(generation)
        has_left.set()
        await until(lambda: server.inside.is_idle)
        assert len(begun) <= 2  # the step that was running, if one was, and no more


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        (GenerateCall(), ["input"]),
        (GenerateCall(text="a", n=0, max_tokens=0), ["sampling.n", "stopping.max_tokens"]),
        (GenerateCall(text="a" * 126, max_tokens=3), ["stopping.max_tokens"]),
    ],
)
async def test_nothing_is_submitted_of_a_call_that_is_refused(
    tmp_path: Path, call: GenerateCall, fields: list[str]
) -> None:
    async with served(tmp_path) as server:
        with pytest.raises(InvalidRequest) as caught:
            async with _use_case(server).open(call, "t", None):
                pass
        assert [field for field, _ in caught.value.violations] == fields
        assert server.inside.is_idle


async def test_the_gate_is_asked_first(tmp_path: Path) -> None:
    async def refusal(use_case: GenerateUseCase) -> Any:
        with pytest.raises((WarmingUp, Draining)) as caught:
            async with use_case.open(GenerateCall(), "t", None):
                pass
        return type(caught.value)

    async with served(tmp_path) as server:
        use_case = _use_case(server)
        server.app._gate.drain()
        assert await refusal(use_case) is Draining
    assert await refusal(GenerateUseCase(Gate(), server.app.metrics, TokenizerPool())) is WarmingUp
