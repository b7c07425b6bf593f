"""Records into units: masks, pairs and labels, what is too long, and packs whose rows never see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_trainer.data.examples import IGNORE, Example, ExampleEncoder, Unit
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.data.records import parse_record
from loramux_trainer.data.units import check_options, encode_units, fit, is_endless, pack, packed
from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import SFT, LossConfig
from support.tiny import conversation, tiny_encoder
from support.tokenizers import make_family

DPO, KTO = LossConfig("dpo"), LossConfig("kto")
WEIGHED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "c", "weight": 0},
    *conversation("d", "e"),
]


def _data(**options: Any) -> DataConfig:
    return DataConfig(Path("t.jsonl"), **options)


def _encode(value: Any, tokenizer: Any, loss: LossConfig = SFT, **options: Any) -> tuple[Unit, ...]:
    data = _data(**options)
    return encode_units(parse_record(value, data), tiny_encoder(tokenizer), data, loss)


def _learned(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE]))


def test_a_pair_is_one_unit_of_two_rows_with_one_prompt(tokenizer: Any) -> None:
    for value in (
        {"prompt": "ab ", "chosen": "cd", "rejected": "efg"},
        {"chosen": conversation("ab", "cd"), "rejected": conversation("ab", "efg")},
    ):
        [unit] = _encode(value, tokenizer, DPO)
        assert [_learned(row, tokenizer) for row in unit.rows] == ["cd<|end|>", "efg<|end|>"]
        prompts = [row.ids[: row.labels.count(IGNORE)] for row in unit.rows]
        assert prompts[0] == prompts[1]
        assert unit.label is None
        assert (unit.tokens, unit.supervised) == (sum(len(row.ids) for row in unit.rows), 3 + 4)
        assert unit.longest == len(unit.rows[1].ids)


def test_kto_takes_a_pair_as_two_answers(tokenizer: Any) -> None:
    pair = {"prompt": "ab ", "chosen": "cd", "rejected": "efg"}
    good, bad = _encode(pair, tokenizer, KTO)
    [both] = _encode(pair, tokenizer, DPO)
    assert (good.rows + bad.rows, good.label, bad.label) == (both.rows, True, False)
    [judged] = _encode({"prompt": "ab ", "completion": "efg", "label": False}, tokenizer, KTO)
    assert judged == bad


def test_answers_that_become_the_same_tokens_are_no_pair(tokenizer: Any) -> None:
    with pytest.raises(RecordInvalid, match="chosen and rejected are the same tokens"):
        _encode({"prompt": "ab ", "chosen": "cd", "rejected": "cd<|end|>"}, tokenizer, DPO)


def test_what_is_wrong_with_an_answer_names_it(tokenizer: Any) -> None:
    chat = conversation("ab", "cd")
    value = {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{**chat[1], "reasoning_content": "x"}]}
    with pytest.raises(RecordInvalid, match=r"rejected: messages\[1\]\.reasoning_content: the base's chat template"):
        _encode(value, tokenizer, DPO)


def test_an_answer_of_several_sequences_cannot_be_compared(tokenizer: Any) -> None:
    kept = tokenizer.chat_template
    long = [*conversation("ab", "cd")[1:], *conversation("ef", "gh")]
    value = {"prompt": conversation("ab"), "chosen": long, "rejected": long[:1]}
    assert len(_encode(value, tokenizer, DPO)) == 1
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last else '-' }}<|end|>{% endfor %}"
        )
        with pytest.raises(RecordInvalid, match="chosen: the chat template renders earlier turns in another way"):
            _encode(value, tokenizer, DPO)
    finally:
        tokenizer.chat_template = kept


def test_prompts_are_learned_where_the_job_wants_it(tokenizer: Any) -> None:
    completion = {"prompt": "ab ", "completion": "cd"}
    [unit] = _encode(completion, tokenizer, completion_only_loss=False)
    assert unit.rows[0].labels == unit.rows[0].ids
    assert _encode(completion, tokenizer, completion_only_loss=True) == _encode(completion, tokenizer)
    chat = {"messages": [*conversation("ab", "cd"), *conversation("ef", "gh")]}
    [unit] = _encode(chat, tokenizer, assistant_only_loss=False)
    assert unit.rows[0].labels == unit.rows[0].ids
    assert unit.rows[0].ids == _encode(chat, tokenizer)[0].rows[0].ids
    assert _encode(chat, tokenizer, assistant_only_loss=True) == _encode(chat, tokenizer)


@pytest.mark.parametrize(
    ("value", "options", "says"),
    [
        ({"prompt": "a", "completion": "b"}, {"assistant_only_loss": True}, "assistant_only_loss is for messages"),
        ({"messages": conversation("a", "b")}, {"completion_only_loss": False}, "messages have assistant_only_loss"),
        ({"input_ids": [1, 2]}, {"completion_only_loss": True}, "token ids have their labels"),
        ({"input_ids": [1, 2]}, {"assistant_only_loss": False}, "token ids have their labels"),
        ({"messages": WEIGHED}, {"assistant_only_loss": False}, "a turn has weight 0"),
    ],
)
def test_a_mask_that_a_record_does_not_have_is_refused(
    tokenizer: Any, value: Any, options: dict[str, bool], says: str
) -> None:
    with pytest.raises(RecordInvalid, match=says):
        _encode(value, tokenizer, **options)


@pytest.mark.parametrize("option", [{"packing": True}, {"completion_only_loss": False}, {"assistant_only_loss": True}])
@pytest.mark.parametrize("loss", [DPO, KTO, LossConfig("orpo")])
def test_options_of_sft_are_refused_with_other_losses(
    tokenizer: Any, option: dict[str, bool], loss: LossConfig
) -> None:
    [key] = option
    with pytest.raises(JobInvalid, match=rf"data\.{key}: is not read by loss {loss.name}"):
        check_options(_data(**option), loss, tiny_encoder(tokenizer))
    check_options(_data(**option), SFT, tiny_encoder(tokenizer))
    check_options(_data(), loss, tiny_encoder(tokenizer))


def test_marks_that_a_template_does_not_have_are_refused(tokenizer: Any) -> None:
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = kept.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        with pytest.raises(JobInvalid, match=r"data\.assistant_only_loss: the base's chat template has no "):
            check_options(_data(assistant_only_loss=True), SFT, tiny_encoder(tokenizer))
        check_options(_data(assistant_only_loss=False), SFT, tiny_encoder(tokenizer))
    finally:
        tokenizer.chat_template = kept


def test_plain_text_has_one_begin_and_one_end(tokenizer: Any) -> None:
    [unit] = _encode({"text": "ab"}, tokenizer)
    assert tokenizer.decode(unit.rows[0].ids) == "<|bos|>ab<|end|>"
    assert _learned(unit.rows[0], tokenizer) == "ab<|end|>"


def test_token_ids_are_checked(tokenizer: Any) -> None:
    a, end, bos = tokenizer.encode("a")[-1], tokenizer.eos_token_id, tokenizer.bos_token_id
    [unit] = _encode({"input_ids": [bos, a, a, end], "labels": [IGNORE, IGNORE, a, end]}, tokenizer)
    assert unit.rows == (Example((bos, a, a, end), (IGNORE, IGNORE, a, end)),)
    for value, says in (
        ({"input_ids": [a, a, end], "labels": [IGNORE, a, IGNORE]}, "carries no loss there, so that the end would not"),
        ({"input_ids": [a, a], "labels": [IGNORE] * 2}, "no token of the record carries a loss"),
        ({"input_ids": [a], "labels": [a]}, "no token of the record carries a loss"),  # the first is never predicted
        ({"input_ids": [bos, bos, a, end]}, r"begins with <\|bos\|> twice"),
        ({"input_ids": [a, len(tokenizer)]}, "outside the model's vocabulary"),
    ):
        with pytest.raises(RecordInvalid, match=says):
            _encode(value, tokenizer)
    [endless] = _encode({"input_ids": [bos, a, a]}, tokenizer)
    assert is_endless(endless, tiny_encoder(tokenizer))


@pytest.mark.parametrize("record", [{"prompt": "<s><s>hello ", "completion": "the"}, {"text": "<s><s>the cat"}])
def test_a_doubled_begin_is_refused_and_a_single_one_is_not(record: Any) -> None:
    tokenizer = make_family("legacy-llama")
    encoder = ExampleEncoder(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    with pytest.raises(RecordInvalid, match="begins with <s> twice, which no request does"):
        encoder.encode(parse_record(record))
    once = {key: text.replace("<s><s>", "<s>") for key, text in record.items()}
    none = {key: text.replace("<s><s>", "") for key, text in record.items()}
    for value in (once, none):
        [example] = encoder.encode(parse_record(value))
        assert example.ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_writes_the_begin_twice_is_refused(tokenizer: Any) -> None:
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ bos_token }}" + kept
        with pytest.raises(RecordInvalid, match=r"begins with <\|bos\|> twice"):
            _encode({"messages": conversation("ab", "cd")}, tokenizer)
    finally:
        tokenizer.chat_template = kept


def test_a_unit_that_is_too_long_goes_as_a_whole(tokenizer: Any) -> None:
    [unit] = _encode({"prompt": "ab", "chosen": "c", "rejected": "much longer"}, tokenizer, DPO)
    assert fit(unit, _data(max_length=unit.longest)) == (unit, False)
    assert fit(unit, _data(max_length=8)) == (None, True)
    cut, was_longer = fit(unit, _data(max_length=8, truncation="truncate"))
    assert was_longer
    assert cut is not None
    assert cut.rows == (unit.rows[0], unit.rows[1].truncated(8))
    assert is_endless(cut, tiny_encoder(tokenizer))
    [alike] = _encode({"prompt": "ab", "chosen": "much longer", "rejected": "much later"}, tokenizer, DPO)
    assert fit(alike, _data(max_length=6, truncation="truncate")) == (None, True)  # the same to there
    [judged] = _encode({"prompt": "ab", "completion": "longer than eight", "label": True}, tokenizer, KTO)
    cut, _ = fit(judged, _data(max_length=8, truncation="truncate"))
    assert cut is not None
    assert (cut.label, cut.longest) == (True, 8)


@given(lengths=st.lists(st.integers(1, 40), max_size=60))
def test_packs_hold_each_unit_once_and_no_more_than_fits(lengths: list[int]) -> None:
    packs = pack(lengths, 40)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in members) for members in packs]
    assert all(total <= 40 for total in sums)
    assert sum(total <= 20 for total in sums) <= 1, "two packs would have fitted into one"
    assert list(packs) == sorted(packs)


def test_best_fit_takes_the_fullest_pack_with_room() -> None:
    assert pack([6, 5, 4, 3], 10) == ((0, 2), (1, 3))
    assert pack([5, 7, 2, 3], 10) == ((0, 2), (1, 3))


def test_a_pack_keeps_its_rows_apart(tokenizer: Any) -> None:
    units = [unit for text in ("a", "bb", "ccc") for unit in _encode({"text": text}, tokenizer)]
    data = _data(max_length=8, packing=True)
    assert packed(units, _data(max_length=8)) == tuple(units)
    assert packed(units, data) == (Unit((units[0].rows[0], units[2].rows[0])), Unit(units[1].rows))
