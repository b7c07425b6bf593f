"""Regular expressions from strangers, matched against module names within a budget of processor time.

A pattern is checked before it is compiled: matching can be stopped by a timeout, but compiling cannot, and
nested `+` of 150 levels makes the `regex` package take gigabytes. What passes means the same in `re`, which
PEFT uses, and in `regex`, which we use for its timeout. Knows nothing of PEFT's fields.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator

import regex

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote

_MAX_DEPTH = 20
# `regex` unrolls what must occur: x{9} costs nine x, (x+)+ costs four. Above this, compiling takes milliseconds.
_MAX_UNROLLED = 5_000

_ESCAPE = r"\\[dDwWsSbBAZ1-9.^$*+?{}()\[\]|/\\_\-]"
_TOKEN = re.compile(
    rf"""
    (?P<open> \((?!\?) | \(\? (?: [:=!>] | <[=!] | P<[A-Za-z_]\w*> ))
  | (?P<close> \))
  | (?P<bar> \|)
  | (?P<quantifier> (?: [*+?] | \{{ (?P<min>\d{{0,3}}) (?: , (?P<max>\d{{0,3}}) )? \}} ) [?+]? )
  | (?P<atom> {_ESCAPE}
      | \[ \^? \]? (?: {_ESCAPE} | (?! -- | && | \|\| | ~~ ) [\ -Z^-~] )* \]
      | \(\?P=\w+\)
      | [\ -',\-./0-9:;<=>@A-Z^_`a-z~] )
    """,
    re.VERBOSE,
)


class RegexBudget:
    """Processor time that all patterns of one adapter share. Not for use by two threads."""

    def __init__(self, limits: ReadLimits) -> None:
        self.limits = limits
        self._spent_at = time.thread_time() + limits.regex_seconds
        self._collections: int | None = _full_collections()

    def remaining(self, subject: str) -> float:
        """Seconds left. Raises AdapterInvalid naming `subject` when there are none.

        A full garbage collection takes longer than the whole budget in a process with torch, and none of it is the
        pattern's: when one fell into the matching, the budget begins anew, once.
        """
        left = self._spent_at - time.thread_time()
        if left <= 0 and self._collections is not None and self._collections != _full_collections():
            self._collections = None
            left = self.limits.regex_seconds
            self._spent_at = time.thread_time() + left
        if left <= 0:
            raise _too_slow(subject)
        return left


def _full_collections() -> int:
    return int(gc.get_stats()[-1]["collections"])


class SafePattern:
    """One compiled pattern. `subject` names the config field in errors."""

    def __init__(self, pattern: str, subject: str, budget: RegexBudget) -> None:
        """Raises AdapterInvalid for a pattern that is not valid, not safe, or means different things to parsers."""
        self._subject = subject
        self._budget = budget
        if len(pattern) > budget.limits.max_pattern_chars:
            raise _unsafe(subject, pattern, f"is longer than {budget.limits.max_pattern_chars} characters")
        _check_size(pattern, subject)
        budget.remaining(subject)
        try:
            re.compile(pattern)
            self._compiled = regex.compile(pattern, regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise _unsafe(subject, pattern, f"is not a regular expression ({error})") from None

    def fullmatch(self, name: str) -> bool:
        """As `re.fullmatch`. Raises AdapterInvalid when the budget runs out."""
        try:
            return self._compiled.fullmatch(name, timeout=self._budget.remaining(self._subject)) is not None
        except TimeoutError:
            raise _too_slow(self._subject) from None

    def match(self, name: str, group: str | int = 0) -> str | None:
        """As `re.match`: the text of `group`, None when the pattern does not match. Raises AdapterInvalid."""
        try:
            found = self._compiled.match(name, timeout=self._budget.remaining(self._subject))
        except TimeoutError:
            raise _too_slow(self._subject) from None
        return None if found is None else str(found[group])


def _check_size(pattern: str, subject: str) -> None:
    """Bound what compiling unrolls `pattern` to. Raises AdapterInvalid, also for syntax outside the common subset."""
    sizes = [0]  # of each open group, so far
    last = 0  # of the atom or group that a quantifier would repeat
    for token in _tokens(pattern, subject):
        match token.lastgroup:
            case "open":
                sizes.append(1)
                last = 0
            case "close" if len(sizes) > 1:
                last = sizes.pop()
                sizes[-1] += last
            case "quantifier":
                copies = _copies(token, pattern, subject)
                sizes[-1] += last * (copies - 1)
                last *= copies
            case _:
                last = 1
                sizes[-1] += last
        if len(sizes) > _MAX_DEPTH or sizes[-1] > _MAX_UNROLLED:
            raise _unsafe(subject, pattern, "is nested too deeply or repeats repetitions too often")


def _copies(token: re.Match[str], pattern: str, subject: str) -> int:
    text = token["quantifier"]
    if not text.startswith("{"):
        return 2 if text.startswith("+") else 1
    if not (token["min"] or token["max"]):
        raise _unsafe(subject, pattern, f"{text} is not a repetition")
    least = int(token["min"] or 0)
    # x{3} is three x; x{3,5} is three and an optional rest
    return max(least, 1) + (1 if token["max"] is not None else 0)


def _tokens(pattern: str, subject: str) -> Iterator[re.Match[str]]:
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            raise _unsafe(
                subject,
                pattern,
                f"has an unsupported construct at character {position}: {quote(pattern[position:][:12])}",
            )
        yield token
        position = token.end()


def _unsafe(subject: str, pattern: str, why: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{subject}: pattern {quote(pattern)} {why}", subject=subject, remedy="list the module names instead"
    )


def _too_slow(subject: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{subject}: matching took too long", subject=subject, remedy="list the module names instead of a pattern"
    )
