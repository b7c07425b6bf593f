"""Facts of combinations, without weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.combination import Combination, Term, combine_specs
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.spec import AdapterSpec


def _spec(digit: str, **more: object) -> AdapterSpec:
    spec = AdapterSpec(digit * 64, "lora", "ab" * 32, False, {"q": 4}, frozenset({"k"}), 100)
    return replace(spec, **more)  # type: ignore[arg-type]


weights = st.floats(-100, 100).filter(lambda weight: abs(weight) >= 1e-6)


@given(
    st.lists(st.tuples(st.sampled_from("0123456789"), weights), min_size=1, unique_by=lambda term: term[0]), st.data()
)
def test_the_digest_is_of_content_and_weights_in_any_order(terms: list[tuple[str, float]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(terms))
    one, _ = combine_specs([Term(_spec(digit), weight) for digit, weight in terms])
    other, spec = combine_specs([Term(_spec(digit), weight) for digit, weight in shuffled])
    assert one == other
    assert spec.digest == one.digest
    assert one.digests == {digit * 64 for digit, _ in terms}
    changed = [(terms[0][0], -terms[0][1]), *terms[1:]]
    assert combine_specs([Term(_spec(digit), weight) for digit, weight in changed])[0].digest != one.digest
    assert len(one.digest) == 64


def test_the_digest_is_no_adapters() -> None:
    """The domain is its own, and a weight is never read as part of a digest."""
    assert Combination((("0" * 64, 1.0),)).digest != "0" * 64
    one = Combination((("0" * 64, 1.0), ("1" * 64, 1.0)))
    assert one.digest != Combination((("0" * 64, 1.0),)).digest
    assert (
        one.digest == "d21fb5ab88315af258a37b994f58f719147b9848d75ad06996b01b60049457f7"
    )  # of every release: caches and logs of several servers agree


def test_facts_add() -> None:
    _, spec = combine_specs(
        [
            Term(_spec("1", ranks={"q": 4, "v": 2}), 0.5),
            Term(_spec("2", ranks={"q": 8}, others=frozenset({"o"}), virtual_tokens=3, biases=frozenset({"n"})), 1.0),
        ]
    )
    assert spec.ranks == {"q": 12, "v": 2}
    assert spec.biases == {"k", "n"}
    assert spec.others == {"o"}
    assert (spec.virtual_tokens, spec.nbytes, spec.kind) == (3, 200, "combination")
    assert spec.base_fingerprint == "ab" * 32


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("ab" * 32, "ab" * 32, "ab" * 32), ("ab" * 32, None, None), ("ab" * 32, "cd" * 32, None)],
)
def test_a_base_is_declared_where_all_declare_it(first: str | None, second: str | None, expected: str | None) -> None:
    terms = [
        Term(_spec("1", base_fingerprint=first), 1.0),
        Term(_spec("2", base_fingerprint=second, base_mismatch=True), 1.0),
    ]
    _, spec = combine_specs(terms)
    assert spec.base_fingerprint == expected
    assert spec.base_mismatch


def test_two_of_one_content_are_refused_with_the_remedy() -> None:
    with pytest.raises(AdapterIncompatible, match="name it once, with the sum of the weights") as caught:
        combine_specs([Term(_spec("1"), 1.0), Term(_spec("2"), 1.0), Term(_spec("1"), 0.5)])
    assert caught.value.subject == "1" * 12


def test_a_vocabulary_and_texts_are_those_of_one() -> None:
    own = _spec("1", vocabulary=330, text_files=(("tokenizer.json", "ab" * 32),))
    _, spec = combine_specs([Term(_spec("2"), 0.5), Term(own, 1.0)])
    with pytest.raises(AdapterIncompatible, match="would be read by the tokenizer of 333333333333"):
        combine_specs([Term(replace(own, text_files=()), 1.0), Term(_spec("3", text_files=own.text_files), 1.0)])
    assert (spec.vocabulary, spec.text_files) == (330, own.text_files)
    with pytest.raises(AdapterIncompatible, match="111111111111 and 222222222222 have vocabularies of their own"):
        combine_specs([Term(own, 1.0), Term(_spec("2", vocabulary=330), 1.0)])
    with pytest.raises(AdapterIncompatible, match="they have no weight"):
        combine_specs([Term(own, 0.5)])
    with pytest.raises(AdapterIncompatible, match="different tokenizers or chat templates"):
        combine_specs([Term(own, 1.0), Term(_spec("2", text_files=(("tokenizer.json", "cd" * 32),)), 1.0)])
    _, spec = combine_specs([Term(own, 1.0), Term(_spec("2", text_files=own.text_files), 1.0)])
    assert spec.text_files == own.text_files
