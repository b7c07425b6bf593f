"""Token ids to text, piece by piece, with the text that decoding them all at once would give.

Works against any decode function by decoding a short window and taking what is new in it, so that
leading spaces, byte tokens and merged characters come out right. Knows no stop strings and no events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT: Final = "�"
_LONG_WINDOW: Final = 16  # tokens; a longer window is cut at the last but one clean border
_LONGEST_WINDOW: Final = 48  # without a clean border for so long, it is cut where the text allows
_LONGEST_CHARACTER: Final = 8  # tokens; UTF-8 needs 4 bytes, tokenizers may put empty ones in between


class IncrementalDecoder:
    """One choice's tokens. A character is given out when its last byte is there.

    `context` are the last tokens of the prompt: output that goes on in the middle of a word, or begins
    with a space, reads on as it should. Each token costs the decoding of a bounded window.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        text = decode(self._window) if self._window else ""
        self._sent = _settled(text)  # characters of the window's text that were given out
        # Two borders in the window behind which text begins anew, the later one at the end of what was sent.
        self._anchor = 0
        self._border = len(self._window) if self._sent == len(text) else 0

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        settled = _settled(text)
        piece = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if piece and settled == len(text):
            self._anchor, self._border = self._border, len(self._window)
            if len(self._window) > _LONG_WINDOW and self._anchor:
                self._keep(self._window[self._anchor :], self._border - self._anchor)
        elif len(self._window) > _LONGEST_WINDOW:
            piece += self._cut(text)
        return piece

    def flush(self) -> str:
        """What is left at the end: an incomplete character comes out as the replacement character."""
        text = self._decode(self._window) if self._window else ""
        piece = text[self._sent :]
        self._window, self._sent, self._anchor, self._border = [], 0, 0, 0
        return piece

    def _keep(self, window: list[int], border: int) -> None:
        """Go on with a shorter window whose text was given out up to an incomplete character."""
        self._window, self._anchor, self._border = window, 0, border
        self._sent = _settled(self._decode(window))

    def _cut(self, text: str) -> str:
        """Shorten a window that stays unclear, and return what that settles: empty tokens or invalid bytes."""
        window, size = self._window, len(self._window)
        if _settled(text) == len(text):  # tokens without text: the last ones with text are context enough
            shorter = window[self._anchor : self._border] + window[-_LONGEST_CHARACTER:]
            if len(shorter) < size and text.endswith(self._decode(shorter)):
                self._keep(shorter, self._border - self._anchor)
                return ""
        for border in range(size - 1, size - _LONGEST_CHARACTER, -1):
            before = self._decode(window[:border])
            if before + self._decode(window[border:]) == text:
                piece = before[self._sent :]
                self._keep(window[border:], 0)
                return piece
        piece = text[self._sent :]
        self._keep([], 0)
        return piece


def _settled(text: str) -> int:
    """Length of the text no later token can change: a replacement character at the end may become another."""
    return len(text.rstrip(_REPLACEMENT))
