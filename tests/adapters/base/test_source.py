"""What is said of a base that cannot be had, by serve, train and doctor alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import errors as hub
from transformers import AutoConfig

from loramux_adapters.base.source import explain_load, find_base
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.errors import BaseInvalid
from support.hub_cache import COMMIT, cache_tiny


def _refusal(model: str, environ: dict[str, str]) -> BaseInvalid:
    with pytest.raises(BaseInvalid) as caught:
        find_base(model, environ)
    return caught.value


def test_a_directory_and_the_embedded_base_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_base("loramux-tiny", {}) == tiny_path()
    assert find_base(str(tiny_path()), {}) == tiny_path()
    monkeypatch.setenv("HOME", str(tiny_path().parent))
    assert find_base("~/loramux-tiny", {}) == tiny_path()


@pytest.mark.parametrize("model", ["loramux-tny", "/nowhere/base", "../absent/base", "~no-such-user/base", "a/b/c"])
def test_what_is_neither_directory_nor_hub_id_is_refused(model: str) -> None:
    refusal = _refusal(model, {})
    assert str(refusal) == f"there is no directory {model}, and it is not a hub id"
    assert "give a checkpoint directory, a hub id like org/name, or loramux-tiny" in refusal.remedy
    assert ("did you mean loramux-tiny?" in refusal.remedy) == (model == "loramux-tny")


def test_a_cached_model_is_found_and_half_a_one_only_where_the_rest_can_be_fetched(tmp_path: Path) -> None:
    online = {"HF_HOME": str(tmp_path)}
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    assert find_base("org/name", online) is None
    assert "is not in the local cache" in str(_refusal("org/name", offline))
    snapshot = cache_tiny(tmp_path / "hub", "org/name")
    for environ in (online, offline):
        assert find_base("org/name", environ) == snapshot
        assert find_base("org/name", environ, revision=COMMIT) == snapshot
    with pytest.raises(BaseInvalid, match="is not in the local cache"):
        find_base("org/name", offline, revision="other")
    cache_tiny(tmp_path / "hub", "org/half", without="tokenizer*")
    assert find_base("org/half", online) is None
    refusal = _refusal("org/half", offline)
    assert str(refusal).startswith("org/half cannot be loaded from the local cache: it holds no tokenizer")


@pytest.mark.parametrize("offline", ["", "1"])
@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (hub.RepositoryNotFoundError, "the hub has no such model"),
        (hub.GatedRepoError, "org/name is gated on the hub"),
        (hub.RevisionNotFoundError, "no such revision"),
        (hub.LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_the_hub_is_told_in_our_words_and_nobody_is_told_to_set_what_is_set(
    cause: type[Exception], says: str, offline: str
) -> None:
    error = OSError("We couldn't connect to 'https://hub'\nCheckout your internet connection")
    error.__cause__ = cause.__new__(cause)
    explained = explain_load("org/name", error, {"HF_HUB_OFFLINE": offline})
    if offline:
        assert "HF_HUB_OFFLINE=1" not in explained.remedy
        assert "set HF_HUB_OFFLINE" not in explained.remedy.replace("unset HF_HUB_OFFLINE", "")
    else:
        assert says in str(explained)
    assert "\n" not in str(explained)


def test_what_transformers_says_offline_is_recognized() -> None:
    with pytest.raises(OSError, match="connect") as caught:
        AutoConfig.from_pretrained("org/name-that-nobody-cached")
    explained = explain_load("org/name", caught.value, {"HF_HUB_OFFLINE": "1"})
    assert str(explained) == "org/name is not in the local cache and HF_HUB_OFFLINE is set"
