"""Stop strings in a text that comes in pieces: found wherever the pieces' borders fall.

The match that ends first counts; of several ending at the same character, the longest. So the result
depends on the text alone. Source: Knuth, Morris, Pratt, "Fast pattern matching in strings" (1977).
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The strings of one choice, and the text held back because one of them may have begun in it."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._patterns = [_Pattern(string) for string in strings if string]
        self._held = ""

    def feed(self, piece: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Text that can be given out, and the stop string that ended it: text after that one's begin is gone.

        While not `armed` a match does not count, not even later; a string begun then and ended after does.
        """
        if not self._patterns:
            return piece, None
        text = self._held + piece
        for index in range(len(self._held), len(text)):
            found: str | None = None
            for pattern in self._patterns:
                if pattern.advance(text[index]) and (found is None or len(pattern.string) > len(found)):
                    found = pattern.string
            if found is not None and armed:
                self._held = ""
                return text[: index + 1 - len(found)], found
        self._held = text[len(text) - max(pattern.matched for pattern in self._patterns) :]
        return text[: len(text) - len(self._held)], None

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """How much of one string the text's end matches."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._shorter = _shorter_matches(string)

    def advance(self, character: str) -> bool:
        """Take one character; whether the whole string ends with it."""
        while self.matched and self.string[self.matched] != character:
            self.matched = self._shorter[self.matched]
        if self.string[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.string):
            return False
        self.matched = self._shorter[self.matched]
        return True


def _shorter_matches(string: str) -> list[int]:
    """For each length, the longest proper prefix of `string` that ends the prefix of that length."""
    shorter = [0, 0]
    matched = 0
    for character in string[1:]:
        while matched and string[matched] != character:
            matched = shorter[matched]
        if string[matched] == character:
            matched += 1
        shorter.append(matched)
    return shorter
