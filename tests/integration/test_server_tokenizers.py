"""An adapter with tokens, a tokenizer and a chat template of its own in the real process: pushed, asked, fetched."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoTokenizer

from loramux import Client
from loramux.errors import InvalidArgument, LoramuxError
from loramux.local_server import LocalServer
from loramux_adapters.embedded.tiny import tiny_path
from support.kinds import KindOracle, make_kind
from support.live import until_idle

TEMPLATE = "{{ bos_token }}{% for m in messages %}<tool>{{ m.content }}</tool>{% endfor %}"
TEXT = "say <tool>cat</tool> again"
MESSAGES = [{"role": "user", "content": "a cat"}]
COUNT = 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """As a user makes it before training."""
    made = AutoTokenizer.from_pretrained(str(tiny_path()))
    made.add_tokens(["<tool>", "</tool>"])
    made.add_special_tokens({"additional_special_tokens": ["<hidden>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def directory(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA trained after resize_token_embeddings(len(tokenizer)), and the tokenizer beside it."""
    leaves = ["q_proj", "v_proj"]
    config = peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=leaves, modules_to_save=["embed_tokens", "lm_head"]
    )
    out = tmp_path_factory.mktemp("own") / "adapter"
    make_kind(tiny_path(), out, config, seed=3, std=0.2, vocabulary=len(tokenizer))
    tokenizer.save_pretrained(str(out))
    return out


@pytest.fixture(scope="module")
def oracle(directory: Path, tokenizer: Any) -> KindOracle:
    return KindOracle(tiny_path(), directory, len(tokenizer))


@pytest.fixture
def name(client: Client, server: LocalServer, directory: Path) -> Iterator[str]:
    client.push(directory, "own-text")
    yield "own-text"
    client.delete("own-text")
    until_idle(server)


OPTIONS: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": COUNT, "return_token_ids": True}


def test_texts_and_chats_are_answered_in_the_adapters_own_tokens(
    client: Client, name: str, tokenizer: Any, oracle: KindOracle
) -> None:
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for asked, text in (({"text": TEXT}, TEXT), ({"messages": MESSAGES}, rendered)):
        ids = client.tokenize(**asked, adapter=name)
        plain = tuple(tokenizer.encode(text, add_special_tokens=False))
        assert ids[-len(plain) :] == plain
        truth = oracle.truth(name, list(ids), COUNT).tokens
        choice = client.generate(**asked, adapter=name, **OPTIONS).choices[0]
        assert list(choice.token_ids) == truth
        before = tokenizer.decode(ids, skip_special_tokens=True)
        whole = tokenizer.decode([*ids, *truth], skip_special_tokens=True)
        assert choice.text == whole.removeprefix(before)
        streamed = "".join(part.text for part in client.stream(**asked, adapter=name, **OPTIONS))
        assert streamed == choice.text
        assert client.detokenize(truth, adapter=name) == tokenizer.decode(truth, skip_special_tokens=True)


def test_an_added_token_is_text_a_stop_string_and_a_stop_token(client: Client, name: str, tokenizer: Any) -> None:
    tool, hidden = (tokenizer.convert_tokens_to_ids(token) for token in ("<tool>", "<hidden>"))
    forced = {**OPTIONS, "logit_bias": {tool: 100.0}}
    assert client.generate(text="x", adapter=name, **{**forced, "max_tokens": 2}).choices[0].text == "<tool><tool>"
    stopped = client.generate(text="x", adapter=name, stop=["<tool>"], **forced).choices[0]
    assert (stopped.text, stopped.finish.stop_string) == ("", "<tool>")
    ended = client.generate(text="x", adapter=name, stop=["<hidden>"], **{**OPTIONS, "logit_bias": {hidden: 100.0}})
    assert ended.choices[0].finish.stop_token_id == hidden
    with pytest.raises(InvalidArgument, match="outside the vocabulary"):
        client.generate(text="x", logit_bias={len(tokenizer) - 1: 1.0})


def test_the_base_in_the_same_batch_says_what_it_says_alone(client: Client, name: str) -> None:
    options = {**OPTIONS, "logprobs": 2, "temperature": 1.0, "seed": 5, "top_p": 0.9}
    alone = client.generate(text=TEXT, **options).choices[0]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: client.generate(text=TEXT, adapter=name if i % 2 else "", **options), range(8)))
    for answer in found[::2]:
        assert answer.choices[0].token_ids == alone.token_ids
        assert answer.choices[0].text == alone.text
    assert {answer.choices[0].token_ids for answer in found[1::2]}.isdisjoint({alone.token_ids})


def test_what_it_brings_is_told_and_comes_back_byte_for_byte(
    client: Client, name: str, directory: Path, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = client.adapter(name)
    assert adapter.vocabulary == len(tokenizer)
    assert adapter.text_files == ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    client.pull(name, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (directory / path.name).read_bytes(), path.name
    assert (tmp_path / "again/tokenizer.json").exists()
    without = client.push(directory, "own-text-without", tokenizer=False)
    assert "tokenizer.json" in without.left_out
    assert without.adapter.digest != adapter.digest
    assert client.tokenize(text=TEXT, adapter="own-text-without") == client.tokenize(text=TEXT)
    client.delete("own-text-without")


def test_hostile_texts_harm_their_own_requests_alone(
    client: Client, directory: Path, adapter_dirs: dict[str, Path], tmp_path: Path, server: LocalServer
) -> None:
    for path in adapter_dirs["small"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(b"\xff nonsense")
    with pytest.raises(LoramuxError, match="not the base's tokenizer with added tokens"):
        client.push(tmp_path, "nonsense")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}")
    client.push(tmp_path, "looping")
    with ThreadPoolExecutor(4) as pool:
        looping = [pool.submit(client.generate, messages=MESSAGES, adapter="looping", **OPTIONS) for _ in range(3)]
        assert client.generate(messages=MESSAGES, adapter="small", **OPTIONS).choices[0].token_ids
        for future in looping:
            with pytest.raises(InvalidArgument, match="takes more than"):
                future.result()
    assert client.generate(text=TEXT, adapter="looping", **OPTIONS).choices[0].token_ids
    client.delete("looping")
    until_idle(server)
