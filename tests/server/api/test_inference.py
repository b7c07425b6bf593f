"""What InferenceService gives to good requests, over the fake runner whose solo output is known."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from loramux_protos.v1 import inference_pb2
from loramux_server.requests import SamplingParams, StopConditions, Submission
from support.fake_runner import VOCABULARY, solo
from support.servers import EOS, FakeTokenizer, Inside, adapter_files, details, prompt_request, served, upload_messages

pytestmark = pytest.mark.asyncio
TOKENIZER = FakeTokenizer()


def _solo(text: str, max_tokens: int, digest: str | None = None, choice: int = 0, **stop: Any) -> list[int]:
    conditions = StopConditions(eos_token_ids=frozenset({EOS}), **{"ignore_eos": True, **stop})
    sampling = SamplingParams(temperature=0.0, seed=7)
    prompt = tuple(TOKENIZER.encode(text))
    return solo(Submission("r", "default", digest, prompt, sampling, conditions, max_tokens), choice)[0]


async def test_unary_and_stream_give_the_solo_tokens(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 30, response={"token_ids": True})
        expected = _solo("Hello", 30)
        whole = await server.inference.Generate(request)
        assert list(whole.choices[0].token_ids) == expected
        assert whole.choices[0].text == TOKENIZER.decode(expected)
        assert list(whole.prompt.token_ids) == TOKENIZER.encode("Hello")
        assert whole.prompt.seed == 7
        messages = [message async for message in server.inference.GenerateStream(request)]
        assert "".join(message.text for message in messages) == TOKENIZER.decode(expected)
        assert [token for message in messages for token in message.token_ids] == expected
        assert [message.HasField("prompt") for message in messages] == [True] + [False] * (len(messages) - 1)
        assert [message.HasField("finish") for message in messages] == [False] * (len(messages) - 1) + [True]
        assert messages[-1].finish.usage.completion_tokens == 30


async def test_neighbors_with_adapters_give_their_own_solo_tokens(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        digests: dict[str, str | None] = {"": None}
        for index, name in enumerate(("a", "b", "c")):
            upload = upload_messages(name, adapter_files(name.encode()), f"upload-{index}")
            digests[name] = (await server.adapters.UploadAdapter(iter(upload))).adapter.digest
        names = ["", "a", "b", "c", "a", "", "b", "c"]
        calls = [server.inference.Generate(prompt_request("Hello", 25, adapter=name)) for name in names]
        for name, answer in zip(names, await asyncio.gather(*calls), strict=True):
            assert answer.choices[0].text == TOKENIZER.decode(_solo("Hello", 25, digests[name]))
            assert answer.prompt.adapter_digest == (digests[name] or "")


async def test_n_choices_each_end_once(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 12)
        request.sampling.n = 3
        texts: dict[int, str] = defaultdict(str)
        ends = []
        async for message in server.inference.GenerateStream(request):
            texts[message.index] += message.text
            if message.HasField("finish"):
                ends.append(message.index)
        assert sorted(ends) == [0, 1, 2]
        expected = {choice: TOKENIZER.decode(_solo("Hello", 12, choice=choice)) for choice in range(3)}
        assert texts == expected
        whole = await server.inference.Generate(request)
        assert [choice.text for choice in whole.choices] == list(expected.values())


async def test_a_stop_string_ends_the_text_and_the_request(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        full = TOKENIZER.decode(_solo("Hello", 60))
        stop = full[10:13]
        cut = full.index(stop)
        for include in (False, True):
            request = prompt_request("Hello", 60)
            request.stopping.stop_strings.append(stop)
            request.stopping.include_stop = include
            choice = (await server.inference.Generate(request)).choices[0]
            assert choice.text == full[:cut] + (stop if include else "")
            assert choice.finish.reason == inference_pb2.FINISH_REASON_STOP
            assert choice.finish.stop_string == stop
            assert choice.finish.usage.completion_tokens < 60
        await asyncio.sleep(0.1)
        assert server.inside.is_idle


async def test_a_stop_token_is_told(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        tokens = _solo("Hello", 40)
        stop = next(token for token in tokens[5:] if token != EOS)
        request = prompt_request("Hello", 40)
        request.stopping.stop_token_ids.append(stop)
        finish = (await server.inference.Generate(request)).choices[0].finish
        assert (finish.reason, finish.stop_token_id) == (inference_pb2.FINISH_REASON_STOP, stop)
        assert finish.usage.completion_tokens == tokens.index(stop) + 1


async def test_a_stop_string_that_spells_a_special_token_stops_at_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = _solo("Hello", 40)
    stop = next(token for token in tokens[5:] if token != EOS)
    monkeypatch.setattr(FakeTokenizer, "special_tokens", {"<|im_end|>": stop})
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 40)
        request.stopping.stop_strings.append("<|im_end|>")
        finish = (await server.inference.Generate(request)).choices[0].finish
        assert (finish.reason, finish.stop_token_id) == (inference_pb2.FINISH_REASON_STOP, stop)
        assert finish.usage.completion_tokens == tokens.index(stop) + 1
        request.stopping.stop_strings.append("<|im_end|>\n")
        with pytest.raises(aio.AioRpcError) as refused:
            await server.inference.Generate(request)
        assert details(refused.value)["BadRequest"].field_violations[0].field == "stopping.stop_strings[1]"


async def test_echo_logprobs_and_prompt_logprobs(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 5, response={"echo": True, "logprobs": 0, "prompt_logprobs": 0})
        answer = await server.inference.Generate(request)
        assert answer.choices[0].text == "Hello" + TOKENIZER.decode(_solo("Hello", 5))
        assert [entry.logprob for entry in answer.choices[0].logprobs] == [-1.0] * 5
        prompt = answer.prompt.logprobs
        assert [entry.text for entry in prompt] == [b"H", b"e", b"l", b"l", b"o"]
        assert not prompt[0].HasField("logprob")
        assert [entry.logprob for entry in prompt[1:]] == [-1.0, -2.0, -3.0, -4.0]


async def test_a_chat_goes_through_the_template_and_a_refusal_names_it(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
        request = inference_pb2.GenerateRequest(chat=chat, response={"token_ids": True}, stopping={"max_tokens": 2})
        answer = await server.inference.Generate(request)
        assert list(answer.prompt.token_ids) == TOKENIZER.encode("Hello Hi")
        chat["messages"][0]["role"] = "tool"
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(inference_pb2.GenerateRequest(chat=chat))
        assert details(caught.value)["BadRequest"].field_violations[0].field == "chat.messages"


async def test_an_unset_seed_is_drawn_and_told(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 3)
        request.sampling.ClearField("seed")
        first, second = [await server.inference.Generate(request) for _ in range(2)]
        assert first.prompt.seed != second.prompt.seed
        request.sampling.seed = first.prompt.seed
        assert (await server.inference.Generate(request)).choices[0].text == first.choices[0].text


async def test_min_tokens_forbid_every_end(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 10)
        request.stopping.ignore_eos = False
        request.stopping.min_tokens = 6
        request.stopping.stop_token_ids.append(5)
        await server.inference.Generate(request)
        params = [plan.chunks[0].params for plan in server.inside.runner.plans if plan.chunks][-1]
        assert (params.suppressed, params.min_tokens) == ((5, EOS), 6)


async def test_a_text_that_any_token_would_end_cannot_have_a_least_length(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        request = prompt_request("Hello", 10)
        request.stopping.min_tokens = 1
        request.stopping.stop_token_ids.extend(range(VOCABULARY - 1))
        await server.inference.Generate(request)  # one is left
        request.stopping.stop_token_ids.append(VOCABULARY - 1)
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(request)
        found = details(caught.value)
        assert found["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert found["BadRequest"].field_violations[0].field == "stopping.min_tokens"
        request.stopping.min_tokens = 0
        assert (await server.inference.Generate(request)).choices[0].finish.usage.completion_tokens == 1


async def test_a_duplicate_request_id_while_running_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(before_step=lambda plan: time.sleep(0.01))) as server:
        stream = aiter(server.inference.GenerateStream(prompt_request("Hello", 100, request_id="same")))
        await anext(stream)
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(prompt_request(request_id="same"))
        found = details(caught.value)
        assert found["code"] is grpc.StatusCode.ALREADY_EXISTS
        assert found["ErrorInfo"].reason == "DUPLICATE_REQUEST"
        assert found["ResourceInfo"].resource_name == "same"
        assert (await server.inference.Abort(inference_pb2.AbortRequest(request_id="same"))).aborted
        last = [message async for message in stream][-1]
        assert last.finish.reason == inference_pb2.FINISH_REASON_ABORTED
        assert not (await server.inference.Abort(inference_pb2.AbortRequest(request_id="same"))).aborted
        again = await server.inference.Generate(prompt_request("Hello", 2, request_id="same"))
        assert again.prompt.request_id == "same"


async def test_model_and_tokens(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        model = await server.inference.GetModel(inference_pb2.GetModelRequest())
        assert (model.model_id, model.limits.context_tokens, model.limits.vocabulary) == ("fake", 128, 64)
        assert model.limits.kv_cache_tokens == 256
        ids = (await server.inference.Tokenize(inference_pb2.TokenizeRequest(text="Hello"))).token_ids
        assert list(ids) == TOKENIZER.encode("Hello")
        text = await server.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids))
        assert text.text == "Hello"
        for call in (
            server.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[64])),
            server.inference.Tokenize(inference_pb2.TokenizeRequest()),
        ):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
