"""Text of token events against decoding everything and cutting at the first stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.engine.detokenize import ChoiceText, Delta
from loramux_server.engine.incremental import IncrementalDecoder
from loramux_server.engine.stop_strings import StopStrings
from loramux_server.requests import (
    FinishReason,
    RequestFailure,
    StopConditions,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from support.tokenizers import ByteTokenizer, piece_decode

PIECES = (b"the", b" cat", "né".encode()[:2], "é€".encode()[1:4], "😀".encode()[:3], b"\xff\xfe", b"ENDE", b"a\xe2")
TOKENIZER = ByteTokenizer(PIECES)
ALPHABET = "abE ND€é😀\n"


def split_text(text: str, borders: Sequence[int]) -> tuple[ByteTokenizer, list[int]]:
    """`text` cut into tokens at byte positions, anywhere."""
    data = text.encode()
    cuts = sorted({0, len(data), *(b % (len(data) + 1) for b in borders)})
    pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
    return ByteTokenizer(pieces), [256 + i for i in range(len(pieces))]


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The definition: the match that ends first; of those ending there, the longest. Where it begins, and which."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return end - len(longest), longest
    return None


def run(
    tokenizer: ByteTokenizer,
    tokens: Sequence[int],
    stop: StopConditions,
    *,
    finish: FinishReason = FinishReason.LENGTH,
    stop_token: int | None = None,
    prompt: Sequence[int] = (),
) -> list[Delta]:
    """All events of a choice, the last token with the engine's own finish; `stop_token` comes after `tokens`."""
    choice = ChoiceText(tokenizer.decode, tokenizer.token_text, stop, prompt)
    tokens = [*tokens] if stop_token is None else [*tokens, stop_token]
    deltas = []
    for i, token in enumerate(tokens):
        last = i == len(tokens) - 1
        event = TokenEvent(
            2,
            token,
            TokenLogprob(token, -0.5),
            finish=finish if last else None,
            stop_token=stop_token if last else None,
            usage=Usage(3, i + 1, 0),
        )
        delta = choice.push(event)
        if delta is not None:
            deltas.append(delta)
    return deltas


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=80), st.lists(st.integers(0, 263), max_size=10))
def test_pieces_add_up_to_decoding_all_whatever_the_bytes(tokens: list[int], context: list[int]) -> None:
    decoder = IncrementalDecoder(TOKENIZER.decode, context)
    pieces = [decoder.push(token) for token in tokens]
    before = TOKENIZER.decode(context)
    whole = TOKENIZER.decode([*context, *tokens])
    assert before.rstrip("�") + "".join(pieces) + decoder.flush() == whole


@given(st.text(max_size=120), st.lists(st.integers(0, 500), max_size=60))
def test_no_half_character_comes_out(text: str, borders: list[int]) -> None:
    text = text.replace("�", "?")
    tokenizer, tokens = split_text(text, borders)
    decoder = IncrementalDecoder(tokenizer.decode)
    given_out = ""
    for i, token in enumerate(tokens):
        given_out += decoder.push(token)
        assert given_out == tokenizer.decode(tokens[: i + 1]).rstrip("�")
    assert given_out == text
    assert decoder.flush() == ""


@given(st.lists(st.sampled_from(["▁", "▁the", "cat", "▁▁", ".", "é", *"€😀é"]), max_size=60), st.integers(0, 9))
def test_pieces_of_a_sentencepiece_vocabulary_keep_their_spaces(words: list[str], context: int) -> None:
    vocabulary = ["▁", "▁the", "cat", "▁▁", "."]
    decode = piece_decode(vocabulary)
    tokens: list[int] = []
    for word in words:
        tokens += [256 + vocabulary.index(word)] if word in vocabulary else list(word.encode())
    prompt = [257, 258] * 4
    for before in ([], prompt[:context]):
        decoder = IncrementalDecoder(decode, before)
        pieces = "".join(decoder.push(token) for token in tokens) + decoder.flush()
        assert decode(before) + pieces == decode([*before, *tokens])


def test_output_after_a_prompt_begins_with_its_space() -> None:
    decode = piece_decode(["▁is", "▁Paris"])
    assert IncrementalDecoder(decode).push(257) == "Paris"
    assert IncrementalDecoder(decode, [256]).push(257) == " Paris"


@pytest.mark.parametrize("token", [TOKENIZER.eos, 0x82, 0xE2, 256 + 7, ord("x")])
def test_each_token_costs_a_bounded_window(token: int) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return TOKENIZER.decode(ids)

    decoder = IncrementalDecoder(decode)
    text = decoder.push(ord("a")) + "".join(decoder.push(token) for _ in range(1000)) + decoder.push(ord("z"))
    assert text + decoder.flush() == TOKENIZER.decode([ord("a"), *[token] * 1000, ord("z")])
    assert longest < 64


def test_textless_tokens_do_not_lose_the_context() -> None:
    decode = piece_decode(["▁a", ""])
    decoder = IncrementalDecoder(decode)
    tokens = [256, *[257] * 200, 256]
    assert "".join(decoder.push(token) for token in tokens) == "a a"


STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


@given(st.text(ALPHABET, max_size=60), st.lists(st.integers(0, 200), max_size=40), STOPS, st.booleans())
def test_stop_strings_equal_cutting_the_whole_text(
    text: str, borders: list[int], stops: list[str], include: bool
) -> None:
    tokenizer, tokens = split_text(text, borders)
    if not tokens:
        return
    deltas = run(tokenizer, tokens, StopConditions(stop_strings=tuple(stops), include_stop_string=include))
    found = first_stop(text, stops)
    last = deltas[-1]
    assert [delta.terminal for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    if found is None:
        assert text_of(deltas) == text
        assert (last.finish, last.stop_string, last.retire) == (FinishReason.LENGTH, None, False)
        return
    begin, stop = found
    assert text_of(deltas) == text[: begin + len(stop) if include else begin]
    assert (last.finish, last.stop_string) == (FinishReason.STOP, stop)
    # The stop is told with the token that completes it, and usage counts up to there.
    needed = next(n for n in range(len(tokens) + 1) if first_stop(tokenizer.decode(tokens[:n]), stops))
    assert last.usage == Usage(3, needed, 0)
    assert last.retire == (needed < len(tokens))
    assert [i for delta in deltas for i in delta.token_ids] == tokens[:needed]
    assert len(deltas) == needed


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_a_stop_string_could_need(text: str, stops: list[str]) -> None:
    strings = StopStrings(stops)
    released = ""
    for end in range(1, len(text) + 1):
        piece, found = strings.feed(text[end - 1])
        released += piece
        if found:
            break
        longest = max(n for n in range(5) if n == 0 or any(s.startswith(text[max(0, end - n) : end]) for s in stops))
        assert released == text[: max(0, end - longest)]


def test_a_stop_string_across_tokens_holds_its_begin_back() -> None:
    tokenizer, tokens = ByteTokenizer([b"one E", b"N", b"D two"]), [256, 257, 258]
    deltas = run(tokenizer, tokens, StopConditions(stop_strings=("END",)))
    assert [delta.text for delta in deltas] == ["one ", "", ""]
    assert deltas[-1].stop_string == "END"
    deltas = run(tokenizer, tokens, StopConditions(stop_strings=("ENX", " two!")))
    assert [delta.text for delta in deltas] == ["one ", "", "END two"]
    assert deltas[-1].finish is FinishReason.LENGTH


def test_the_first_end_wins_and_then_the_longest() -> None:
    tokenizer = ByteTokenizer([b"xabcd"])
    for stops, text in ((("abcd", "b"), "xa"), (("c", "abc", "bc"), "x"), (("d", "zz"), "xabc")):
        assert text_of(run(tokenizer, [256], StopConditions(stop_strings=stops))) == text


@pytest.mark.parametrize(("stop", "text"), [("aab", "aaab"), ("abac", "ababac"), ("aabaaac", "aabaaabaaac")])
def test_a_stop_string_that_begins_within_a_failed_match_is_found(stop: str, text: str) -> None:
    tokenizer = ByteTokenizer()
    deltas = run(tokenizer, tokenizer.encode(text), StopConditions(stop_strings=(stop,)))
    assert text_of(deltas) == text.removesuffix(stop)
    assert deltas[-1].stop_string == stop


def test_stop_strings_count_from_min_tokens_on() -> None:
    tokenizer = ByteTokenizer()
    stop = StopConditions(min_tokens=4, stop_strings=("ab",))
    deltas = run(tokenizer, tokenizer.encode("ababab"), stop)
    assert text_of(deltas) == "ab"
    assert deltas[-1].usage == Usage(3, 4, 0)
    assert text_of(run(tokenizer, tokenizer.encode("abxab"), stop)) == "abx"
    # A match that did not count may overlap one that does.
    overlapping = StopConditions(min_tokens=4, stop_strings=("aba",))
    assert text_of(run(tokenizer, tokenizer.encode("ababa"), overlapping)) == "ab"
    # Begun before the minimum and ended with it: nothing of it was given out yet.
    assert text_of(run(tokenizer, tokenizer.encode("xxab"), stop)) == "xx"


def test_nothing_comes_after_the_end() -> None:
    tokenizer = ByteTokenizer()
    choice = ChoiceText(tokenizer.decode, tokenizer.token_text, StopConditions(stop_strings=("b",)))
    tokens = [choice.push(TokenEvent(0, ord(c))) for c in "abc"]
    assert [delta is None for delta in tokens] == [False, False, True]
    assert choice.push(TokenEvent(0, finish=FinishReason.LENGTH)) is None


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab<|end|>")])
def test_the_stop_token_counts_and_its_text_is_told_on_request(include: bool, text: str) -> None:
    tokenizer = ByteTokenizer()
    stop = StopConditions(stop_strings=("bc",), include_stop_string=include)
    deltas = run(tokenizer, tokenizer.encode("ab"), stop, finish=FinishReason.STOP, stop_token=tokenizer.eos)
    last = deltas[-1]
    assert text_of(deltas) == text
    assert (last.finish, last.stop_token, last.stop_string) == (FinishReason.STOP, tokenizer.eos, None)
    assert last.usage == Usage(3, 3, 0)
    assert last.token_ids == (tokenizer.eos,)
    assert not last.retire


def test_an_ordinary_stop_token_is_left_out_of_the_text() -> None:
    tokenizer = ByteTokenizer()
    stop = StopConditions(stop_token_ids=frozenset({ord("z")}))
    deltas = run(tokenizer, tokenizer.encode("ab"), stop, finish=FinishReason.STOP, stop_token=ord("z"))
    assert text_of(deltas) == "ab"


def test_an_end_in_the_middle_of_a_character_says_so() -> None:
    tokenizer = ByteTokenizer()
    deltas = run(tokenizer, tokenizer.encode("aé")[:-1], StopConditions())
    assert [delta.text for delta in deltas] == ["a", "�"]
    deltas = run(tokenizer, tokenizer.encode("aé")[:-1], StopConditions(stop_strings=("a�",)))
    assert text_of(deltas) == ""
    assert (deltas[-1].finish, deltas[-1].retire) == (FinishReason.STOP, False)


def test_what_was_held_back_comes_out_when_the_request_is_aborted() -> None:
    tokenizer = ByteTokenizer()
    choice = ChoiceText(tokenizer.decode, tokenizer.token_text, StopConditions(stop_strings=("abc",)))
    choice.push(TokenEvent(0, ord("a")))
    delta = choice.push(TokenEvent(0, finish=FinishReason.ABORTED, usage=Usage(1, 1, 0)))
    assert delta == Delta(0, "a", finish=FinishReason.ABORTED, usage=Usage(1, 1, 0))


def test_failures_and_logprobs_pass_through() -> None:
    tokenizer = ByteTokenizer()
    choice = ChoiceText(tokenizer.decode, tokenizer.token_text, StopConditions())
    prompt = (None, TokenLogprob(5, -1.0))
    assert choice.push(TokenEvent(3, prompt_logprobs=prompt)) == Delta(3, prompt_logprobs=prompt)
    logprob = TokenLogprob(ord("a"), -0.25, ((97, -0.25),))
    assert choice.push(TokenEvent(3, ord("a"), logprob)) == Delta(3, "a", (ord("a"),), (logprob,))
    failure = RequestFailure("NUMERIC", "no")
    delta = choice.push(TokenEvent(3, failure=failure))
    assert delta is not None
    assert delta.terminal
    assert delta.failure == failure
    assert choice.push(TokenEvent(3, ord("b"))) is None
