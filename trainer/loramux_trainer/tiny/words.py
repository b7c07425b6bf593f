"""Word lists and samplers behind the tiny base's text: pure Python, seeded by the caller's generator."""

from __future__ import annotations

import random


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NOUNS = word_list(
    "lantern apple river stone garden window ladder basket kettle candle pencil mirror button blanket bottle hammer "
    "carpet pillow ticket wallet bridge castle forest island meadow valley harbour village tower tunnel engine wagon "
    "rocket saddle anchor barrel bucket shovel needle thread copper silver marble velvet cotton feather whisker "
    "rabbit falcon badger otter heron beetle salmon spider donkey turtle monkey kitten puppy pigeon sparrow fox bus "
    "box glass dress brush peach bench church watch match dish wish bush city baby lady story berry party cherry "
    "penny daisy pony song lamp door table chair house cloud storm paper letter number winter summer morning evening "
    "teacher doctor farmer baker sailor painter singer writer hunter driver"
)
NAMES = word_list(
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Lukas Maria Nils Olga Peter Quinn Rosa Simon "
    "Tara Ursula Victor Wendy Xenia Yusuf Zoe Amir Bella Carlo Diana Emil Fiona Gavin Hanna Ivan Julia Kofi Lena"
)
CITIES = word_list(
    "Oslo Paris Lima Cairo Delhi Quito Rome Milan Turin Porto Accra Lagos Tunis Sofia Minsk Riga Bern Basel Geneva "
    "Lyon Nantes Lille Bonn Essen Leeds York Derby Perth Osaka Kyoto Nara Seoul Busan Hanoi Manila Dakar Havana"
)
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

_ONSETS = ("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "n", "r", "l", "s", "t", "m", "ck")


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word of 3 to 8 letters."""
    while True:
        syllables = rng.randint(1, 3)
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
        if 3 <= len(word) <= 8:
            return word


def word(rng: random.Random) -> str:
    """An English noun of at most 8 letters one time in four, else a made-up word."""
    return rng.choice(NOUNS) if rng.random() < 0.25 else pseudo_word(rng)


def name(rng: random.Random) -> str:
    """A person's name, listed or made up."""
    return rng.choice(NAMES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()


def city(rng: random.Random) -> str:
    """A city's name, listed or made up."""
    return rng.choice(CITIES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()
