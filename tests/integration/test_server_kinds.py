"""Adapters of many kinds, made by PEFT, in the real process: pushed, used in one batch, merged, fetched, removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig
from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from loramux.errors import FailedPrecondition, InvalidArgument
from loramux.local_server import LocalServer
from loramux_adapters.embedded.tiny import tiny_path
from support.combined import CombinedOracle, Terms
from support.kinds import KindOracle, make_kind
from support.live import until, until_idle

RUN_AND_QUEUED = 16  # of the server of these tests: conftest.OPTIONS
PROMPT = [5, 17, 4, 60, 9, 33, 8]
INVOCATION = [60, 9]
ATTENTION = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
CONFIGS: dict[str, PeftConfig] = {
    "lora": peft.LoraConfig(r=4, **ATTENTION),
    "dora": peft.LoraConfig(r=4, use_dora=True, **ATTENTION),
    "dora of the embedding": peft.LoraConfig(
        r=4, use_dora=True, target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
    "alora": peft.LoraConfig(r=4, alora_invocation_tokens=INVOCATION, **ATTENTION),
    "tokens": peft.LoraConfig(r=4, trainable_token_indices=PROMPT, **ATTENTION),
    "loha": peft.LoHaConfig(r=4, **ATTENTION),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "ln tuning": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}
SAID_KIND = {"tokens": "lora", "dora of the embedding": "dora"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {
        name: make_kind(tiny_path(), root / name, config, seed=seed, std=0.2)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def truths(directories: dict[str, Path]) -> dict[str, list[int]]:
    """PEFT's own greedy tokens, and the base's."""
    found = {name: KindOracle(tiny_path(), path).truth(name, PROMPT, 12).tokens for name, path in directories.items()}
    return {"": KindOracle(tiny_path(), None).truth(None, PROMPT, 12).tokens, **found}


@pytest.fixture
def names(client: Client, server: LocalServer, directories: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Kind -> the adapter's name on the server."""
    pushed = {kind: f"kind-{index}" for index, kind in enumerate(directories)}
    for kind, name in pushed.items():
        client.push(directories[kind], name)
    yield pushed
    for name in pushed.values():
        client.delete(name)
    until_idle(server)


def answer(client: Client, adapter: str | Mapping[str, float], **more: Any) -> list[int]:
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12, "return_token_ids": True}
    return list(client.generate(token_ids=PROMPT, adapter=adapter, **{**options, **more}).choices[0].token_ids)


def test_all_kinds_answer_as_peft_does_in_one_batch(
    client: Client, names: dict[str, str], truths: dict[str, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in truths.values()}) > len(truths) // 2
    wanted = [kind for kind in truths for _ in range(2)]
    with ThreadPoolExecutor(RUN_AND_QUEUED) as pool:  # more at once would be refused
        answers = list(pool.map(lambda kind: answer(client, names.get(kind, "")), wanted))
    for kind, tokens in zip(wanted, answers, strict=True):
        assert tokens == truths[kind], kind


def test_they_say_what_they_are_and_come_back_byte_by_byte(
    client: Client, names: dict[str, str], directories: dict[str, Path], tmp_path: Path
) -> None:
    for kind, name in names.items():
        adapter = client.adapter(name)
        assert adapter.kind == SAID_KIND.get(kind, kind)
        client.pull(name, tmp_path / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (directories[kind] / file).read_bytes()


def test_usage_counts_the_text_alone(client: Client, names: dict[str, str]) -> None:
    for kind in ("prompt tuning", "prefix tuning", "alora"):
        choice = client.generate(token_ids=PROMPT, adapter=names[kind], max_tokens=2, temperature=0.0).choices[0]
        assert choice.finish.usage.prompt == len(PROMPT), kind


def test_a_prompt_that_does_not_activate_its_adapter_is_refused(client: Client, names: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="does not hold the tokens that activate this adapter"):
        client.generate(token_ids=[5, 17, 4], adapter=names["alora"], max_tokens=2)


COMBINED: dict[str, Terms] = {
    "low ranks": [("lora", 0.7), ("loha", 1.0)],
    "all parts": [("lora", 1.0), ("ia3", 1.0), ("prefix tuning", 1.0)],
    "a weight of its own": [("dora", 0.5), ("lora", 1.0)],
}


def test_several_adapters_in_one_request_act_as_their_sum(
    client: Client,
    server: LocalServer,
    names: dict[str, str],
    directories: dict[str, Path],
    truths: dict[str, list[int]],
) -> None:
    sums = {
        name: CombinedOracle(tiny_path(), directories, terms).truth(name, PROMPT, 12).tokens
        for name, terms in COMBINED.items()
    }
    assert len({tuple(tokens) for tokens in [*sums.values(), *truths.values()]}) > len(truths)
    asked = {name: {names[kind]: weight for kind, weight in terms} for name, terms in COMBINED.items()}
    with ThreadPoolExecutor(RUN_AND_QUEUED) as pool:
        alone = {kind: pool.submit(answer, client, names[kind]) for kind in ("lora", "dora", "ia3")}
        together = {name: pool.submit(answer, client, terms) for name, terms in asked.items() for _ in range(2)}
        for name, found in together.items():
            assert found.result() == sums[name], name
        for kind, found in alone.items():
            assert found.result() == truths[kind], kind

    def digest(terms: Mapping[str, float]) -> str | None:
        return client.generate(token_ids=PROMPT, adapter=terms, max_tokens=1).prompt.adapter_digest

    assert len({digest(terms) for terms in asked.values()}) == 3
    low_ranks = asked["low ranks"]
    assert digest(low_ranks) == digest(dict(reversed(low_ranks.items())))
    options = ["-A", f"{names['lora']}=0.7", "-A", names["loha"], "--temperature", "0", "--max-tokens", "12"]
    result = CliRunner().invoke(app, ["generate", "Hello", *options, "--address", server.address])
    said = client.generate("Hello", adapter=low_ranks, temperature=0.0, max_tokens=12).choices[0].text
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == said.rstrip("\n")


def test_what_has_no_sum_is_refused(client: Client, names: dict[str, str]) -> None:
    for kinds, why in (
        (("prompt tuning", "prefix tuning"), "kind-[0-9]+ and kind-[0-9]+ stand before the prompt"),
        (("alora", "lora"), "kind-[0-9]+ acts from its invocation tokens on only"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            client.generate(token_ids=PROMPT, adapter={names[kind]: 1.0 for kind in kinds}, max_tokens=2)
    with pytest.raises(FailedPrecondition, match="Magnitude of one adapter has no exact sum"):
        client.generate(token_ids=PROMPT, adapter={names["dora of the embedding"]: 0.5}, max_tokens=2)
    assert answer(client, names["lora"])


@pytest.mark.parametrize("kind", ["dora", "loha", "ia3", "tokens"])
def test_merged_they_answer_alike(
    client: Client, names: dict[str, str], truths: dict[str, list[int]], kind: str
) -> None:
    name = names[kind]
    client.update(name, merge=True)
    until(lambda: client.adapter(name).residency.merged == "ready", f"{kind} merged")
    assert answer(client, name) == truths[kind]


def test_what_is_in_no_weight_is_not_merged_and_says_why(
    client: Client, names: dict[str, str], truths: dict[str, list[int]]
) -> None:
    for kind, reason in (
        ("prompt tuning", "virtual tokens before the prompt"),
        ("prefix tuning", "keys and values before the prompt"),
        ("ln tuning", "a norm is no linear map"),
    ):
        client.update(names[kind], merge=True)
        until(lambda name=names[kind]: client.adapter(name).residency.merged == "refused", f"{kind} is refused")  # type: ignore[misc]
        assert reason in client.adapter(names[kind]).residency.merged_reason
        assert answer(client, names[kind]) == truths[kind]
