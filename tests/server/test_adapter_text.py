"""Tokenizers and chat templates that adapters bring: what they add is used, whatever else they are is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from loramux_adapters.adapter_files import TEXT_FILES
from loramux_adapters.errors import AdapterError, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.spec import AdapterSpec
from loramux_server.text.adapter_text import AdapterTexts, AdapterTokenizer, Kept
from loramux_server.text.chat_faults import ChatRefused
from loramux_server.text.template_sandbox import _Child
from loramux_server.text.tokenizer import TextTokenizer
from support.tokenizers import CHAT_TEMPLATE, write_byte_level

SPEC = AdapterSpec("d" * 64, "lora", None, False, {}, frozenset(), 0)
MESSAGES = [{"role": "user", "content": "hi <tool>cat</tool>"}]
OWN_TEMPLATE = "{{ bos_token }}{% for m in messages %}<tool>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("base"), words=("Ġcat",), eos=[1, 4])


@pytest.fixture(scope="module")
def texts(directory: Path) -> Iterator[AdapterTexts]:
    made = AdapterTexts(TextTokenizer.load(directory), ReadLimits())
    yield made
    made.close()


def save(directory: Path, out: Path, change: Callable[[Any], object] = lambda _: None) -> Path:
    """What `save_pretrained` writes beside an adapter after `change`."""
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    change(tokenizer)
    tokenizer.save_pretrained(str(out))
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in TEXT_FILES if (directory / name).exists()}


def made_of(texts: AdapterTexts, files: Mapping[str, bytes]) -> TextTokenizer:
    """As a request gets it."""
    spec = replace(SPEC, text_files=tuple((name, str(hash(data))) for name, data in sorted(files.items())))

    async def read() -> Mapping[str, bytes]:
        return files

    return asyncio.run(texts.tokenizer_of(spec, read))


def add_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    tokenizer.chat_template = OWN_TEMPLATE


def test_the_bases_own_files_are_its_own_tokenizer(texts: AdapterTexts, directory: Path, tmp_path: Path) -> None:
    """What trl saves beside every adapter costs nothing."""
    base = made_of(texts, {})
    assert made_of(texts, files_of(save(directory, tmp_path))) is base
    assert made_of(texts, files_of(directory)) is base


def test_added_tokens_are_encoded_and_decoded_as_transformers_does(
    texts: AdapterTexts, directory: Path, tmp_path: Path
) -> None:
    own = save(directory, tmp_path, add_tokens)
    truth = AutoTokenizer.from_pretrained(str(own))
    made = made_of(texts, files_of(own))
    text = "a cat <tool>naïve</tool> <stop>"
    ids = made.encode(text)
    assert ids[1:] == truth.encode(text, add_special_tokens=False)
    assert {truth.convert_tokens_to_ids(token) for token in ("<tool>", "</tool>", "<stop>")} <= set(ids)
    assert made.decode(ids) == truth.decode(ids, skip_special_tokens=True)
    assert made.special_tokens["<stop>"] == truth.eos_token_id
    assert made.eos_token_ids == {1, 4, truth.eos_token_id}
    rendered = truth.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert made.render_chat(MESSAGES) == rendered
    assert made.encode_chat(MESSAGES) == truth.encode(rendered, add_special_tokens=False)


def test_the_base_knows_nothing_of_it(texts: AdapterTexts, directory: Path, tmp_path: Path) -> None:
    base = made_of(texts, {})
    before = base.encode("<tool>"), base.render_chat(MESSAGES[:1]), base.vocab_size, base.eos_token_ids
    made = made_of(texts, files_of(save(directory, tmp_path, add_tokens)))
    assert made.encode("<tool>") != before[0]
    assert (base.encode("<tool>"), base.render_chat(MESSAGES[:1]), base.vocab_size, base.eos_token_ids) == before


def test_a_template_alone_and_tokens_alone_leave_the_other_to_the_base(
    texts: AdapterTexts, directory: Path, tmp_path: Path
) -> None:
    base = made_of(texts, {})
    template = made_of(texts, {"chat_template.jinja": b"{{ messages[0].content }}!"})
    assert template.render_chat(MESSAGES) == MESSAGES[0]["content"] + "!"
    assert template.encode("a cat") == base.encode("a cat")
    own = files_of(save(directory, tmp_path, lambda tokenizer: tokenizer.add_tokens(["<tool>"])))
    tokens = made_of(texts, {"tokenizer.json": own["tokenizer.json"]})
    assert tokens.render_chat(MESSAGES) == base.render_chat(MESSAGES)
    assert tokens.encode("<tool>") != base.encode("<tool>")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def edit(files: dict[str, bytes]) -> dict[str, bytes]:
        found = json.loads(files["tokenizer.json"])
        change(found)
        return {**files, "tokenizer.json": json.dumps(found).encode()}

    return edit


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: {**files, name: data}


def rename_a_token(found: dict[str, Any]) -> None:
    found["added_tokens"][0]["content"] = "<|other|>"


def swap_two_pieces(found: dict[str, Any]) -> None:
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def a_hanging_expression(found: dict[str, Any]) -> None:
    found["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def added(**entry: object) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["added_tokens"].append({"id": 900, "content": "<x>", "special": False} | entry)


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "no json": (put("tokenizer.json", b"\xff\xfenonsense"), "cannot be read"),
    "no object": (put("tokenizer.json", b"[1, 2]"), "no JSON object"),
    "deep": (put("tokenizer.json", b"[" * 200_000), "cannot be read"),
    "another token for an id": (edited(rename_a_token), "is '<|other|>', the base's '<|bos|>'"),
    "a token is gone": (edited(lambda found: found["added_tokens"].pop(0)), "lacks the base's token"),
    "two pieces swapped": (edited(swap_two_pieces), "'model' is not the base's"),
    "a regular expression": (edited(a_hanging_expression), "'pre_tokenizer' is not the base's"),
    "an unknown section": (edited(lambda found: found.update(extra=[1])), "'extra' is not the base's"),
    "a gap": (edited(added()), "is id 900, and added to the base's it would be"),
    "an id of text": (edited(added(id="1")), "is no token"),
    "a negative id": (edited(added(id=-1)), "is no token"),
    "an id of 2^31": (edited(added(id=1 << 31)), "is no token"),
    "a long token": (edited(added(content="x" * 600)), "is no token"),
    "two for an id": (edited(lambda found: (added()(found), added(content="<y>")(found))), "has two tokens"),
    "no list": (edited(lambda found: found.update(added_tokens=3)), "are no list"),
    "a role of no token": (put("tokenizer_config.json", b'{"eos_token": "<nowhere>"}'), "is no token of the base"),
    "a template of no text": (put("chat_template.jinja", b"\xff\xfe"), "not UTF-8"),
    "a config of nonsense": (put("tokenizer_config.json", b"nonsense"), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_the_bases_with_added_tokens_is_refused(
    texts: AdapterTexts, directory: Path, tmp_path: Path, name: str
) -> None:
    """At the upload, and by whatever server it comes to later."""
    change, words = HOSTILE[name]
    files = change(files_of(save(directory, tmp_path)))
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    for judge in (lambda: texts.check({file: tmp_path / file for file in files}), lambda: made_of(texts, files)):
        with pytest.raises(AdapterError) as caught:
            judge()
        assert words in str(caught.value)
    assert made_of(texts, {}).encode("a cat")  # the others are served as before


def test_a_refusal_says_how_to_serve_the_adapter(texts: AdapterTexts, directory: Path, tmp_path: Path) -> None:
    files = edited(swap_two_pieces)(files_of(save(directory, tmp_path)))
    with pytest.raises(AdapterError) as caught:
        made_of(texts, files)
    assert "send token ids" in caught.value.remedy


def test_more_tokens_than_may_be_added_are_refused(directory: Path, tmp_path: Path) -> None:
    texts = AdapterTexts(TextTokenizer.load(directory), ReadLimits(max_added_tokens=2))
    own = files_of(save(directory, tmp_path, lambda tokenizer: tokenizer.add_tokens(["<1>", "<2>", "<3>"])))
    with pytest.raises(AdapterError, match="adds 3 tokens, of at most 2"):
        made_of(texts, own)
    texts.close()


LOOPS = {
    "time": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "memory": "{{ ('x' * 3000000000) | length }}",
    "one operation": "{% set ten = messages | length * 10 %}{{ ten ** (10 ** 8) % 7 }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_template_that_takes_too_much_harms_itself_alone(
    texts: AdapterTexts, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = made_of(texts, {"chat_template.jinja": LOOPS[kind].encode()})
    good = made_of(texts, {"chat_template.jinja": b"{{ messages[0].content }}"})
    with pytest.raises(ChatRefused, match="takes more than 2 s of processor time or 256 MiB"):
        bad.render_chat(MESSAGES)
    assert good.render_chat(MESSAGES) == MESSAGES[0]["content"]
    monkeypatch.setattr(_Child, "ask", lambda *_: pytest.fail("it is run again"))
    with pytest.raises(ChatRefused, match="takes more than"):
        bad.render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['nothing']['there'] }}", "it failed on these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "it failed on these messages"),
        ("{% include '/etc/passwd' %}", "it failed on these messages"),
    ],
)
def test_a_template_that_fails_says_what_is_for_the_caller(texts: AdapterTexts, template: str, words: str) -> None:
    with pytest.raises(ChatRefused, match=words):
        made_of(texts, {"chat_template.jinja": template.encode()}).render_chat(MESSAGES)


def test_one_that_takes_too_much_to_compile_is_refused_at_upload(texts: AdapterTexts, tmp_path: Path) -> None:
    """Jinja computes what is constant when it compiles."""
    (tmp_path / "chat_template.jinja").write_text("{{ 10 ** (10 ** 8) % 7 }}")
    with pytest.raises(AdapterInvalid, match=r"cannot be compiled: .*takes more than 2 s"):
        texts.check({"chat_template.jinja": tmp_path / "chat_template.jinja"})


@pytest.mark.parametrize("most", [None, 4, 5])
def test_what_a_template_makes_of_little_is_bounded(texts: AdapterTexts, most: int | None) -> None:
    made = made_of(texts, {"chat_template.jinja": b"{{ 'a' * 5 }}"})
    if most == 4:
        with pytest.raises(ChatRefused, match="the template makes 5 characters of them, which no context holds"):
            made.encode_chat(MESSAGES, (), most)
    else:
        assert made.encode_chat(MESSAGES, (), most)


def test_a_tokenizer_with_more_tokens_is_made_without_going_through_the_bases(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would hold the interpreter meanwhile, and every stream: half a second for 128,000 tokens.

    So the model is shared, and what is asked of a tokenizer while requests run is kept.
    """
    base = TextTokenizer.load(directory)
    texts = AdapterTexts(base, ReadLimits())
    tokens = [AddedToken(f"<t{number}>", special=number % 2 == 0) for number in range(50)]
    saved = save(directory, tmp_path / "own", methodcaller("add_tokens", tokens))
    truth = AutoTokenizer.from_pretrained(str(saved))
    kind, asked = type(base._tokenizer), list[str]()
    for slow in ("get_vocab", "add_tokens", "__len__"):
        monkeypatch.setattr(kind, slow, lambda *_, name=slow: asked.append(name))
    for slow in ("added_tokens_decoder", "added_tokens_encoder", "vocab"):
        monkeypatch.setattr(kind, slow, property(lambda _, name=slow: asked.append(name)))
    made = made_of(texts, files_of(saved))
    text = "a<t0> b<t49>"
    ids = made.encode(text)
    assert made.token_bytes(base.vocab_size + 1) == b"<t1>"
    assert made.vocab_size == base.vocab_size + 50
    assert "<t0>" not in made.decode(ids)
    assert not asked
    monkeypatch.undo()
    assert ids[1:] == truth.encode(text, add_special_tokens=False)
    assert made.decode(ids) == truth.decode(ids, skip_special_tokens=True)
    assert made._tokenizer.backend_tokenizer.to_str() == truth.backend_tokenizer.to_str()
    assert "<t0>" not in base._tokenizer.get_vocab()
    model = base._tokenizer.backend_tokenizer.model
    model.dropout = 0.5
    assert made._tokenizer.backend_tokenizer.model.dropout == 0.5  # one and the same
    texts.close()


@pytest.mark.parametrize(("count", "width"), [((1 << 14) + 1, 6), (1024, 129)])
def test_more_tokens_than_can_be_added_quickly_are_refused(
    count: int, width: int, texts: AdapterTexts, directory: Path
) -> None:
    own = json.loads((directory / "tokenizer.json").read_text())
    entry = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    first = len(own["model"]["vocab"])
    own["added_tokens"] += [{"id": first + i, "content": f"{i:0{width}}", **entry} for i in range(count)]
    with pytest.raises(AdapterError, match=f"{count} tokens, of at most|{count * width} characters, of at most"):
        made_of(texts, {"tokenizer.json": json.dumps(own).encode()})


def test_half_a_character_is_no_template_and_no_text(texts: AdapterTexts, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
    with pytest.raises(AdapterInvalid, match="the chat template cannot be compiled"):
        texts.check({"tokenizer_config.json": tmp_path / "tokenizer_config.json"})
    made = made_of(texts, {"chat_template.jinja": b"{{ '\\ud800' }}"})
    with pytest.raises(ChatRefused, match="it failed on these messages"):
        made.render_chat(MESSAGES)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": ["x"], "template": "y"}]}')
    texts.check({"tokenizer_config.json": tmp_path / "tokenizer_config.json"})


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages", "{% macro x() %}", "{{ 1 | nofilter }}"])
def test_what_is_no_template_is_refused_at_upload(texts: AdapterTexts, tmp_path: Path, template: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(f"{{# a line #}}\n{template}")
    with pytest.raises(AdapterInvalid, match=r"chat_template.jinja: the chat template cannot be compiled: .*line 2"):
        texts.check({"chat_template.jinja": tmp_path / "chat_template.jinja"})


def test_what_is_built_is_kept_within_a_bound(directory: Path, tmp_path: Path) -> None:
    """Each takes 4 KiB an added token, the base's included; a template alone takes next to nothing."""
    base = TextTokenizer.load(directory)
    texts = AdapterTexts(base, ReadLimits(), kept_bytes=4096 * (len(base.special_tokens) + 1) * 3)
    owns = [
        files_of(save(directory, tmp_path / token, methodcaller("add_tokens", [f"<{token}>"])))
        for token in ("a", "b", "c", "d", "e")
    ]
    made = [made_of(texts, own) for own in owns]
    assert all(isinstance(each, AdapterTokenizer) for each in made)
    assert len(texts._kept) == 2
    assert made_of(texts, owns[4]) is made[4]
    assert made_of(texts, owns[0]) is not made[0]
    templates = [made_of(texts, {"chat_template.jinja": f"{number}".encode()}) for number in range(20)]
    assert len(texts._kept) == 22
    assert templates[3]._tokenizer is base._tokenizer
    texts.close()


def test_another_behavior_than_the_bases_is_refused(directory: Path) -> None:
    base = write_byte_level(directory.parent / "behavior")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": False}))
    texts = AdapterTexts(TextTokenizer.load(base), ReadLimits())
    same = made_of(texts, {"tokenizer_config.json": b'{"add_prefix_space": false, "name_or_path": "elsewhere"}'})
    assert same is made_of(texts, {})
    with pytest.raises(AdapterError, match="add_prefix_space is True, the base's False"):
        made_of(texts, {"tokenizer_config.json": b'{"add_prefix_space": true}'})
    texts.close()


def test_what_is_put_again_counts_once() -> None:
    kept: Kept[str, int] = Kept(10)
    for value in range(5):
        kept.put("a", value, 6)
    kept.put("b", 1, 4)
    assert (kept.get("a"), kept.get("b")) == (4, 1)
    kept.put("c", 2, 1)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (None, 1, 2)


def test_a_role_alone_reaches_the_bases_template_and_ends_answers(directory: Path) -> None:
    base = TextTokenizer.load(write_byte_level(directory.parent / "roles", chat_template="x{{ eos_token }}"))
    texts = AdapterTexts(base, ReadLimits())
    made = made_of(texts, {"tokenizer_config.json": b'{"eos_token": {"content": "<|user|>"}}'})
    assert made.render_chat(MESSAGES) == "x<|user|>"
    assert base.render_chat(MESSAGES) != "x<|user|>"
    assert made.eos_token_ids == base.eos_token_ids | {base.find_id("<|user|>")}
    texts.close()


def test_a_request_that_is_cancelled_leaves_the_build_to_the_next(texts: AdapterTexts) -> None:
    """What the first one holds of the store is gone with it."""
    spec = replace(SPEC, text_files=(("chat_template.jinja", "cancelled"),))

    async def never() -> Mapping[str, bytes]:
        await asyncio.Event().wait()
        raise AssertionError

    async def read() -> Mapping[str, bytes]:
        return {"chat_template.jinja": b"{{ 1 + 1 }}"}

    async def run() -> TextTokenizer:
        first = asyncio.create_task(texts.tokenizer_of(spec, never))
        await asyncio.sleep(0)
        second = asyncio.create_task(texts.tokenizer_of(spec, read))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(run()).render_chat(MESSAGES) == "2"


def test_the_base_template_is_no_template_of_its_own(texts: AdapterTexts) -> None:
    assert made_of(texts, {"chat_template.jinja": CHAT_TEMPLATE.encode()}) is made_of(texts, {})
