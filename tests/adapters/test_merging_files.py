"""Directories summed to one: against PEFT's add_weighted_adapter, against serving the sum, and in float64."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.combination import LARGEST_WEIGHT
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.declared_base import FINGERPRINT_KEY
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.merging_files import merge_files
from support.adapters import (
    edit_config,
    edit_tensors,
    files_of,
    load_in_peft,
    make_adapter,
    peft_deltas,
    peft_warnings_ignored,
    save,
    spec_of,
    tiny_model,
)
from support.against_peft import engine_for, prompts
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.combined import add_combination
from support.kinds import make_kind, targets_of

LIMITS = ReadLimits()
BOUND = 1e-6
"""Of float32 sums, relative to the largest element."""

Terms = list[tuple[Path, float]]


def _names(architecture: str) -> dict[str, list[str]]:
    if architecture == "gpt2":
        return {"attention": ["c_attn"], "mlp": ["c_fc"], "embedding": ["wte"]}
    return {"attention": ["q_proj", "v_proj"], "mlp": ["up_proj", "down_proj"], "embedding": ["embed_tokens"]}


def _three(model: PreTrainedModel, root: Path) -> Terms:
    """Other modules, ranks and scales in each; the first has no rslora, as PEFT takes it over for the sum."""
    names, transposed = _names(model.config.model_type), model.config.model_type == "gpt2"
    first, second, end = names["attention"][0], names["mlp"][0], names["embedding"]
    options: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 6, "target_modules": names["attention"] + end},
        {"r": 3, "use_rslora": True, "target_modules": names["mlp"] + names["attention"], "lora_alpha": 5,
         "rank_pattern": {first: 7}, "alpha_pattern": {second: 2}},
        {"r": 5, "target_modules": names["attention"] + end, "layers_to_transform": [1]},
    ]  # fmt: skip
    return [
        (make_adapter(model, root / str(index), seed=index, fan_in_fan_out=transposed, **each), weight)
        for index, (each, weight) in enumerate(zip(options, (0.7, -1.3, 2.0), strict=True))
    ]


def _sum_in_peft(model: PreTrainedModel, terms: Terms, **options: Any) -> dict[str, torch.Tensor]:
    with peft_warnings_ignored():
        wrapped: Any = load_in_peft(model, terms[0][0])
        names = ["default"]
        for index, (directory, _) in enumerate(terms[1:]):
            wrapped.load_adapter(str(directory), f"more{index}")
            names.append(f"more{index}")
        wrapped.add_weighted_adapter(names, [weight for _, weight in terms], "sum", **options)
    return peft_deltas(wrapped, "sum")


def _assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float = BOUND) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert float((found[name] - delta).abs().max() / delta.abs().max()) < bound, name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_cat_is_the_sum_of_what_peft_makes_of_each(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    terms = _three(model, tmp_path)
    merged = merge_files(terms, tmp_path / "out", LIMITS)
    loaded = peft_deltas(load_in_peft(model, tmp_path / "out"))
    wanted: dict[str, torch.Tensor] = {}
    for directory, weight in terms:
        for name, delta in peft_deltas(load_in_peft(model, directory)).items():
            wanted[name] = wanted.get(name, 0) + weight * delta.double()
    _assert_close(loaded, wanted)
    _assert_close(loaded, _sum_in_peft(model, terms, combination_type="cat"))
    assert merged.modules == len(wanted)
    ranks = read(files_of(tmp_path / "out"), spec_of(model), LIMITS).spec.ranks
    assert merged.ranks == tuple(sorted(set(ranks.values())))
    assert max(ranks.values()) == 4 + 7 + 5
    assert (merged.energy_kept, merged.worst_module) == (None, None)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_svd_is_pefts_and_tells_the_energy_of_the_worst_module(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    names = _names(architecture)
    terms = [
        (make_adapter(model, tmp_path / str(seed), seed=seed, r=4, target_modules=names["attention"] + names["mlp"]), w)
        for seed, w in ((1, 0.8), (2, 0.5))
    ]
    whole = peft_deltas(load_in_peft(model, _written(terms, tmp_path / "cat")))
    merged = merge_files(terms, tmp_path / "out", LIMITS, rank=3)
    loaded = peft_deltas(load_in_peft(model, tmp_path / "out"))
    _assert_close(loaded, _sum_in_peft(model, terms, combination_type="svd", svd_rank=3), 1e-5)
    kept = {}
    for name, delta in whole.items():
        squares = torch.linalg.svdvals(delta.double()).square()
        kept[name] = float(squares[:3].sum() / squares.sum())
    assert merged.ranks == (3,)
    assert merged.worst_module == min(kept, key=lambda name: kept[name])
    assert merged.energy_kept == pytest.approx(min(kept.values()), rel=1e-5)
    assert merged.energy_kept is not None
    assert merged.energy_kept < 0.95


def _written(terms: Terms, out: Path) -> Path:
    merge_files(terms, out, LIMITS)
    return out


def test_a_rank_that_is_enough_loses_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    terms = _three(model, tmp_path)
    cat = _written(terms, tmp_path / "cat")
    merged = merge_files(terms, tmp_path / "out", LIMITS, rank=16)
    assert merged.energy_kept == 1.0
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (cat / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_written_serves_as_the_sum_does(architecture: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(wide_model(architecture), tmp_path / "base")
    ends = _names(architecture)["embedding"]
    adapters = {
        f"lora {rank}": make_kind(
            checkpoint,
            tmp_path / str(rank),
            peft.LoraConfig(task_type="CAUSAL_LM", r=rank, bias=bias, fan_in_fan_out=architecture == "gpt2", **targets),
            seed=rank,
            std=0.1,
        )
        for rank, bias, targets in (
            (4, "all", targets_of(architecture)),
            (7, "none", {"target_modules": _names(architecture)["attention"] + ends}),
            (5, "none", targets_of(architecture)),
        )
    }
    weights = dict(zip(adapters, (1.0, -0.5, 0.8), strict=True))
    adapters["written"] = _written([(adapters[name], weights[name]) for name in weights], tmp_path / "out")
    engine = engine_for(checkpoint, adapters)
    add_combination(engine, "summed", list(weights.items()), float_base(checkpoint).spec)
    prompt = prompts(1, shortest=9)[0]
    tickets = [engine.submit(name, prompt, 5) for name in ("written", "summed", "lora 4", "lora 5")]
    engine.run()
    written, summed, *others = tickets
    assert engine.tokens(written) == engine.tokens(summed)
    scale = engine.logits(summed).std()
    assert float((engine.logits(written) - engine.logits(summed)).abs().max() / scale) < 1e-5
    for other in others:
        assert float((engine.logits(written)[0] - engine.logits(other)[0]).abs().max() / scale) > 1e-2


def _synthetic(directory: Path, seed: int, ranks: dict[str, int], alpha: float, dtype: torch.dtype) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rank in ranks.items():
        a, b = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "target_modules": sorted(ranks), "rank_pattern": ranks}
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    peft_file = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(peft_file, directory / WEIGHTS_FILE)
    return directory


def _deltas(directory: Path) -> dict[str, torch.Tensor]:
    """In float64, by the config's own rule for exact names."""
    config, tensors = json.loads((directory / CONFIG_FILE).read_text()), load_file(directory / WEIGHTS_FILE)
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = config.get("alpha_pattern", {}).get(f"^{name}", config["lora_alpha"])
            b = tensors[key.replace("lora_A", "lora_B")]
            found[name] = alpha / len(a) * b.double() @ a.double()
    return found


_WEIGHTS = st.floats(0.01, LARGEST_WEIGHT).flatmap(lambda weight: st.sampled_from([weight, -weight]))
_RANKS = st.dictionaries(st.sampled_from(["x.0.q", "x.1.q", "x.10.q", "head"]), st.integers(1, 7), min_size=1)
_TERM = st.tuples(_WEIGHTS, _RANKS, st.sampled_from([0.5, 1, 8]), st.sampled_from([torch.float32, torch.bfloat16]))


@settings(max_examples=40, deadline=None)
@given(terms=st.lists(_TERM, min_size=1, max_size=4), rank=st.none() | st.integers(1, 8))
def test_any_weights_and_ranks(terms: list[Any], rank: int | None) -> None:
    """The sum in float64, or its best approximation of the rank: the energy that is left out is what SVD says."""
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        made = [
            (_synthetic(root / str(seed), seed, ranks, alpha, dtype), weight)
            for seed, (weight, ranks, alpha, dtype) in enumerate(terms)
        ]
        wanted: dict[str, torch.Tensor] = {}
        for directory, weight in made:
            for name, delta in _deltas(directory).items():
                wanted[name] = wanted.get(name, torch.zeros(5, 6, dtype=torch.float64)) + weight * delta
        merged = merge_files(made, root / "out", LIMITS, rank=rank)
        found = _deltas(root / "out")
    assert found.keys() == wanted.keys()
    largest = max(abs(weight) for _, weight in made) * 100
    for name, delta in wanted.items():
        values = torch.linalg.svdvals(delta)
        lost = 0.0 if rank is None else float(values[rank:].square().sum().sqrt())
        assert float((found[name] - delta).norm()) == pytest.approx(lost, abs=largest * 1e-5)
    if rank is not None:
        assert max(merged.ranks) <= rank
        assert merged.energy_kept is not None
        squares = [torch.linalg.svdvals(delta).square() for delta in wanted.values()]
        assert merged.energy_kept == pytest.approx(min(float(s[:rank].sum() / s.sum()) for s in squares), abs=1e-4)


def test_of_a_module_that_is_not_changed_nothing_is_lost(tmp_path: Path) -> None:
    one = _synthetic(tmp_path / "one", 1, {"q": 3, "v": 2}, 1.0, torch.float32)
    edit_tensors(one, lambda tensors: {name: each * ("q.lora_B" not in name) for name, each in tensors.items()})
    merged = merge_files([(one, 1.0)], tmp_path / "out", LIMITS, rank=2)
    assert merged.energy_kept == 1.0
    assert not _deltas(tmp_path / "out")["q"].any()


def _biases(wrapped: Any) -> dict[str, torch.Tensor]:
    state = wrapped.merge_and_unload().state_dict()
    return {name: tensor for name, tensor in state.items() if name.endswith("bias")}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_whole_biases_add_where_their_weights_come_to_1(architecture: str, bias: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    targets = _names(architecture)["attention"]
    terms = [
        (make_adapter(model, tmp_path / str(seed), seed=seed, bias=bias, target_modules=targets), weight)
        for seed, weight in ((1, 0.1), (2, 0.9))
    ]
    each = [_biases(load_in_peft(model, directory)) for directory, _ in terms]
    merge_files(terms, tmp_path / "out", LIMITS)
    found = _biases(load_in_peft(model, tmp_path / "out"))
    for name, value in found.items():
        torch.testing.assert_close(value, 0.1 * each[0][name] + 0.9 * each[1][name], msg=name)
    read(files_of(tmp_path / "out"), spec_of(model), LIMITS)
    with pytest.raises(AdapterIncompatible, match=r"1=0.5 and .*2=0.9: its file holds the whole bias of .*come to 1"):
        merge_files([(terms[0][0], 0.5), terms[1]], tmp_path / "refused", LIMITS)
    plain = make_adapter(model, tmp_path / "plain", seed=3, target_modules=_names(architecture)["mlp"])
    beside = [(terms[0][0], 1.0), (plain, 0.5)]
    if bias == "all":
        merge_files(beside, tmp_path / "beside", LIMITS)
        for name, value in _biases(load_in_peft(model, tmp_path / "beside")).items():
            torch.testing.assert_close(value, each[0][name], msg=name)
    else:
        with pytest.raises(AdapterIncompatible, match="whose bias the file would need"):
            merge_files(beside, tmp_path / "beside", LIMITS)


def test_biases_of_low_ranks_add_by_any_weights(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    terms = [
        (make_adapter(model, tmp_path / "1", seed=1, lora_bias=True, target_modules=["q_proj"], lora_alpha=3), 0.4),
        (make_adapter(model, tmp_path / "2", seed=2, lora_bias=True, target_modules=["q_proj", "v_proj"]), -2.0),
        (make_adapter(model, tmp_path / "3", seed=3, target_modules=["k_proj"]), 0.5),
    ]
    merge_files(terms, tmp_path / "out", LIMITS)
    base = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("bias")}
    wanted = {name: tensor.clone() for name, tensor in base.items()}
    for directory, weight in terms:
        for name, value in _biases(load_in_peft(model, directory)).items():
            wanted[name] += weight * (value - base[name])
    for name, value in _biases(load_in_peft(model, tmp_path / "out")).items():
        torch.testing.assert_close(value, wanted[name], msg=name)
    whole = make_adapter(model, tmp_path / "4", seed=4, bias="all", target_modules=["k_proj"])
    merge_files([terms[0], (whole, 1.0)], tmp_path / "replaced", LIMITS)  # a delta on a bias that is another
    replaced, delta = (_biases(load_in_peft(model, directory)) for directory in (whole, terms[0][0]))
    for name, value in _biases(load_in_peft(model, tmp_path / "replaced")).items():
        torch.testing.assert_close(value, replaced[name] + 0.4 * (delta[name] - base[name]), msg=name)
    apart = make_adapter(model, tmp_path / "5", seed=5, bias="lora_only", target_modules=["k_proj"])
    with pytest.raises(AdapterIncompatible, match="lora_bias and another bias"):
        merge_files([terms[0], (apart, 1.0)], tmp_path / "refused", LIMITS)


def test_the_bases_own_tables_are_kept_where_they_are_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    terms = []
    for seed, targets in enumerate((["embed_tokens"], ["lm_head", "q_proj"], ["q_proj"])):
        wrapped = load_in_peft(model, make_adapter(model, tmp_path / f"x{seed}", seed=seed, target_modules=targets))
        terms.append((save(wrapped, tmp_path / str(seed), save_embedding_layers=True), 0.5))
        tables = [name for name in _keys(tmp_path / str(seed)) if "lora" not in name]
        assert tables
    merge_files(terms, tmp_path / "out", LIMITS)
    read(files_of(tmp_path / "out"), spec_of(model), LIMITS)  # which compares them with the base's
    assert "base_model.model.lm_head.base_layer.weight" in _keys(tmp_path / "out")
    other = tiny_model("llama", tie_word_embeddings=False, seed=1)
    terms[0] = (make_adapter(other, tmp_path / "other", seed=0, target_modules=["embed_tokens"]), 0.5)
    with pytest.raises(AdapterIncompatible, match=r"the base's own weight of .* is not that in"):
        merge_files(terms, tmp_path / "refused", LIMITS)


def _keys(directory: Path) -> list[str]:
    return list(load_file(directory / WEIGHTS_FILE))


def _declare(directory: Path, fingerprint: str | None) -> None:
    edit_tensors(directory, lambda tensors: tensors, {FINGERPRINT_KEY: fingerprint} if fingerprint else {})


def test_a_base_is_declared_where_all_declare_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    terms = [(make_adapter(model, tmp_path / str(seed), seed=seed), 1.0) for seed in range(2)]

    def declared(one: str | None, other: str | None) -> str | None:
        _declare(terms[0][0], one)
        _declare(terms[1][0], other)
        merged = merge_files(terms, tmp_path / "out", LIMITS, force=True)
        with safe_open(tmp_path / "out" / WEIGHTS_FILE, "pt") as file:
            assert (file.metadata() or {}).get(FINGERPRINT_KEY) == merged.base_fingerprint
        return merged.base_fingerprint

    assert declared("a" * 64, "a" * 64) == "a" * 64
    assert declared("a" * 64, None) is None
    assert declared(None, None) is None
    with pytest.raises(AdapterIncompatible, match=r"0 was trained on base aaaaaaaaaaaa and .*1 on bbbbbbbbbbbb"):
        declared("a" * 64, "b" * 64)


def test_tokenizers_invocations_and_common_keys_go_along(tmp_path: Path) -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj"]}
    terms = [(make_adapter(model, tmp_path / str(seed), seed=seed, **options), 1.0) for seed in range(2)]
    edit_config(terms[0][0], base_model_name_or_path="base", revision="x")
    edit_config(terms[1][0], base_model_name_or_path="base", revision="y")
    (terms[1][0] / "chat_template.jinja").write_text("{{ messages }}")
    merge_files(terms, tmp_path / "out", LIMITS)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", None)
    assert config["alora_invocation_tokens"] == [5, 6]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read(files_of(tmp_path / "out"), spec_of(model), LIMITS).spec.invocation == (5, 6)
    (terms[0][0] / "chat_template.jinja").write_text("other")
    with pytest.raises(AdapterIncompatible, match="bring different tokenizers or chat templates"):
        merge_files(terms, tmp_path / "refused", LIMITS)
