"""adapter_config.json: every option of PEFT's is classified, and what is refused says why and what to do."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.peft import lora
from loramux_adapters.formats.peft.lora import LoraTuner
from loramux_adapters.formats.peft.selection import Selection
from loramux_adapters.formats.peft.tuner import Tuner
from loramux_adapters.formats.registry import PEFT_METHODS
from support.adapters import peft_warnings_ignored
from support.timing import processor_seconds

NAME = "adapter_config.json"
MINIMAL: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["q_proj"]}
MAX_BYTES = 1 << 20


def parse_text(text: str | bytes, directory: Path) -> LoraTuner:
    path = directory / NAME
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return LoraTuner.parse(strict_json.read_object(path, NAME, MAX_BYTES))


@pytest.mark.parametrize("tuner", PEFT_METHODS, ids=lambda tuner: tuner.kind)
def test_every_option_of_peft_is_classified_once(tuner: type[Tuner]) -> None:
    known = [*tuner.keys.all_applied, *tuner.keys.refused, *tuner.keys.all_ignorable]
    assert len(known) == len(set(known))
    options = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(tuner.peft_type)])}
    # What all methods have to us, and not all to PEFT.
    common = {"bias", "runtime_config"}
    assert set(known) - common == options - common


def test_what_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "q_proj"]).save_pretrained(str(tmp_path))
    config = LoraTuner.parse(strict_json.read_object(tmp_path / NAME, NAME, MAX_BYTES))
    assert config == LoraTuner(
        r=8,
        alpha=8.0,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        selection=Selection(target_modules=frozenset({"q_proj", "v_proj"})),
        use_dora=False,
        lora_bias=False,
        bias="none",
    )


def test_what_is_left_out_has_pefts_defaults() -> None:
    written = LoraTuner.parse(json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=list)))
    assert LoraTuner.parse(MINIMAL) == written


NOT_DEFAULT: dict[str, Any] = {
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"x": 1},
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
}


def test_every_refused_option_has_a_case() -> None:
    assert set(NOT_DEFAULT) == set(lora.KEYS.refused)


@pytest.mark.parametrize("key", NOT_DEFAULT)
def test_refused_options_pass_at_their_default_only(key: str) -> None:
    for default in (None, False, [], {}, ""):
        assert LoraTuner.parse(MINIMAL | {key: default}) == LoraTuner.parse(MINIMAL)
    with pytest.raises(AdapterInvalid, match="not supported") as refusal:
        LoraTuner.parse(MINIMAL | {key: NOT_DEFAULT[key]})
    assert refusal.value.subject == f"{NAME}: {key}"
    assert refusal.value.remedy


@pytest.mark.parametrize("task", [None, *TaskType])
def test_the_task_changes_nothing(task: TaskType | None) -> None:
    assert LoraTuner.parse(MINIMAL | {"task_type": task and task.value}) == LoraTuner.parse(MINIMAL)


def test_the_head_of_a_classifier_is_refused_as_one() -> None:
    with pytest.raises(AdapterInvalid, match="modules_to_save") as refusal:
        LoraTuner.parse(MINIMAL | {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]})
    assert refusal.value.remedy == "the head of a classifier generates no text: only adapters without one are served"


def test_what_peft_writes_for_mixtures_of_experts_has_a_remedy_that_works(tmp_path: Path) -> None:
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, vocab_size=64, num_experts=2, num_experts_per_tok=1,
        )
    )  # fmt: skip

    def written(targets: str | list[str]) -> dict[str, Any]:
        with peft_warnings_ignored():
            wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
        wrapped.peft_config["default"].save_pretrained(str(tmp_path))
        config: dict[str, Any] = json.loads((tmp_path / NAME).read_text())
        return config

    for targets, left in (
        ("all-linear", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (["q_proj", "gate_proj", "up_proj"], ["q_proj"]),
    ):
        config = written(targets)
        assert config["target_parameters"]
        with pytest.raises(AdapterInvalid, match="experts and routers of mixture-of-experts models") as refusal:
            LoraTuner.parse(config)
        assert 'target_modules is "all-linear" or names projections of experts' in refusal.value.remedy
        assert refusal.value.remedy.endswith(f"train with target_modules={left}")
        assert LoraTuner.parse(written(left)).selection.target_modules == frozenset(left)


@pytest.mark.parametrize("key", sorted(lora.KEYS.all_ignorable))
def test_ignorable_options_change_nothing(key: str) -> None:
    assert LoraTuner.parse(MINIMAL | {key: {"any": [1, "thing"]}}) == LoraTuner.parse(MINIMAL)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unlisted_key_passes_when_it_says_nothing(value: Any) -> None:
    assert LoraTuner.parse(MINIMAL | {"option_of_peft_9": value}) == LoraTuner.parse(MINIMAL)


@pytest.mark.parametrize("value", [True, 1, 0, 0.0, "on", [0], {"a": 1}])
def test_an_unlisted_key_is_refused_when_it_says_something(value: Any) -> None:
    with pytest.raises(AdapterInvalid, match=r"option_of_peft_9.* not a known option"):
        LoraTuner.parse(MINIMAL | {"option_of_peft_9": value})


def test_auto_map_is_never_read() -> None:
    with pytest.raises(AdapterInvalid, match=r"auto_map.* not a known option"):
        LoraTuner.parse(MINIMAL | {"auto_map": {"AutoConfig": "evil.Config"}})


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_alone_are_read(value: Any) -> None:
    assert LoraTuner.parse(MINIMAL | {"init_lora_weights": value}) == LoraTuner.parse(MINIMAL)


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_initializations_that_move_the_base_are_known(value: str) -> None:
    assert LoraTuner.parse(MINIMAL | {"init_lora_weights": value}).moved_base == value.lower()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"task_type": "CHATTING"}, "is not a task of PEFT's"),
        ({"task_type": ["CAUSAL_LM"]}, "is not a task of PEFT's"),
        ({"init_lora_weights": "future"}, "not a known initialization"),
        ({"init_lora_weights": 1}, "not a known initialization"),
        ({"r": 0}, "r: 0 is not a rank"),
        ({"r": -4}, "r: -4 is not a rank"),
        ({"r": 10**9}, "r: 1000000000 is not a rank"),
        ({"r": 8.0}, "r: 8.0 is not a rank"),
        ({"r": True}, "r: True is not a rank"),
        ({"r": None}, "r: None is not a rank"),
        ({"rank_pattern": {"q_proj": "8"}}, "'rank_pattern of q_proj': '8' is not a rank"),
        ({"rank_pattern": [8]}, "rank_pattern: must map"),
        ({"lora_alpha": "8"}, "lora_alpha: '8' is not a finite number"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "not a finite number"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of q_proj"),
        ({"use_rslora": 1}, "neither true nor false"),
        ({"ensure_weight_tying": "yes"}, "neither true nor false"),
        ({"bias": "some"}, "bias: 'some'"),
        ({"bias": None}, "bias: None"),
        ({"target_modules": None}, "target_modules: is missing"),
        ({"target_modules": [1]}, "must be a string or a list of strings"),
        ({"target_modules": {"q_proj": 1}}, "must be a string or a list of strings"),
        ({"exclude_modules": [None]}, "must be a string or a list of strings"),
        ({"layers_to_transform": ["0"]}, "must be layer numbers"),
        ({"layers_to_transform": True}, "must be layer numbers"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "cannot go with a target_modules pattern"),
    ],
)
def test_values_that_mean_nothing_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterInvalid) as refusal:
        LoraTuner.parse(MINIMAL | change)
    assert words in str(refusal.value)
    assert refusal.value.subject.startswith(NAME)
    assert refusal.value.remedy


@pytest.mark.parametrize("alpha", [0, -4, 0.5, 1e-3, 2**70])
def test_pefts_other_alphas_are_read(alpha: float) -> None:
    assert LoraTuner.parse(MINIMAL | {"lora_alpha": alpha}).alpha == alpha


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"peft_type": "LORA"}'.encode("utf-16"), "not UTF-8"),
    "a list": (b"[]", "not a JSON object"),
    "alpha NaN": (b'{"peft_type": "LORA", "target_modules": ["q"], "lora_alpha": NaN}', "NaN, which is not JSON"),
    "alpha Infinity": (b'{"lora_alpha": -Infinity}', "-Infinity, which is not JSON"),
    "alpha 1e999": (b'{"peft_type": "LORA", "target_modules": ["q"], "lora_alpha": 1e999}', "not a finite number"),
    "duplicate key": (b'{"r": 8, "r": 16}', "has the key 'r' twice"),
    "duplicate pattern": (b'{"rank_pattern": {"q": 8, "q": 16}}', "has the key 'q' twice"),
    "deep lists": (b'{"a":' + b"[" * 500_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 170_000, "nested too deeply"),
    "depth 20": (b'{"a":' * 20 + b"1" + b"}" * 20, "nested deeper than 16"),
    "huge number": (b'{"r": ' + b"1" * 10_000 + b"}", "too many digits"),
    "over a megabyte": (b'{"a": "' + b"x" * MAX_BYTES + b'"}', "larger than 1048576 bytes"),
    "control character": (b'{"a": "\x00"}', "not JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_refused_in_time(case: str, tmp_path: Path) -> None:
    text, words = HOSTILE[case]
    with processor_seconds() as spent, pytest.raises(AdapterInvalid) as refusal:
        parse_text(text, tmp_path)
    assert spent.seconds < 0.05
    assert words in str(refusal.value)
    assert NAME in refusal.value.subject
    assert len(str(refusal.value)) < 500


def test_a_hundred_megabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with processor_seconds() as spent, pytest.raises(AdapterInvalid, match="larger than"):
        strict_json.read_object(path, NAME, MAX_BYTES)
    assert spent.seconds < 0.05


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([field.name for field in dataclasses.fields(LoraConfig)])


@settings(max_examples=200, deadline=None)
@given(config=st.dictionaries(KEYS | st.text(max_size=8), JSON, max_size=4))
def test_any_config_is_read_or_refused(config: dict[str, Any]) -> None:
    try:
        parsed = LoraTuner.parse(MINIMAL | config)
    except AdapterInvalid:
        return
    assert parsed.r >= 1
    assert parsed.bias in ("none", "all", "lora_only")


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=60) | st.text(alphabet='{}[]",:0-9.eE+truefalsn \\"', max_size=60).map(str.encode))
def test_any_text_means_what_json_means_or_is_refused(text: bytes) -> None:
    try:
        parsed = strict_json.parse(text, NAME)
    except AdapterInvalid:
        return
    assert parsed == json.loads(text)
