"""What names, versions, upload ids, labels and lifetimes may be: each rule once, with its words.

The store and the server's API both judge by these and each refuse in their own error. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TextRule:
    """A form of text: the whole of it must match `pattern`. `words` complete "must be" and "use"."""

    pattern: re.Pattern[str]
    words: str

    def allows(self, text: str) -> bool:
        """Whether `text` has this form, from end to end."""
        return self.pattern.fullmatch(text) is not None


NAME = TextRule(
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
    "1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first",
)
"""Of adapters, aliases and tenants; letters are those of ASCII."""

DIGEST = TextRule(re.compile(r"[0-9a-f]{64}"), "64 lower-case hex digits")
VERSION = TextRule(re.compile(r"[0-9a-f]{8,64}"), "8 to 64 lower-case hex digits of a digest")
UPLOAD_ID = TextRule(re.compile(r"[A-Za-z0-9_-]{8,64}"), "8 to 64 characters of A-Z, a-z, 0-9, _ and -")
LABEL_KEY = TextRule(
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}"),
    "1 to 63 letters, digits, dots, dashes, slashes or underscores, a letter or digit first",
)

MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 256
MAX_ALIASES = 32

MAX_TTL_SECONDS = 10 * 365 * 86_400
MAX_USES = 1_000_000_000
"""How long, and for how many requests, an adapter that ends by itself may be kept at most."""


def wrong_labels(labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(key, what it or its value must be) of each label that cannot be set. How many there are is not looked at."""
    for key, value in labels.items():
        if not LABEL_KEY.allows(key):
            yield key, f"the key must be {LABEL_KEY.words}"
        if len(value) > MAX_LABEL_CHARACTERS or not value.isprintable():
            yield key, f"the value must be at most {MAX_LABEL_CHARACTERS} printable characters"
