"""What the store's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.corpus import make_corpus, write_specs


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of every kind, for `crash_server.load_corpus`."""
    root = tmp_path_factory.mktemp("corpus")
    write_specs(root, make_corpus(root))
    return root
