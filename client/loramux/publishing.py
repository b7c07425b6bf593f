"""A new version made public: uploaded beside what serves, measured there, and switched to where it is better.

The name is never without a version, and never switched where somebody else has moved it since it was measured.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

from loramux.client import Client
from loramux.errors import LoramuxError, NotFound
from loramux.types import ProgressCallback, Pushed

_CANDIDATE_SECONDS = 3600.0
"""What is left of a publish that was killed is gone after this."""


@dataclass(frozen=True)
class Verdict:
    """What a gate found: `says` is one sentence for people."""

    passed: bool
    says: str


Gate = Callable[[Client, str, str], Verdict]
"""(client, the candidate, what serves: a reference, empty for the base) -> whether the candidate takes its place."""


@dataclass(frozen=True)
class Publication:
    """What came of a publish. `digest` is the candidate's, `before` what the name pointed at, None where it was new."""

    name: str
    digest: str
    before: str | None
    verdict: Verdict | None
    is_switched: bool


def publish(
    client: Client,
    directory: str | PathLike[str],
    name: str,
    *,
    gate: Gate | None = None,
    report: ProgressCallback | None = None,
) -> Publication:
    """Publish the adapter in `directory` as `name`, if the `gate` lets it pass.

    Without a gate it is pushed. With one it is uploaded under a name of its own for the while, so that the server
    measures it before anybody is served by it; then the name is switched, as it was when it was measured. Raises the
    client's errors: FailedPrecondition where the name was moved meanwhile, or the server refuses the certificate. What
    serves goes on serving after any of them.
    """
    before = _current(client, name)
    if gate is None:
        return _published(client.push(directory, name, progress=report), before, None)
    candidate = f"{name[:40]}-candidate-{secrets.token_hex(4)}"
    pushed = client.push(directory, candidate, progress=report, ttl=_CANDIDATE_SECONDS)
    try:
        digest = pushed.adapter.digest
        reference = f"{name}@{before}" if before is not None else ""
        verdict = gate(client, f"{candidate}@{digest}", reference)
        if not verdict.passed:
            return Publication(name, digest, before, verdict, is_switched=False)
        if before is None:
            return _published(client.push(directory, name, if_version=""), before, verdict)
        client.update(name, version=digest, if_version=before)
        return Publication(name, digest, before, verdict, is_switched=True)
    finally:
        with contextlib.suppress(LoramuxError):  # it ends by itself
            client.delete(candidate)


def _current(client: Client, name: str) -> str | None:
    try:
        return client.adapter(name).digest
    except NotFound:
        return None


def _published(pushed: Pushed, before: str | None, verdict: Verdict | None) -> Publication:
    return Publication(pushed.adapter.name, pushed.adapter.digest, before, verdict, is_switched=True)
