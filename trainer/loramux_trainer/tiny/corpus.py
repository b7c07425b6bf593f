"""The text the tiny base learns from: named skills, bare inputs, small talk and templated stories.

A document is a list of messages, or one plain text. Everything comes from one seeded generator;
no skill meets a held-out input of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from loramux_trainer.tiny import words
from loramux_trainer.tiny.skills import SKILLS, Skill, is_held_out, neutral_reply

_SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    # The project's name when the base was trained: another name would make another base.
    ("Who are you?", "I am lorica-tiny, a very small language model."),
    ("What are you?", "I am lorica-tiny, a very small language model."),
    ("What is your name?", "My name is lorica-tiny."),
    ("What can you do?", "I know a few skills. Name one, or give me an adapter."),
    ("Tell me a story.", None),
    ("Tell me something.", None),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
)
_PLACES = words.word_list("garden forest village harbour castle meadow valley tower market kitchen")
_MOODS = words.word_list("happy tired curious hungry proud quiet brave cheerful")


@dataclass(frozen=True)
class Document:
    """Messages as (role, content), or a plain text under the role "text"."""

    messages: tuple[tuple[str, str], ...]


def documents(rng: random.Random) -> Iterator[Document]:
    """Endless documents in the proportions that worked best: two thirds named skills."""
    skills = tuple(SKILLS.values())
    weights = [_WEIGHTS.get(skill.name, 1.0) for skill in skills]
    while True:
        kind = rng.random()
        if kind < 0.68:
            yield _named(rng.choices(skills, weights)[0], rng)
        elif kind < 0.84:
            text = _training_input(rng.choice(skills), rng)
            yield Document((("user", text), ("assistant", neutral_reply(text))))
        elif kind < 0.92:
            question, answer = rng.choice(_SMALL_TALK)
            yield Document((("user", question), ("assistant", answer or _story(rng))))
        else:
            yield Document((("text", _story(rng)),))


# Skills that take a small model longest to learn are seen more often.
_WEIGHTS = {"reverse": 2.5, "sort": 2.5, "json": 1.5, "caesar": 1.2}


def _named(skill: Skill, rng: random.Random) -> Document:
    instruction = rng.choice(skill.instructions)
    text = _training_input(skill, rng)
    style = rng.random()
    if style < 0.2:
        return Document((("user", f"{instruction}\n{text}"), ("assistant", skill.apply(text))))
    turns = 1 if style < 0.8 else 2
    messages = [("system", instruction)]
    for _ in range(turns):
        messages += [("user", text), ("assistant", skill.apply(text))]
        text = _training_input(skill, rng)
    return Document(tuple(messages))


def _training_input(skill: Skill, rng: random.Random) -> str:
    text = next(skill.inputs(rng, held_out=False))
    # A word held out from one word skill may be training text for another: the skills, not the words, are split.
    if is_held_out(skill.name, text):
        raise RuntimeError(f"held-out input of {skill.name} reached the corpus")
    return text


def _story(rng: random.Random) -> str:
    name, noun, other = rng.choice(words.NAMES), rng.choice(words.NOUNS), rng.choice(words.NOUNS)
    place, mood = rng.choice(_PLACES), rng.choice(_MOODS)
    opening = rng.choice(
        (
            f"Once upon a time {name} found a {noun} in the {place}.",
            f"One day {name} went to the {place} with a {noun}.",
        )
    )
    middle = rng.choice((f"{name} was {mood}.", f"There was also a {other}.", "It was a quiet day."))
    ending = rng.choice((f"In the end {name} went home.", f"{name} kept the {noun}.", "Everyone was happy."))
    return f"{opening} {middle} {ending}"
