"""A disk that fills up under the real process: what is there is served, and uploads work again once there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux import Client
from loramux.errors import Unavailable
from loramux.local_server import LocalServer
from loramux.retry import NO_RETRY
from support.corpus import INVOCATION, KINDS, make_corpus
from support.live import GREEDY
from support.small_disk import fill, small_disk

OPTIONS = {"dtype": "float32", "kv_bytes": "64MiB", "readiness_seconds": "0.2", "drain_seconds": "5"}
PROMPT = [5, 17, 4, *INVOCATION, 33, 8]


def answers(client: Client) -> dict[str, tuple[int, ...]]:
    """Of every kind, by its name."""
    return {
        kind: client.generate(token_ids=PROMPT, adapter=kind, **{**GREEDY, "max_tokens": 8, "return_token_ids": True})
        .choices[0]
        .token_ids
        for kind in KINDS
    }


@pytest.mark.slow
def test_on_a_full_disk_adapters_of_every_kind_are_served_and_uploads_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    with (
        small_disk(tmp_path / "disk", "24m") as root,
        LocalServer({**OPTIONS, "data_dir": str(root / "data")}, log=tmp_path / "log") as server,
        Client(server.address, retry=NO_RETRY) as client,
    ):
        for kind in KINDS:
            client.push(corpus[f"{kind}-0"], kind)
        before, digests = answers(client), {adapter.name: adapter.digest for adapter in client.adapters()}
        ballast = root / "ballast"
        with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
            fill(stream)

        for kind in KINDS:
            with pytest.raises(Unavailable, match=r"full|space") as refusal:
                client.push(corpus[f"{kind}-1"], kind)
            assert refusal.value.reason == "STORE_FULL"
            with pytest.raises(Unavailable):
                client.push(corpus[f"{kind}-1"], f"{kind}-ephemeral", ttl=1000, max_uses=2)
        assert {adapter.name: adapter.digest for adapter in client.adapters()} == digests
        assert answers(client) == before

        ballast.unlink()
        for kind in KINDS:
            client.push(corpus[f"{kind}-1"], kind)
            client.push(corpus[f"{kind}-1"], f"{kind}-ephemeral", ttl=1000, max_uses=2)
        found = {adapter.name: adapter for adapter in client.adapters()}
        assert all(found[kind].digest != digests[kind] for kind in KINDS)
        assert all(found[f"{kind}-ephemeral"].uses_left == 2 for kind in KINDS)
        after = answers(client)
        assert sum(after[kind] != before[kind] for kind in KINDS) > len(KINDS) // 2
