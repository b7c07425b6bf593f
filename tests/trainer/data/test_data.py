"""Records into tokens and labels: what carries a loss, what is refused, what the report counts."""

from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.dataset import load_data
from loramux_trainer.data.examples import IGNORE, Example, ExampleEncoder
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.data.records import parse_record
from loramux_trainer.errors import DataInvalid, JobInvalid, SeveralInvalid
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import LossConfig
from support.tiny import conversation, tiny_encoder, write_jsonl


def _encode(record: Any, tokenizer: Any) -> Example:
    [example] = tiny_encoder(tokenizer).encode(parse_record(record))
    return example


def _supervised_text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE]))


def test_completion_carries_the_loss_and_its_end(tokenizer: Any) -> None:
    example = _encode({"prompt": "two plus two: ", "completion": "four"}, tokenizer)
    assert tokenizer.decode(example.ids) == "<|bos|>two plus two: four<|end|>"
    assert _supervised_text(example, tokenizer) == "four<|end|>"
    assert example.supervised == 5
    assert example.ids[: -example.supervised] == tuple(tokenizer.encode("two plus two: "))


def test_only_assistant_turns_carry_the_loss(tokenizer: Any) -> None:
    chat = [*conversation("ab", "cd", system="be brief"), *conversation("ef", "gh")]
    example = _encode({"messages": chat}, tokenizer)
    assert list(example.ids) == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert _supervised_text(example, tokenizer) == "cd<|end|>gh<|end|>"


def test_a_template_without_generation_marks_gives_the_same_labels(tokenizer: Any) -> None:
    chat = [*conversation("ab", "cd", system="be brief"), *conversation("ef", "gh")]
    marked = _encode({"messages": chat}, tokenizer)
    template = tokenizer.chat_template
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert plain != template
    try:
        tokenizer.chat_template = plain
        assert _encode({"messages": chat}, tokenizer) == marked
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            "is rendered without a token that ends it",
        ),
        (
            "{% for m in messages %}{{ m['content'] if loop.last else '-' }}<|end|>{% endfor %}",
            "in another way once that turn follows them",
        ),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refused: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "the chat template refused"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_cannot_be_learned_from_are_refused(tokenizer: Any, template: str | None, says: str) -> None:
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        with pytest.raises(RecordInvalid, match=says):
            _encode({"messages": [*conversation("ab", "cd"), *conversation("ef", "gh")]}, tokenizer)
    finally:
        tokenizer.chat_template = kept


def test_an_assistant_who_speaks_first_needs_generation_marks(tokenizer: Any) -> None:
    chat = [{"role": "assistant", "content": "hi"}, *conversation("ab", "cd")]
    assert _supervised_text(_encode({"messages": chat}, tokenizer), tokenizer) == "hi<|end|>cd<|end|>"
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = kept.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        with pytest.raises(RecordInvalid, match="the first message is the assistant's"):
            _encode({"messages": chat}, tokenizer)
    finally:
        tokenizer.chat_template = kept


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"prompt": "a"}', "either messages, or prompt and completion"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"prompt": "a", "completion": 1}', "must be strings"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "user"}]}', "needs a role and a content"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "must be one of system"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "last message must be the assistant's"),
        ('{"prompt": "a\\ud83d", "completion": "b"}', r"prompt has half a character at position 1: \\ud83d"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "b"}]}', "half a c"),
        ('{"messages": [{"role": "user", "content": "a", "name": "\\ud83d"}]}', r"messages\[0\].name has half"),
        ("[" * 100_000, "not JSON that can be read"),
        ("9" * 5000, "not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(DataInvalid, match=says) as caught:
        load_data(DataConfig(path), tiny_encoder(tokenizer), seed=0)
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "has no record"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read")]
)
def test_a_bad_file_is_named(tmp_path: Path, tokenizer: Any, content: bytes | None, says: str) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataInvalid, match=says):
        load_data(DataConfig(path), tiny_encoder(tokenizer), seed=0)


def _completions(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": "p", "completion": text} for text in texts]


def test_report_counts_duplicates_leaks_and_masked_tokens(tmp_path: Path, tokenizer: Any) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", _completions("a", "b", "a", "c"))
    held = write_jsonl(tmp_path / "e.jsonl", _completions("c", "d"))
    encoder = tiny_encoder(tokenizer)
    data = load_data(DataConfig(train, held), encoder, seed=0)
    report = data.report
    assert (report.records, report.train, report.duplicates, report.eval, report.leaked) == (4, 3, 1, 1, 1)
    assert (report.tokens, report.masked, report.longest) == (12, 6, 4)  # <bos> p | x <end>, three times
    kept = load_data(DataConfig(train, held, keep_duplicates=True), encoder, seed=0)
    assert kept.report.train == 4
    assert kept.digest != data.digest


def test_examples_that_are_too_long_are_dropped_or_truncated(tmp_path: Path, tokenizer: Any) -> None:
    train = write_jsonl(
        tmp_path / "t.jsonl", [*_completions("short", "much longer"), {"prompt": "p" * 20, "completion": "x"}]
    )
    encoder = tiny_encoder(tokenizer)
    dropped = load_data(DataConfig(train, max_length=8), encoder, seed=0)
    assert (dropped.report.train, dropped.report.too_long) == (1, 2)
    truncated = load_data(DataConfig(train, max_length=8, truncation="truncate"), encoder, seed=0)
    assert [unit.tokens for unit in truncated.train] == [8, 8]  # the long prompt has no loss left
    with pytest.raises(DataInvalid, match="no record is left"):
        load_data(DataConfig(train, max_length=3), encoder, seed=0)
    held = write_jsonl(tmp_path / "e.jsonl", _completions("a much longer one"))
    with pytest.raises(DataInvalid, match=r"e\.jsonl: no record is left to evaluate on: 1 are longer"):
        load_data(DataConfig(train, held, max_length=8), encoder, seed=0)


def test_examples_truncated_before_their_end_are_counted_and_never_all_there_is(tmp_path: Path, tokenizer: Any) -> None:
    encoder = tiny_encoder(tokenizer)
    train = write_jsonl(tmp_path / "t.jsonl", _completions("short", "much longer", "longer too"))
    job = DataConfig(train, max_length=8, truncation="truncate")
    report = load_data(job, encoder, seed=0).report
    assert (report.train, report.too_long, report.endless) == (3, 2, 2)
    write_jsonl(train, _completions("much longer", "longer too"))
    with pytest.raises(DataInvalid, match=r"every record is truncated before the token that ends it.*over 8, or drop"):
        load_data(job, encoder, seed=0)


def test_an_id_that_the_model_lacks_is_refused_by_its_line(tmp_path: Path, tokenizer: Any) -> None:
    [_, last] = tokenizer.encode("z")
    encoder = ExampleEncoder(tokenizer, frozenset({tokenizer.eos_token_id}), last)
    train = write_jsonl(tmp_path / "t.jsonl", [*_completions("a"), {"prompt": "yz", "completion": "b"}])
    with pytest.raises(
        DataInvalid, match=rf"t\.jsonl:2: 'z' is token id {last} at position 2, which is outside the mo"
    ):
        load_data(DataConfig(train), encoder, seed=0)


def test_a_record_of_several_sequences_counts_once(tmp_path: Path, tokenizer: Any) -> None:
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last else '-' }}<|end|>{% endfor %}"
        )
        chat = [*conversation("ab", "cd"), *conversation("ef", "gh")]
        train = write_jsonl(tmp_path / "t.jsonl", [{"messages": chat}])
        report = load_data(DataConfig(train), tiny_encoder(tokenizer), seed=0).report
    finally:
        tokenizer.chat_template = kept
    assert (report.records, report.train) == (1, 2)


def test_eval_fraction_splits_distinct_examples(tmp_path: Path, tokenizer: Any) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", _completions(*"abcdefghij", *"abcdefghij"))
    encoder = tiny_encoder(tokenizer)
    data = load_data(DataConfig(train, eval_fraction=0.3, keep_duplicates=True), encoder, seed=3)
    assert len(data.eval) == 3
    assert len(data.train) == 14
    assert not set(data.train) & set(data.eval)
    one = write_jsonl(tmp_path / "one.jsonl", _completions("a", "a"))
    with pytest.raises(DataInvalid, match="cannot be split"):
        load_data(DataConfig(one, eval_fraction=0.5), encoder, seed=0)
    again = load_data(DataConfig(train, eval_fraction=0.3, keep_duplicates=True), encoder, seed=3)
    assert again.eval == data.eval


def test_the_report_counts_pairs_labels_and_packs(tmp_path: Path, tokenizer: Any) -> None:
    encoder = tiny_encoder(tokenizer)
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "bb"}, {"prompt": "p", "chosen": "c", "rejected": "dd"}]
    path = write_jsonl(tmp_path / "pairs.jsonl", [*pairs, pairs[0], {**pairs[0], "rejected": "much longer"}])
    pair_data = load_data(DataConfig(path, max_length=8), encoder, seed=0, loss=LossConfig("dpo"))
    report = pair_data.report
    assert (report.records, report.train, report.units, report.duplicates, report.dropped) == (4, 2, 2, 1, 1)
    assert (report.tokens, report.masked, report.masked_share) == (
        18,
        8,
        0.4444,
    )  # twice <bos> p | a <end>, and b b
    assert (report.longest, report.median, report.truncated) == (5, 4.5, 0)
    assert report.describe() == (
        "2 examples to train, 0 to evaluate; 18 tokens, 44% without loss, longest 5; 1 duplicates; 1 too long"
    )
    halves = load_data(DataConfig(path, max_length=8), encoder, seed=0, loss=LossConfig("kto")).report
    assert (halves.records, halves.train, halves.desirable, halves.undesirable) == (4, 4, 2, 2)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": "bb"}, {"text": "ccc"}, {"text": "d" * 9}])
    packing = DataConfig(texts, max_length=8, packing=True, truncation="truncate")
    packs = load_data(packing, encoder, seed=0)
    assert (packs.report.train, packs.report.units, packs.report.truncated, packs.report.dropped) == (4, 3, 1, 0)
    assert [unit.tokens for unit in packs.train] == [8, 4, 8]
    assert all(len(unit.rows) == 1 for unit in load_data(packing, encoder, seed=0).eval)


def test_token_ids_without_an_end_are_counted_and_never_all_there_is(tmp_path: Path, tokenizer: Any) -> None:
    encoder, a, end = tiny_encoder(tokenizer), tokenizer.encode("a")[-1], tokenizer.eos_token_id
    path = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": [a, a]}, {"input_ids": [a, a, a, end]}])
    assert load_data(DataConfig(path), encoder, seed=0).report.endless == 1
    write_jsonl(path, [{"input_ids": [a, a]}])
    with pytest.raises(DataInvalid, match=r"no record ends with a token at which the base stops, .*append it to"):
        load_data(DataConfig(path), encoder, seed=0)


def test_the_digest_is_of_what_is_trained(tmp_path: Path, tokenizer: Any) -> None:
    encoder, path = tiny_encoder(tokenizer), tmp_path / "t.jsonl"

    def digest(records: list[Any], loss: str = "sft", **options: Any) -> str:
        return load_data(
            DataConfig(write_jsonl(path, records), **options), encoder, seed=0, loss=LossConfig(loss)
        ).digest  # type: ignore[arg-type]

    plain = digest(_completions("a", "b"))
    # As checkpoints of before there were units have it.
    assert plain == "add09b5001cbed77116096fa4ffce9697d731c449fa798c608af6fcb6ed210f8"
    judged = [{**record, "label": True} for record in _completions("a", "b")]
    other = digest([judged[0], {**judged[1], "label": False}], "kto")
    pair = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert len({plain, digest(_completions("a", "b"), packing=True), digest(judged, "kto"), other}) == 4
    assert digest(pair, "kto") == other  # two answers, one of them desirable
    assert digest(pair, "dpo") not in (plain, other)
    write_jsonl(path, _completions("a", "b"))
    path.write_text("[" + path.read_text().replace("}\n{", "},\n{") + "]")
    assert load_data(DataConfig(path), encoder, seed=0).digest == plain


def test_a_loss_without_its_data_is_refused_before_anything(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", _completions("a", "b"))
    held = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(SeveralInvalid) as caught:
        load_data(DataConfig(path, path), tiny_encoder(tokenizer), seed=0, loss=LossConfig("dpo"))
    assert len(caught.value.problems) == 2
    assert "t.jsonl:1: a record with one answer, and loss dpo needs pairs" in str(caught.value)
    with pytest.raises(DataInvalid, match=r"e\.jsonl:1: a preference record \(chosen, rejected\), and loss sft needs"):
        load_data(DataConfig(path, held), tiny_encoder(tokenizer), seed=0)
    with pytest.raises(JobInvalid, match=r"data\.packing: is not read by loss dpo"):
        load_data(DataConfig(held, packing=True), tiny_encoder(tokenizer), seed=0, loss=LossConfig("dpo"))
