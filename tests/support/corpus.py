"""Two versions of an adapter of every kind, made by PEFT itself for the embedded base: what a life cycle is tried with.

Ephemeral adapters are no kind of their own: which are, is said where one is published.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
from peft import PeftConfig
from transformers import AutoModelForCausalLM

from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.store.spec_json import encode_spec
from support.adapters import files_of
from support.bottlenecks import DOUBLE_SEQ_BN, make_bottleneck
from support.crash_server import SPECS_FILE
from support.initial_pairs import make_initial_pair
from support.kinds import make_kind
from support.tiny import load_tiny

VERSIONS = 2
ATTENTION = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
INVOCATION = [60, 9]
CONFIGS: dict[str, PeftConfig] = {
    "lora": peft.LoraConfig(r=4, **ATTENTION),
    "large": peft.LoraConfig(r=32, task_type="CAUSAL_LM", target_modules="all-linear"),
    "dora": peft.LoraConfig(r=4, use_dora=True, **ATTENTION),
    "alora": peft.LoraConfig(r=4, alora_invocation_tokens=INVOCATION, **ATTENTION),
    "tokens": peft.LoraConfig(r=4, trainable_token_indices=[5, 17, 4, 60], **ATTENTION),
    "loha": peft.LoHaConfig(r=4, **ATTENTION),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": peft.OFTConfig(oft_block_size=32, **ATTENTION),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "norms": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}
KINDS = (*CONFIGS, "pissa", "bottleneck")
NAMES = tuple(f"{kind}-{version}" for kind in KINDS for version in range(VERSIONS))
"""Of all adapters of a corpus."""


def make_corpus(root: Path) -> dict[str, Path]:
    """Directories by NAMES."""
    return {f"{kind}-{version}": _make(kind, version, root) for kind in KINDS for version in range(VERSIONS)}


def _make(kind: str, version: int, root: Path) -> Path:
    out = root / f"{kind}-{version}"
    if kind == "bottleneck":
        model = AutoModelForCausalLM.from_pretrained(str(tiny_path()))
        return make_bottleneck(model, out, DOUBLE_SEQ_BN, seed=version)
    if kind == "pissa":
        options = {"target_modules": ATTENTION["target_modules"]}
        pairs = make_initial_pair(tiny_path(), root / f"{kind}-made-{version}", kind, seed=version, **options)
        return pairs[f"{kind}-pair"].rename(out)
    return make_kind(tiny_path(), out, CONFIGS[kind], seed=version, std=0.2)


def write_specs(root: Path, directories: dict[str, Path]) -> None:
    """What the reader says of each, for a process that does not import it."""
    base = load_tiny().spec
    specs = {
        name: json.loads(encode_spec(formats.read(files_of(directory), base, ReadLimits()).spec))
        for name, directory in directories.items()
    }
    (root / SPECS_FILE).write_text(json.dumps(specs))
