"""Chats and completions into ids, cut where the server cuts, with templates that make it hard."""

from __future__ import annotations

from typing import Any

import pytest

from loramux_adapters.tokenization import PromptTokenizer
from loramux_trainer.data.examples import IGNORE, Example, ExampleEncoder
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.data.records import parse_record
from support.tiny import conversation
from support.tokenizers import FAMILIES, make_family

BOS, EOS = 1, 2
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}={% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
)
MARKS = PLAIN.replace("{{ m.content + eos_token }}", "{% generation %}{{ m.content + eos_token }}{% endgeneration %}")
# What was thought is not kept in earlier turns, as in Qwen3.
THINKING = (
    "{% for m in messages %}{{ m.role }}={% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
)
OPENED = PLAIN.replace(
    "{% if add_generation_prompt %}assistant={% endif %}",
    "{% if add_generation_prompt %}assistant=<think>\n{% endif %}",
)


def _tokenizer(family: str = "byte-level", template: str | None = None) -> Any:
    tokenizer = make_family(family)
    tokenizer.chat_template = template
    return tokenizer


def _encode(record: Any, tokenizer: Any, ends: frozenset[int] = frozenset({EOS})) -> tuple[Example, ...]:
    return ExampleEncoder(tokenizer, ends, len(tokenizer)).encode(parse_record(record))


def _chat(template: str, *messages: dict[str, Any], family: str = "byte-level", **others: Any) -> tuple[Example, ...]:
    return _encode({"messages": list(messages), **others}, _tokenizer(family, template))


def _learned(example: Example, tokenizer: Any) -> list[str]:
    """The runs of text with a loss."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_cut_where_the_server_ends_the_prompt(family: str) -> None:
    tokenizer = _tokenizer(family)
    prompts = PromptTokenizer(tokenizer)
    for prompt, completion in (("2+2=", "4"), ("a =", "= an"), ("hello ", "the cat")):
        [example] = _encode({"prompt": prompt, "completion": completion}, tokenizer)
        head = prompts.encode_prompt(prompt)
        assert list(example.ids[: len(head)]) == head
        assert set(example.labels[: len(head)]) == {IGNORE}
        tail = example.ids[len(head) :]
        assert tail[-1] == EOS
        assert prompts.output_text(head, tail[:-1]) == completion


def test_a_rendered_completion_has_one_bos_and_one_end() -> None:
    record = {"prompt": "<s><|user|>hello<|assistant|>", "completion": "the cat</s>"}
    [example] = _encode(record, _tokenizer("legacy-llama"))
    assert (example.ids.count(BOS), example.ids.count(EOS), example.ids[-1]) == (1, 1, EOS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [PLAIN, MARKS])
def test_tokens_that_would_merge_at_the_border_are_cut_there(family: str, template: str) -> None:
    """`==` is one token, and the server's prompt ends with the first half of it."""
    tokenizer = _tokenizer(family, template)
    chat = conversation("hello", "=4")
    [example] = _encode({"messages": chat}, tokenizer)
    prompts = PromptTokenizer(tokenizer)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    head = prompts.encode_rendered(prompt)
    whole = prompts.encode_rendered(tokenizer.apply_chat_template(chat, tokenize=False))
    assert whole[: len(head)] != head
    assert list(example.ids[: len(head)]) == head
    assert prompts.output_text(head, example.ids[len(head) : -1]) == "=4"
    assert example.labels == (*[IGNORE] * len(head), *example.ids[len(head) :])


@pytest.mark.parametrize("template", [PLAIN, MARKS])
def test_turns_share_one_sequence_and_weights_choose_among_them(template: str) -> None:
    tokenizer = _tokenizer(template=template)
    chat = [*conversation("hello", "the"), *conversation("cat", "an"), *conversation("an", "hello")]
    [whole] = _encode({"messages": chat}, tokenizer)
    assert _learned(whole, tokenizer) == ["the</s>", "an</s>", "hello</s>"]
    chat[1], chat[5] = {**chat[1], "weight": 0}, {**chat[5], "train": False}
    [some] = _encode({"messages": chat}, tokenizer)
    assert _learned(some, tokenizer) == ["an</s>"]
    assert some.ids == whole.ids[: len(some.ids)]


def test_turns_that_are_rendered_otherwise_later_have_a_sequence_each() -> None:
    tokenizer = _tokenizer(template=THINKING)
    chat = [*conversation("hello", "a</think>the"), *conversation("cat", "b</think>an")]
    first, second = _encode({"messages": chat}, tokenizer)
    assert tokenizer.decode(first.ids) == "user=hello\nassistant=a</think>the</s>"
    assert tokenizer.decode(second.ids) == "user=hello\nassistant=the</s>user=cat\nassistant=b</think>an</s>"
    assert (_learned(first, tokenizer), _learned(second, tokenizer)) == (["a</think>the</s>"], ["b</think>an</s>"])


def test_a_generation_prompt_that_opens_a_thought_must_be_answered_with_one() -> None:
    [example] = _chat(OPENED, *conversation("hello", "<think>\nan</think>the"))
    assert _learned(example, _tokenizer()) == ["an</think>the</s>"]
    with pytest.raises(RecordInvalid) as refused:
        _chat(OPENED, *conversation("hello", "the"))
    assert str(refused.value) == (
        "the chat template's generation prompt continues with '<think>\\n', but messages[1] is rendered with 'the</s>' "
        "there, which no request produces: begin the content with '<think>', or, where the template removes that, "
        "give this record as prompt and completion"
    )


def test_generation_marks_in_a_comment_are_none() -> None:
    commented = "{# wrap answers in {% generation %} blocks #}" + PLAIN
    assert _chat(commented, *conversation("hello", "the")) == _chat(PLAIN, *conversation("hello", "the"))


def test_a_turn_outside_of_every_generation_mark_is_refused() -> None:
    branch = PLAIN.replace(
        "{{ m.content + eos_token }}",
        "{% if m.name %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}",
    )
    with pytest.raises(RecordInvalid, match=r"messages\[1\] has nothing to learn: .*in a branch that this turn does"):
        _chat(branch, *conversation("hello", "the"))
    question, answer = conversation("hello", "the")
    [example] = _chat(branch, question, {**answer, "name": "me"})
    assert _learned(example, _tokenizer()) == ["the</s>"]


def test_a_mark_that_begins_before_the_answer_is_cut_to_it() -> None:
    wide = MARKS.replace(
        "{{ m.role }}={% if m.role == 'assistant' %}{% generation %}",
        "{% if m.role == 'assistant' %}{% generation %}assistant=",
    )
    wide = wide.replace("{% else %}", "{% else %}{{ m.role }}=")
    assert _chat(wide, *conversation("hello", "the")) == _chat(PLAIN, *conversation("hello", "the"))


def test_a_mark_over_a_part_of_the_answer_labels_that_part() -> None:
    part = PLAIN.replace(
        "{{ m.content + eos_token }}",
        "{{ m.content.split('|')[0] }}{% generation %}{{ m.content.split('|')[1] + eos_token }}{% endgeneration %}",
    )
    [example] = _chat(part, *conversation("hello", "cat|the"))
    assert _learned(example, _tokenizer()) == ["the</s>"]
    assert _tokenizer().decode(example.ids).endswith("assistant=catthe</s>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            PLAIN.replace("m.content + eos_token", "m.content + '<|user|>'"),
            r"messages\[1\] ends with <\|user\|>, at which the base does not stop \(it stops at </s> \(2\)\): "
            r"add its id 3 to eos_token_id in the base's generation_config\.json",
        ),
        (
            PLAIN.replace("m.content + eos_token", "m.content"),
            r"messages\[1\] is rendered without a token that ends it.* must write one of the base's end tokens "
            r"behind it \(</s> \(2\)\)",
        ),
        (
            MARKS.replace(
                "m.content + eos_token }}{% endgeneration %}", "m.content }}{% endgeneration %}{{ eos_token }}"
            ),
            r"messages\[1\] ends with the base's end token, but outside of the chat template's \{% generation %\}",
        ),
    ],
)
def test_an_end_that_is_not_learned_is_refused_with_what_to_change(template: str, says: str) -> None:
    with pytest.raises(RecordInvalid, match=says):
        _chat(template, *conversation("hello", "the"))


def test_an_end_token_of_the_generation_config_is_enough() -> None:
    tokenizer = _tokenizer(template=PLAIN.replace("m.content + eos_token", "m.content + '<|user|>'"))
    [example] = _encode({"messages": conversation("hello", "the")}, tokenizer, frozenset({EOS, 3}))
    assert example.labels[-1] == 3


def test_tools_and_reasoning_reach_the_text_or_are_refused() -> None:
    question, answer = conversation("hello", "the")
    tools = [{"type": "function", "function": {"name": "catcher"}}]
    using = "{% if tools %}{{ tools[0].function.name }}\n{% endif %}" + PLAIN.replace(
        "{{ m.content + eos_token }}", "{{ m.reasoning_content or '' }}{{ m.content + eos_token }}"
    )
    tokenizer = _tokenizer(template=using)
    record = {"messages": [question, {**answer, "reasoning_content": "an"}], "tools": tools}
    [example] = _encode(record, tokenizer)
    assert tokenizer.decode(example.ids).startswith("catcher\n")
    assert _learned(example, tokenizer) == ["anthe</s>"]
    with pytest.raises(RecordInvalid, match="tools: the base's chat template does not use them"):
        _chat(PLAIN, question, answer, tools=tools)
    with pytest.raises(RecordInvalid, match=r"messages\[1\]\.reasoning_content: the base's chat template does not use"):
        _chat(PLAIN, question, {**answer, "reasoning_content": "an"})
    with pytest.raises(RecordInvalid, match=r"messages\[1\]\.tool_calls: the base's chat template does not use it"):
        _chat(PLAIN, question, {**answer, "tool_calls": [{"type": "function"}]})


def test_an_id_that_the_model_lacks_is_refused_by_its_text() -> None:
    tokenizer = _tokenizer()
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    encoder = ExampleEncoder(tokenizer, frozenset({EOS}), vocabulary)
    with pytest.raises(RecordInvalid, match=rf"'\[PAD\]' is token id {vocabulary} at position 2, .* of {vocabulary}"):
        encoder.encode(parse_record({"prompt": "=[PAD]", "completion": "an"}))
    assert encoder.encode(parse_record({"prompt": "=", "completion": "an"}))
