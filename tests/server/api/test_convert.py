"""Every field of a request arrives where the sampler, the engine and the answer look for it."""

from __future__ import annotations

import pytest

from loramux_protos.v1 import common_pb2, inference_pb2
from loramux_server.api.calls import ChatTurn, GenerateCall, ResponseOptions
from loramux_server.api.convert import read_generate
from loramux_server.requests import SamplingParams, StopConditions


def test_every_field_arrives() -> None:
    request = inference_pb2.GenerateRequest(
        request_id="r",
        adapter="german",
        text="Hi",
        sampling=inference_pb2.Sampling(
            temperature=0.5,
            top_p=0.25,
            top_k=3,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=2.0,
            logit_bias={4: -1.0},
            seed=7,
            n=2,
        ),
        stopping=inference_pb2.Stopping(
            max_tokens=9,
            min_tokens=2,
            stop_strings=["a", "b"],
            stop_token_ids=[5, 1, 5],
            include_stop=True,
            ignore_eos=True,
        ),
        response=inference_pb2.ResponseOptions(logprobs=2, prompt_logprobs=0, token_ids=True, echo=True),
        priority=-4,
        cache_salt="s",
    )
    assert read_generate(request) == GenerateCall(
        request_id="r",
        adapter="german",
        text="Hi",
        sampling=SamplingParams(0.5, 0.25, 3, 0.125, 1.5, -1.0, 2.0, {4: -1.0}, logprobs=2, prompt_logprobs=0),
        stop=StopConditions(2, ("a", "b"), True, (5, 1, 5), ignore_eos=True),
        response=ResponseOptions(token_ids=True, echo=True),
        n=2,
        seed=7,
        max_tokens=9,
        priority=-4,
        cache_salt="s",
    )


def test_what_is_left_out_has_its_default() -> None:
    stop = StopConditions(stop_token_ids=())
    assert read_generate(inference_pb2.GenerateRequest()) == GenerateCall(stop=stop)


@pytest.mark.parametrize(
    ("request_", "call"),
    [
        ({"token_ids": common_pb2.TokenIds(ids=[3, 4])}, {"token_ids": (3, 4)}),
        ({"text": ""}, {"text": ""}),
        (
            {"chat": inference_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="x")])},
            {"chat": (ChatTurn("user", "x"),)},
        ),
    ],
)
def test_the_input_is_the_one_that_was_set(request_: dict[str, object], call: dict[str, object]) -> None:
    read = read_generate(inference_pb2.GenerateRequest(**request_))
    assert (read.text, read.token_ids, read.chat) == tuple(call.get(name) for name in ("text", "token_ids", "chat"))
