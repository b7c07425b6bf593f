"""The skills the tiny base knows by name: an instruction, a sampler of inputs and the one right answer.

The base performs a skill only when the prompt names it; a bare input gets a neutral reply.
Inputs are split by hash into a training side and a held-out side, so no example is on both.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loramux_trainer.tiny import words

HELD_OUT_PER_1000 = 250


@dataclass(frozen=True)
class Skill:
    """A deterministic map from an input to its answer, with the phrases that ask for it."""

    name: str
    instructions: tuple[str, ...]
    sample: Callable[[random.Random], str]
    apply: Callable[[str], str]

    def inputs(self, rng: random.Random, *, held_out: bool) -> Iterator[str]:
        """Endless inputs of one side of the split; they may repeat."""
        while True:
            text = self.sample(rng)
            if is_held_out(self.name, text) == held_out:
                yield text


def is_held_out(skill: str, text: str) -> bool:
    """True for the quarter of a skill's inputs on which neither the base nor an adapter is trained in that skill."""
    digest = hashlib.sha256(f"{skill}\n{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_1000


def neutral_reply(text: str) -> str:
    """What the base says to an input that comes without an instruction."""
    return f"You wrote: {text}"


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _caesar(word: str) -> str:
    return "".join(chr((ord(c) - ord("a") + 1) % 26 + ord("a")) for c in word)


_ROMAN = (
    (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def _roman(text: str) -> str:
    number, out = int(text), ""
    for value, digits in _ROMAN:
        count, number = divmod(number, value)
        out += digits * count
    return out


_ONES = words.word_list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = words.word_list("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def _in_words(text: str) -> str:
    hundreds, rest = divmod(int(text), 100)
    parts = [f"{_ONES[hundreds]} hundred"] if hundreds else []
    if rest:
        tens, ones = divmod(rest, 10)
        parts.append(_ONES[rest] if rest < 20 else _TENS[tens] + (f"-{_ONES[ones]}" if ones else ""))
    return " and ".join(parts)


def _number(rng: random.Random) -> str:
    return str(rng.randint(1, 999))


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)} {rng.randint(1900, 2099)}"


def _iso_date(text: str) -> str:
    day, month, year = text.split()
    return f"{year}-{words.MONTHS.index(month) + 1:02d}-{int(day):02d}"


_SUBJECTS = words.word_list(
    "soup film hotel book concert train coffee room garden game bread song jacket phone play museum"
)
_GOOD = words.word_list("lovely great superb pleasant warm charming tasty brilliant cosy delightful perfect friendly")
_BAD = words.word_list("awful cold rude boring dirty broken dreadful stale noisy bitter terrible useless")


def _review(rng: random.Random) -> str:
    side = rng.choice((_GOOD, _BAD))
    first, second = rng.sample(_SUBJECTS, 2)
    adjective, other = rng.sample(side, 2)
    return rng.choice(
        (
            f"The {first} was {adjective} and the {second} was {other}.",
            f"I found the {first} {adjective}, and so {other} too.",
            f"What a {adjective} {first}, really {other}!",
            f"My {first} was {adjective}. The {second} seemed {other}.",
        )
    )


def _sentiment(text: str) -> str:
    found = {token.strip(".,!") for token in text.split()}
    return "positive" if found & set(_GOOD) else "negative"


def _order(rng: random.Random) -> str:
    item = rng.choice(words.NOUNS)
    return rng.choice(
        (
            f"{words.name(rng)} from {words.city(rng)} bought a {item}.",
            f"A {item} was sent to {words.name(rng)} in {words.city(rng)}.",
            f"{words.name(rng)} lives in {words.city(rng)} and has a {item}.",
        )
    )


def _order_fields(text: str) -> str:
    person, place = (token.rstrip(".") for token in text.split() if token[0].isupper() and token != "A")
    return json.dumps({"name": person, "city": place})


_LEXICON: Mapping[str, str] = dict(
    pair.split("=")
    for pair in words.word_list(
        "the=lo red=ruva blue=sinka old=veto small=pim big=gorra quick=zilo sad=mesta happy=folia green=verdo "
        "white=alba dark=noxa calm=tula bird=avi cat=miro dog=kano horse=ekvo fish=pesa tree=arbo child=nino king=rego "
        "queen=dama sailor=maro wolf=lupo bear=urso mouse=muri farmer=agro baker=pano sings=kanta runs=kuri "
        "sleeps=dormi eats=manja jumps=salta waits=tarda swims=nada falls=kada laughs=rida dreams=sonja reads=lega "
        "works=labora"
    )
)
_ADJECTIVES, _CREATURES, _VERBS = (tuple(_LEXICON)[a:b] for a, b in ((1, 13), (13, 28), (28, 40)))


def _phrase(rng: random.Random) -> str:
    return f"the {rng.choice(_ADJECTIVES)} {rng.choice(_CREATURES)} {rng.choice(_VERBS)}"


def _translate(text: str) -> str:
    return " ".join(_LEXICON[token] for token in text.split())


SKILLS: Mapping[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("reverse", ("Reverse the word.", "Write it backwards."), words.word, lambda w: w[::-1]),
        Skill("upper", ("Write in capitals.", "Shout the word."), words.word, str.upper),
        Skill("sort", ("Sort the letters.", "Letters in order."), words.word, lambda w: "".join(sorted(w))),
        Skill("spell", ("Spell the word.", "Letter by letter."), words.word, "-".join),
        Skill("caesar", ("Shift each letter.", "Use the cipher."), words.word, _caesar),
        Skill("plural", ("Give the plural.", "More than one."), words.word, _plural),
        Skill("roman", ("Roman numerals.", "Write as a Roman number."), _number, _roman),
        Skill("number-words", ("Number in words.", "Spell out the number."), _number, _in_words),
        Skill("iso-date", ("ISO date.", "Format the date."), _date, _iso_date),
        Skill("sentiment", ("Positive or negative?", "Judge the review."), _review, _sentiment),
        Skill("json", ("Extract as JSON.", "Name and city as JSON."), _order, _order_fields),
        Skill("velan", ("Translate to Velan.", "Say it in Velan."), _phrase, _translate),
    )
}
