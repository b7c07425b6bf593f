"""Files of resized vocabularies that lack rows, contradict themselves or lie: refused, with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.added_tokens import AddedTokens
from loramux_adapters.parts.token_rows import TokenRows
from loramux_adapters.weights import AdapterWeights
from support.adapters import WEIGHTS, edit_config, edit_tensors, files_of, peft_warnings_ignored, save, spec_of
from support.adapters import tiny_model as tiny

V = 64
Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


def model_of(tied: bool) -> PreTrainedModel:
    return tiny("llama", tie_word_embeddings=tied)


def make(directory: Path, *, vocabulary: int = V + 3, tied: bool = False, saved: Any = True, **options: Any) -> Path:
    """A LoRA on the resized model as PEFT saves it."""
    resized = copy.deepcopy(model_of(tied))
    with peft_warnings_ignored():
        resized.resize_token_embeddings(vocabulary, mean_resizing=False)
        wrapped = get_peft_model(resized, LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **options}))
    return save(wrapped, directory, save_embedding_layers=saved)


def read_it(directory: Path, *, tied: bool = False, **limits: Any) -> AdapterWeights:
    return read(files_of(directory), spec_of(model_of(tied)), ReadLimits(**limits))


@pytest.mark.parametrize(
    ("tied", "options", "words"),
    [
        (False, {"modules_to_save": ["embed_tokens"]}, "lacks rows of theirs for 'lm_head'"),
        (False, {"modules_to_save": ["lm_head"]}, "lacks rows of theirs for 'model.embed_tokens'"),
        (True, {"modules_to_save": ["embed_tokens"]}, "lacks rows of theirs for 'lm_head'"),
        (False, {"trainable_token_indices": [V, V + 1]}, "lacks rows of theirs for 'lm_head'"),
        (True, {"trainable_token_indices": [V, V + 2]}, "lacks rows of theirs for 'model.embed_tokens'"),
        (False, {"target_modules": ["lm_head"]}, "lacks rows of theirs for 'model.embed_tokens'"),
    ],
)
def test_rows_that_are_in_no_tensor_are_refused(
    tmp_path: Path, tied: bool, options: dict[str, Any], words: str
) -> None:
    """What `resize_token_embeddings` drew at random and nobody saved is on no other machine."""
    with pytest.raises(AdapterInvalid, match=words) as caught:
        read_it(make(tmp_path, tied=tied, saved=False, **options), tied=tied)
    assert "modules_to_save" in caught.value.remedy


@pytest.mark.parametrize("vocabulary", [V + 3, V - 3])
def test_an_activated_one_is_refused(tmp_path: Path, vocabulary: int) -> None:
    """What is before the invocation is computed as the base's, which knows other tokens."""
    directory = make(tmp_path, vocabulary=vocabulary, alora_invocation_tokens=[3, 4])
    with pytest.raises(AdapterIncompatible, match=f"alora_invocation_tokens of a model with {vocabulary} tokens"):
        read_it(directory)


def test_trainable_tokens_alone_on_an_untied_base_lack_the_heads(tmp_path: Path) -> None:
    resized = copy.deepcopy(model_of(False))
    with peft_warnings_ignored():
        resized.resize_token_embeddings(V + 2, mean_resizing=False)
        config = TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[V, V + 1])
        wrapped = get_peft_model(resized, config)
    with pytest.raises(AdapterInvalid, match="lacks rows of theirs for 'lm_head'"):
        read_it(save(wrapped, tmp_path))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, PREFIX + name: change(tensors[PREFIX + name])}


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1, 0] = torch.nan
    return tensor


HOSTILE: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors], str]] = {
    "the base's rows trained": (
        {}, changed("model.embed_tokens.weight", lambda rows: rows + 1), "differs from the base's own weight"
    ),
    "another width": ({}, changed("lm_head.weight", lambda rows: rows[:, :8]), "differs from the base's own weight"),
    "another width, shrunk": (
        {"vocabulary": V - 2}, changed("lm_head.weight", lambda rows: rows[:, :8]), "differs from the base's own weight"
    ),
    "one axis": ({}, changed("lm_head.weight", lambda rows: rows[:, 0]), "differs from the base's own weight"),
    "ends of two sizes": ({}, changed("lm_head.weight", lambda rows: rows[:-1]), "of 66 tokens and .* of 67"),
    "two tables of one tied base": (
        {"tied": True}, changed("lm_head.weight", lambda rows: torch.cat([rows[:V], rows[V:] + 1])), "are one table"
    ),
    "trained twice": (
        BOTH, changed("lm_head.modules_to_save.weight", lambda rows: rows + 1), "are one table, and differ"
    ),
    "the original is another base's": (
        BOTH, changed("lm_head.original_module.weight", lambda rows: rows + 1), "differs from the base's own weight"
    ),
    "nan": ({}, changed("lm_head.weight", with_nan), "NaN or infinite"),
    "two copies": (
        {"trainable_token_indices": [V]},
        lambda tensors: {
            **tensors,
            f"{PREFIX}model.embed_tokens.base_layer.weight": tensors[
                f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight"
            ].clone(),
        },
        "another tensor of the file has its place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_contradict_the_base_or_themselves_are_refused(tmp_path: Path, name: str) -> None:
    options, change, words = HOSTILE[name]
    tied = bool(options.get("tied"))
    directory = make(tmp_path, **options)
    read_it(directory, tied=tied)
    edit_tensors(directory, change)
    with pytest.raises(AdapterError, match=words):
        read_it(directory, tied=tied)


def test_more_tokens_than_may_be_added_are_refused_by_the_header_alone(tmp_path: Path) -> None:
    directory = make(tmp_path)
    with pytest.raises(AdapterIncompatible, match=r"the adapter knows 67 tokens, more than the 64 .* and the 2"):
        read_it(directory, max_added_tokens=2)
    edit_config(directory, trainable_token_indices=[V, (1 << 31) - 1])
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 32)}
    save_file(rows, directory / WEIGHTS)
    with pytest.raises(AdapterIncompatible, match="knows 2147483648 tokens"):
        read_it(directory)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head"], "lora_bias": True}, {"target_modules": ["embed_tokens"], "use_dora": True}],
)
def test_what_cannot_be_divided_by_tokens_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(AdapterIncompatible, match="cannot be divided by tokens"):
        read_it(make(tmp_path, tied=True, **options), tied=True)


def test_copies_that_equal_the_base_cost_the_new_rows_alone(tmp_path: Path) -> None:
    modules = read_it(make(tmp_path)).modules
    for end in ("model.embed_tokens", "lm_head"):
        added = modules[end].get(AddedTokens)
        assert added is not None
        assert tuple(added.rows.shape) == (3, 32)
        assert modules[end].get(TokenRows) is None


def test_other_rows_are_another_adapter(tmp_path: Path) -> None:
    """Identity is content, the rows that nobody trained included."""
    directory = make(tmp_path)
    first = read_it(directory).spec
    assert first.vocabulary == V + 3
    edit_tensors(directory, changed("lm_head.weight", lambda rows: torch.cat([rows[:V], rows[V:] + 1])))
    assert read_it(directory).spec.digest != first.digest
