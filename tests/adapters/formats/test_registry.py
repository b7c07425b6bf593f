"""What is refused about a whole adapter: files, modules, shapes, ranks, biases, copies of the base, the base itself."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from loramux_adapters.adapter_files import REQUIRED_FILES
from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.weights import AdapterWeights
from support.adapters import (
    CONFIG,
    WEIGHTS,
    edit_config,
    edit_tensors,
    files_of,
    make_adapter,
    save,
    spec_of,
    tiny_model,
    wrap,
)
from support.timing import processor_seconds

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
LORAMUX = "loramux.json"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=False)


@pytest.fixture
def adapter(model: PreTrainedModel, tmp_path: Path) -> Path:
    return make_adapter(model, tmp_path, target_modules=["q_proj", "v_proj"], r=4)


def read_directory(directory: Path, model: PreTrainedModel, limits: ReadLimits | None = None) -> AdapterWeights:
    return read(files_of(directory), spec_of(model), limits or ReadLimits())


def test_only_an_adapters_own_files_are_taken(adapter: Path, model: PreTrainedModel) -> None:
    for name in ("README.md", "adapter_model.bin", "../adapter_config.json", "/etc/passwd", "a\0b", "optimizer.pt"):
        with pytest.raises(AdapterInvalid, match="not a file of an adapter"):
            read(files_of(adapter) | {name: adapter / CONFIG}, spec_of(model), ReadLimits())


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_config_and_weights_are_required(name: str, adapter: Path, model: PreTrainedModel) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterInvalid, match=f"{name} is missing"):
        read_directory(adapter, model)


@pytest.mark.parametrize("method", ["EARLIER_THAN_US", "lora", "LATER_THAN_US", None, 7, ["LORA"], {}])
def test_another_method_is_refused(method: Any, adapter: Path, model: PreTrainedModel) -> None:
    edit_config(adapter, peft_type=method)
    with pytest.raises(AdapterInvalid, match="peft_type") as refusal:
        read_directory(adapter, model)
    assert "LORA" in refusal.value.remedy


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: make(tensors[name])}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """The tensors under other names."""
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], type[AdapterError], str]] = {
    "module without A": (without(A), AdapterInvalid, "layers.0.self_attn.q_proj': adapter_config.json selects"),
    "module without B": (without(B), AdapterInvalid, "its lora_B is missing"),
    "module of a deeper base": (
        added(f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight", 4, 32),
        AdapterIncompatible,
        "has no module 'model.layers.9.self_attn.q_proj'",
    ),
    "module that is not selected": (
        added(f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight", 4, 32),
        AdapterInvalid,
        "does not select module",
    ),
    "no prefix": (lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}, AdapterInvalid, "PEFT would not load"),
    "DoRA magnitude": (added(f"{Q0}.lora_magnitude_vector", 32), AdapterInvalid, "does not ask for it"),
    "bias of lora_B": (added(f"{Q0}.lora_B.bias", 32), AdapterInvalid, "does not ask for it"),
    "adapter name in the key": (
        lambda t: {k.replace("lora_A", "lora_A.default"): v for k, v in t.items()},
        AdapterInvalid,
        "no part of a LoRA adapter",
    ),
    "embedding names on a linear": (added(f"{Q0}.lora_embedding_A", 4, 32), AdapterInvalid, "would look for"),
    "bias that the config does not have": (added(f"{Q0}.base_layer.bias", 32), AdapterInvalid, "has bias 'none'"),
    "bias where PEFT would not look": (added(f"{Q0}.bias", 32), AdapterInvalid, "would look for '.base_layer.bias'"),
    "weight of the base": (added(f"{Q0}.base_layer.weight", 32, 32), AdapterInvalid, "embedding and the head only"),
    "compiled": (renamed("layers.0.", "layers.0._orig_mod."), AdapterInvalid, "a wrapper of torch.compile"),
    "FSDP": (renamed("layers.0.", "layers.0._fsdp_wrapped_module."), AdapterInvalid, "a wrapper of FSDP"),
    "checkpointed": (
        renamed("layers.0.", "layers.0._checkpoint_wrapped_module."),
        AdapterInvalid,
        "remove '_checkpoint_wrapped_module.' from the names",
    ),
    "compiled as a whole": (renamed("base_model.", "_orig_mod.base_model."), AdapterInvalid, "a wrapper of torch.comp"),
    "DDP": (renamed("base_model.", "module.base_model."), AdapterInvalid, "a wrapper of DistributedDataParallel"),
    "ZeRO-3": (replaced(B, lambda b: b[:0]), AdapterInvalid, "is empty (shape [0, 4]): it was saved while DeepSpeed"),
    "a word": (added("words", 1), AdapterInvalid, "'words'"),
    "A of another width": (replaced(A, lambda a: a[:, :16]), AdapterIncompatible, "[4, 16] should be [4, 32]"),
    "B of another height": (replaced(B, lambda b: b[:16]), AdapterIncompatible, "[16, 4] should be [32, 4]"),
    "A transposed": (replaced(A, lambda a: a.T), AdapterIncompatible, "[32, 4] should be [4, 32]"),
    "A of another rank": (replaced(A, lambda a: a[:2]), AdapterIncompatible, "check r and rank_pattern"),
    "A flat": (replaced(A, lambda a: a.reshape(-1)), AdapterIncompatible, "[128] should be [4, 32]"),
    "integers": (replaced(A, lambda a: a.to(torch.int32)), AdapterInvalid, "dtype 'I32'"),
    "NaN": (replaced(B, lambda b: b * math.nan), AdapterInvalid, "q_proj.lora_B.weight' holds NaN"),
    "Inf": (replaced(A, lambda a: a / 0), AdapterInvalid, "q_proj.lora_A.weight' holds NaN or inf"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_refused_by_name(fault: str, adapter: Path, model: PreTrainedModel) -> None:
    change, error, words = TENSOR_FAULTS[fault]
    edit_tensors(adapter, change)
    with pytest.raises(error) as refusal:
        read_directory(adapter, model)
    assert type(refusal.value) is error
    assert words in str(refusal.value)
    assert WEIGHTS in refusal.value.subject
    assert refusal.value.remedy


def test_an_adapter_of_another_architecture_is_incompatible(adapter: Path) -> None:
    with pytest.raises(AdapterIncompatible, match="selects no module of gpt2 base"):
        read_directory(adapter, tiny_model("gpt2"))


def test_an_adapter_of_another_width_is_incompatible(adapter: Path) -> None:
    with pytest.raises(AdapterIncompatible, match=r"shape \[.*\] should be"):
        read_directory(adapter, tiny_model("llama", hidden_size=64, head_dim=16))


def test_a_rank_over_the_limit_is_incompatible(model: PreTrainedModel, tmp_path: Path) -> None:
    make_adapter(model, tmp_path, target_modules=["q_proj"], r=2, rank_pattern={"layers.1.self_attn.q_proj": 9})
    assert read_directory(tmp_path, model, ReadLimits(max_rank=9)).spec.max_rank == 9
    with pytest.raises(AdapterIncompatible, match=r"layers\.1.*rank 9 is over this server's limit of 8"):
        read_directory(tmp_path, model, ReadLimits(max_rank=8))


def test_an_unused_default_rank_over_the_limit_is_not_held_against_it(model: PreTrainedModel, tmp_path: Path) -> None:
    make_adapter(model, tmp_path, target_modules=["q_proj"], r=64, rank_pattern={"q_proj": 4})
    assert read_directory(tmp_path, model, ReadLimits(max_rank=8)).spec.max_rank == 4


def test_a_scale_that_overflows_is_refused(adapter: Path, model: PreTrainedModel) -> None:
    edit_config(adapter, lora_alpha=1e41)
    with pytest.raises(AdapterInvalid, match=r"makes lora_B .* infinite") as refusal:
        read_directory(adapter, model)
    assert "lora_alpha" in refusal.value.subject


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_a_missing_bias_is_refused(mode: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    make_adapter(model, tmp_path, target_modules=["c_attn"], bias=mode)
    edit_tensors(tmp_path, without(f"{PREFIX}transformer.h.1.attn.c_attn.base_layer.bias"))
    with pytest.raises(AdapterInvalid, match=r"h\.1\.attn\.c_attn.*bias is missing"):
        read_directory(tmp_path, model)


PATTERN_BOMB = r"(?:a|[a-z_.0-9]|.)+[!%]"
CONFIG_FAULTS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoModel": "evil.Model"}},
    "huge r": {"r": 10**9},
    "target bomb": {"target_modules": PATTERN_BOMB},
    "the faults table's bomb": {"target_modules": r"(([a-z_.0-9])+)+!"},
    "exclude bomb": {"exclude_modules": PATTERN_BOMB},
    "rank key bomb": {"rank_pattern": {PATTERN_BOMB: 4}},
    "alpha key bomb": {"alpha_pattern": {PATTERN_BOMB: 4}},
    "layers bomb": {"layers_to_transform": [0], "layers_pattern": [r"(?:a|[a-z]|.)+[!%]"]},
    "compile bomb": {"rank_pattern": {"(?:" * 150 + "a|b" + ")+" * 150: 4}},
    "many keys": {"rank_pattern": {f"(q|k){number}.*": 4 for number in range(20_000)}},
    "too many keys to compile": {"rank_pattern": {f"(q|k){number}.*": 4 for number in range(1_000)}},
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_hostile_configs_are_refused_in_time(fault: str, adapter: Path, model: PreTrainedModel) -> None:
    edit_config(adapter, **CONFIG_FAULTS[fault])
    base = spec_of(model)
    with processor_seconds() as spent, pytest.raises(AdapterError) as refusal:
        read(files_of(adapter), base, ReadLimits())
    assert spent.seconds < 0.05
    assert CONFIG in refusal.value.subject


def test_a_pickle_in_safetensors_clothing_is_never_unpickled(adapter: Path, model: PreTrainedModel) -> None:
    torch.save({"x": torch.ones(2)}, adapter / WEIGHTS)
    with pytest.raises(AdapterInvalid, match=r"looks like a zip archive \(a PyTorch \.bin or \.pt file is one\)"):
        read_directory(adapter, model)


class TestCopiesOfTheBase:
    """PEFT writes the embedding or head along when one of them is a target."""

    @pytest.fixture
    def adapter(self, model: PreTrainedModel, tmp_path: Path) -> Path:
        return make_adapter(model, tmp_path, target_modules=["embed_tokens", "lm_head"], r=4)

    def test_equal_ones_are_left_out(self, adapter: Path, model: PreTrainedModel) -> None:
        module = read_directory(adapter, model).modules["lm_head"]
        assert module.get(Bias) is None
        assert module.get(LowRank) is not None

    @pytest.mark.parametrize("name", ["lm_head.base_layer.weight", "model.embed_tokens.base_layer.weight"])
    def test_trained_ones_are_refused(self, name: str, adapter: Path, model: PreTrainedModel) -> None:
        edit_tensors(adapter, replaced(f"{PREFIX}{name}", lambda weight: weight + 1e-6))
        with pytest.raises(AdapterInvalid, match="differs from the base's own weight"):
            read_directory(adapter, model)

    def test_one_that_was_resized_alone_is_refused(self, adapter: Path, model: PreTrainedModel) -> None:
        name = f"{PREFIX}lm_head.base_layer.weight"
        edit_tensors(adapter, replaced(name, lambda weight: torch.cat([weight, weight[:1]])))
        with pytest.raises(AdapterInvalid, match=r"of 64 tokens and .* of 65"):
            read_directory(adapter, model)

    def test_a_wider_dtype_counts_as_equal_when_nothing_is_lost(self, tmp_path: Path) -> None:
        base = tiny_model("llama", tie_word_embeddings=False).to(torch.bfloat16)
        make_adapter(base.float(), tmp_path / "wide", target_modules=["lm_head"], r=4)
        base.to(torch.bfloat16)
        assert set(read_directory(tmp_path / "wide", base).modules) == {"lm_head"}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_narrower_dtype_counts_as_equal_when_it_is_the_bases_own_rounded(
        self, dtype: torch.dtype, adapter: Path, model: PreTrainedModel
    ) -> None:
        edit_tensors(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert {"lm_head", "model.embed_tokens"} == set(read_directory(adapter, model).modules)
        trained = f"{PREFIX}lm_head.base_layer.weight"
        edit_tensors(adapter, replaced(trained, lambda weight: torch.nextafter(weight, torch.ones_like(weight))))
        with pytest.raises(AdapterInvalid, match="differs from the base's own weight"):
            read_directory(adapter, model)

    def test_a_tied_head_in_half_precision_is_the_bases_own(self, tmp_path: Path) -> None:
        """As a bfloat16 checkpoint that was trained in float16 leaves it: small values are rounded."""
        base = tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
        with torch.no_grad():
            base.get_input_embeddings().weight[0] = 1.1e-6
        assert not torch.equal(base.get_input_embeddings().weight.half().bfloat16(), base.get_input_embeddings().weight)
        make_adapter(copy.deepcopy(base).half(), tmp_path, target_modules=["lm_head"], r=4)
        assert set(read_directory(tmp_path, base).modules) == {"lm_head"}

    def test_a_tied_head_is_compared_with_the_embedding(self, tmp_path: Path) -> None:
        base = tiny_model("llama", tie_word_embeddings=True)
        make_adapter(base, tmp_path, target_modules=["lm_head"], r=4)
        assert "lm_head.weight" not in spec_of(base).parameters
        assert set(read_directory(tmp_path, base).modules) == {"lm_head"}

    @pytest.mark.parametrize("matrix", ["A", "B"])
    def test_tied_adapters_that_differ_are_refused(self, matrix: str, tmp_path: Path) -> None:
        base = tiny_model("llama", tie_word_embeddings=True)
        make_adapter(base, tmp_path, target_modules=["embed_tokens"], r=4, ensure_weight_tying=True)
        edit_tensors(tmp_path, replaced(f"{PREFIX}lm_head.lora_{matrix}.weight", lambda factor: factor * 2))
        with pytest.raises(AdapterInvalid, match="ensure_weight_tying is set, but"):
            read_directory(tmp_path, base)


class TestDeclaredBase:
    OTHER = "ab" * 32

    def declare(self, adapter: Path, fingerprint: str) -> None:
        edit_tensors(adapter, lambda tensors: tensors, {"loramux_base_fingerprint": fingerprint})

    def test_its_own_base_is_accepted(self, adapter: Path, model: PreTrainedModel) -> None:
        own = spec_of(model).fingerprint
        self.declare(adapter, own)
        (adapter / LORAMUX).write_text(json.dumps({"loramux_base_fingerprint": own}))
        spec = read_directory(adapter, model).spec
        assert (spec.base_fingerprint, spec.base_mismatch) == (own, False)

    @pytest.mark.parametrize("where", ["metadata", LORAMUX])
    def test_another_base_is_refused_unless_allowed(self, where: str, adapter: Path, model: PreTrainedModel) -> None:
        undeclared = read_directory(adapter, model).spec
        if where == LORAMUX:
            (adapter / LORAMUX).write_text(json.dumps({"loramux_base_fingerprint": self.OTHER}))
        else:
            self.declare(adapter, self.OTHER)
        with pytest.raises(AdapterIncompatible, match=f"trained on base {self.OTHER}"):
            read_directory(adapter, model)
        spec = read(files_of(adapter), spec_of(model), ReadLimits(), allow_base_mismatch=True).spec
        assert (spec.base_fingerprint, spec.base_mismatch) == (self.OTHER, True)
        assert spec.digest == undeclared.digest

    @pytest.mark.parametrize("value", ["", "xyz", "AB" * 32, "ab" * 33])
    def test_what_is_no_fingerprint_is_refused(self, value: str, adapter: Path, model: PreTrainedModel) -> None:
        self.declare(adapter, value)
        with pytest.raises(AdapterInvalid, match="is not 64 hex digits"):
            read_directory(adapter, model)

    def test_two_different_declarations_are_refused(self, adapter: Path, model: PreTrainedModel) -> None:
        self.declare(adapter, spec_of(model).fingerprint)
        (adapter / LORAMUX).write_text(json.dumps({"loramux_base_fingerprint": self.OTHER}))
        with pytest.raises(AdapterInvalid, match="declare different bases"):
            read_directory(adapter, model)

    @pytest.mark.parametrize("file", ["loramux.json", "lorica.json"])
    @pytest.mark.parametrize("key", ["loramux_base_fingerprint", "lorica_base_fingerprint"])
    def test_declarations_of_the_former_name_are_read(
        self, file: str, key: str, adapter: Path, model: PreTrainedModel
    ) -> None:
        (adapter / file).write_text(json.dumps({key: self.OTHER}))
        with pytest.raises(AdapterIncompatible, match=f"trained on base {self.OTHER}"):
            read_directory(adapter, model)
        (adapter / file).write_text("{}")
        edit_tensors(adapter, lambda tensors: tensors, {key: self.OTHER})
        with pytest.raises(AdapterIncompatible, match=f"trained on base {self.OTHER}"):
            read_directory(adapter, model)

    def test_the_former_name_may_not_contradict_the_present_one(self, adapter: Path, model: PreTrainedModel) -> None:
        (adapter / "lorica.json").write_text(json.dumps({"lorica_base_fingerprint": self.OTHER}))
        (adapter / LORAMUX).write_text(json.dumps({"loramux_base_fingerprint": spec_of(model).fingerprint}))
        with pytest.raises(AdapterInvalid, match="declare different bases"):
            read_directory(adapter, model)

    @pytest.mark.parametrize("text", ['{"loramux_base_fingerprint": 7}', '{"secret": 1}', "[]", "{", '{"a":1,"a":1}'])
    def test_a_malformed_loramux_json_is_refused(self, text: str, adapter: Path, model: PreTrainedModel) -> None:
        (adapter / LORAMUX).write_text(text)
        with pytest.raises(AdapterInvalid, match=r"loramux\.json"):
            read_directory(adapter, model)


def test_an_old_bias_name_that_peft_would_drop_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    wrapped = wrap(model, target_modules=["c_attn"], bias="lora_only")
    save(wrapped, tmp_path)
    edit_tensors(tmp_path, lambda t: {name.replace(".base_layer.bias", ".bias"): tensor for name, tensor in t.items()})
    with pytest.raises(AdapterInvalid, match=r"would look for '\.base_layer\.bias'"):
        read_directory(tmp_path, model)


def test_an_empty_file_of_tensors_is_refused(adapter: Path, model: PreTrainedModel) -> None:
    save_file({}, adapter / WEIGHTS)
    with pytest.raises(AdapterInvalid, match="lora_A is missing"):
        read_directory(adapter, model)
