"""Patterns: those we take mean what `re` means by them, the others are refused in time and in little memory."""

import re
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget, SafePattern
from loramux_adapters.formats.peft.name_keys import NameKeys
from support.timing import processor_seconds

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.3.attn.c_attn",
    "lm_head",
    "model.embed_tokens",
    "model.layers.10.self_attn.q_proj.mlp.experts.0.up_proj",
]
PATIENT = ReadLimits(regex_seconds=10.0)

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj"
    r"|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (UNSLOTH, 2),
        (r"^(?!.*mlp).*_proj$", 1),
        (r"(?P<a>model)\.(?=layers).*(?<=q)_proj", 1),
        (r".*\.\d{2}\..*", 2),
        (r"[^.]+", 1),
        (r"(\w+\.)+\w+", 5),
        (r"(?:model|transformer)\..*?attn.*+", 3),
    ],
)
def test_common_patterns_are_taken(pattern: str, matches: int) -> None:
    safe = SafePattern(pattern, "target_modules", RegexBudget(ReadLimits()))
    assert [safe.fullmatch(name) for name in NAMES] == [bool(re.fullmatch(pattern, name)) for name in NAMES]
    assert sum(safe.fullmatch(name) for name in NAMES) == matches


BOMBS = {
    "exponential alternation": r"(?:a|[a-z_.0-9]|.)+[!%]",
    "exponential lazy": r"(?:.*?){30}[!%]",
    "exponential classes": r"(?:[a-z]|[a-z_.0-9]|\w|\.)+[!%]",
    "unrolled power": "(?:(?:(?:a{999}){999}){999}){999}",
    "doubling": "(?:" * 18 + "a|b" + ")+" * 18,
    "deep plus": "(?:" * 150 + "a|b" + ")+" * 150,
    "deep counts": "(?:" * 90 + "a" + "){1,2}" * 90,
    "deep groups": "(" * 900 + "a" + ")" * 900,
    "wide counts": "(?:.?){999}" * 100,
    "long": "a" * 2_000 + "+",
    "long alternation": "|".join("abcdefgh" * 250),
}


def match_all(pattern: str, place: str) -> None:
    budget = RegexBudget(ReadLimits())
    if place == "target":
        safe = SafePattern(pattern, "target_modules", budget)
        for name in NAMES:
            safe.fullmatch(name)
    else:
        keys = NameKeys([pattern], "rank_pattern", budget)
        for name in NAMES:
            keys.find(name)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", ["target", "key"])
def test_bombs_are_refused_in_time_and_memory(bomb: str, place: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with processor_seconds() as spent, pytest.raises(AdapterInvalid) as refusal:
        match_all(BOMBS[bomb], place)
    assert spent.seconds < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB
    assert refusal.value.remedy


def test_the_budget_is_shared_by_all_patterns() -> None:
    budget = RegexBudget(ReadLimits())

    def exhaust() -> None:
        for _ in range(1_000):
            NameKeys([f"(q|k){number}.*" for number in range(50)], "rank_pattern", budget).find(NAMES[0])

    with processor_seconds() as spent, pytest.raises(AdapterInvalid, match="took too long"):
        exhaust()
    assert spent.seconds < 0.05


@pytest.mark.parametrize(
    "pattern",
    [
        "(?i)Q_PROJ",  # flags: `re` compiles large ignore-case sets slowly
        r"\p{L}+",
        r"(?R)",
        r"(?|a|b)",
        r"(?:q){e<=1}",  # fuzzy matching in `regex`, literal in `re`
        r"q{,}",
        r"q{",
        r"[[:alpha:]]+",
        r"[a--b]",
        r"[a&&b]",
        r"\m\w+",
        r"\Kq",
        r"\x41",
        r"q\u0041",
        "\u00e9",
        "q_proj\n",
        "(?#comment)q",
        "(a)(?(1)b|c)",
    ],
)
def test_what_the_parsers_read_differently_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterInvalid, match=r"unsupported construct|not a repetition"):
        SafePattern(pattern, "target_modules", RegexBudget(PATIENT))


@pytest.mark.parametrize(
    "pattern", ["(", ")", "*", "a**", "[a", "(?P<a>x)(?P<a>y)", r"(?<=a+)b", r"(a)\2", "[z-a]", "a{3,2}"]
)
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterInvalid):
        SafePattern(pattern, "target_modules", RegexBudget(PATIENT))


def test_a_group_name_of_ours_is_refused() -> None:
    with pytest.raises(AdapterInvalid, match="not a regular expression"):
        SafePattern(r"(?:^|.*?\.)(?P<idx>a)\.(?P<idx>\d+)\.", "layers_pattern", RegexBudget(PATIENT))


ATOMS = st.sampled_from(
    [
        "q",
        "proj",
        "_",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\b",
        "[qk]",
        "[^.]",
        "[a-z_]",
        "layers",
        "0",
        "model",
        "attn",
        "^",
        "$",
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,}", "*+"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        st.tuples(inner, inner).map(".*".join),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(pattern=PATTERNS)
def test_accepted_patterns_mean_what_re_means(pattern: str) -> None:
    try:
        safe = SafePattern(pattern, "target_modules", RegexBudget(ReadLimits(regex_seconds=0.2)))
        ours = [(safe.fullmatch(name), safe.match(name) is not None) for name in NAMES]
    except AdapterInvalid:
        return
    compiled = re.compile(pattern)
    assert ours == [(bool(compiled.fullmatch(name)), bool(compiled.match(name))) for name in NAMES]


def test_a_garbage_collection_is_not_on_the_patterns_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a process with torch takes 0.2 s: an innocent adapter was refused when it fell into its matching."""
    now = [1.0]
    monkeypatch.setattr("time.thread_time", lambda: now[0])
    collections = [5]
    monkeypatch.setattr("gc.get_stats", lambda: [{}, {}, {"collections": collections[0]}])
    budget = RegexBudget(ReadLimits())
    pattern = SafePattern("q_proj|v_proj", "target_modules", budget)
    now[0], collections[0] = 1.2, 6
    assert pattern.fullmatch("q_proj")
    now[0], collections[0] = 1.4, 7
    with pytest.raises(AdapterInvalid, match="took too long"):
        pattern.fullmatch("q_proj")
