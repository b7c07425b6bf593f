"""One config, or several, for each method of PEFT's that adapts linear maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from peft.tuners.boft import layer as boft_layer

from support.kinds import make_kind, targets_of


def of(config: Callable[..., PeftConfig], **options: Any) -> Callable[[str], PeftConfig]:
    """A config for the usual targets of an architecture."""
    return lambda architecture: config(**{"task_type": "CAUSAL_LM", **targets_of(architecture), **options})


def ia3(architecture: str) -> PeftConfig:
    feedforward = "c_fc" if architecture == "gpt2" else "down_proj"
    return of(peft.IA3Config, feedforward_modules=[feedforward])(architecture)


# What PEFT has no layer for on GPT-2's Conv1D.
LINEAR_ONLY = {"loha", "loha-alpha", "loha-dense", "lokr", "lokr-both", "lokr-factor", "lokr-dense", "hra", "hra-gs"}
LINEAR_ONLY |= {"miss", "miss-mini", "miss-bat", "road-1", "road-2", "road-4"}
LINEAR_ONLY |= {"oft", "oft-exact", "oft-r", "oft-shared", "oft-terms", "coft", "coft-shared"}
LINEAR_ONLY |= {"boft", "boft-num", "boft-bias", "boft-butterfly"}
LINEAR_ONLY |= {"shira", "c3a", "c3a-pattern"}
LINEAR_ONLY |= {"delora", "glora", "glora-vector", "glora-constant", "supertuning", "supertuning-lora", "beft"}
KINDS: dict[str, Callable[[str], PeftConfig]] = {
    "adalora": of(peft.AdaLoraConfig, init_r=6, target_r=3, total_step=10),
    "adalora-bias": of(peft.AdaLoraConfig, init_r=4, total_step=10, lora_alpha=3, bias="lora_only"),
    "vera": of(peft.VeraConfig, r=24),
    "loha": of(peft.LoHaConfig, r=4, alpha=8),
    "loha-alpha": of(peft.LoHaConfig, r=3, alpha=5, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 9}),
    "loha-dense": of(peft.LoHaConfig, r=9),
    "lokr": of(peft.LoKrConfig, r=4),
    "lokr-both": of(peft.LoKrConfig, r=3, decompose_both=True),
    "lokr-factor": of(peft.LoKrConfig, r=2, alpha=3, decompose_factor=4),
    "lokr-dense": of(peft.LoKrConfig, r=64),
    "gralora": of(peft.GraloraConfig, r=8, gralora_k=4, alpha=12),
    "gralora-hybrid": of(peft.GraloraConfig, r=4, hybrid_r=3),
    "miss": of(peft.MissConfig, r=8),
    "miss-mini": of(peft.MissConfig, r=8, mini_r=4, init_weights="mini"),
    "miss-bat": of(peft.MissConfig, r=16, init_weights="bat"),
    "hra": of(peft.HRAConfig, r=6),
    "hra-gs": of(peft.HRAConfig, r=4, apply_GS=True),
    "ia3": ia3,
    "oft": of(peft.OFTConfig, oft_block_size=16),
    "oft-exact": of(peft.OFTConfig, oft_block_size=16, use_cayley_neumann=False),
    "oft-r": of(peft.OFTConfig, r=5, oft_block_size=0, num_cayley_neumann_terms=3),
    "oft-shared": of(peft.OFTConfig, oft_block_size=30, block_share=True),
    "oft-terms": of(peft.OFTConfig, oft_block_size=8, num_cayley_neumann_terms=8),
    "coft": of(peft.OFTConfig, oft_block_size=16, coft=True, eps=0.5),
    "coft-shared": of(peft.OFTConfig, oft_block_size=16, coft=True, eps=0.5, block_share=True),
    "boft": of(peft.BOFTConfig, boft_block_size=8),
    "boft-num": of(peft.BOFTConfig, boft_block_size=0, boft_block_num=4),
    "boft-bias": of(peft.BOFTConfig, boft_block_size=4, bias="boft_only"),
    "boft-butterfly": of(peft.BOFTConfig, boft_block_size=8, boft_n_butterfly_factor=3),
    "road-1": of(peft.RoadConfig, variant="road_1", group_size=16),
    "road-2": of(peft.RoadConfig, variant="road_2", group_size=32),
    "road-4": of(peft.RoadConfig, variant="road_4", group_size=64),
    "fourierft": of(peft.FourierFTConfig, n_frequency=200, scaling=300),
    "fourierft-pattern": of(
        peft.FourierFTConfig, n_frequency=150, n_frequency_pattern={"v_proj": 70, "c_fc": 90}, random_loc_seed=-3
    ),
    "randlora": of(peft.RandLoraConfig, r=24),
    "randlora-sparse": of(peft.RandLoraConfig, r=64, sparse=True, randlora_alpha=100),
    "shira": of(peft.ShiraConfig, r=3, random_seed=1),
    "c3a": of(peft.C3AConfig, block_size=32),
    "c3a-pattern": of(peft.C3AConfig, block_size=64, block_size_pattern={"v_proj": 8, "layers.1.mlp.down_proj": 16}),
    "waveft": of(peft.WaveFTConfig, n_frequency=500),
    "waveft-db3": of(peft.WaveFTConfig, n_frequency=500, wavelet_family="db3", proportional_parameters=True),
    "waveft-plain": of(peft.WaveFTConfig, n_frequency=300, use_idwt=False, n_frequency_pattern={"v_proj": 70}),
    "hira": of(peft.HiraConfig, r=4),
    "hira-pattern": of(peft.HiraConfig, r=2, rank_pattern={"v_proj": 5}),
    "vblora": of(peft.VBLoRAConfig, num_vectors=12, vector_length=32),
    "vblora-topk": of(peft.VBLoRAConfig, num_vectors=300, vector_length=16, topk=3, save_only_topk_weights=True),
    "vblora-one": of(peft.VBLoRAConfig, num_vectors=9, vector_length=64, topk=1, save_only_topk_weights=True),
    "delora": of(peft.DeloraConfig, r=4, rank_pattern={"v_proj": 2}),
    "deft": of(peft.DeftConfig, r=4),
    "deft-qr": of(peft.DeftConfig, r=4, alpha=3, decomposition_method="qr"),
    "deft-para": of(peft.DeftConfig, r=4, decomposition_method="qr", para=True),
    "pvera": of(peft.PveraConfig, r=24),
    "unilora": of(peft.UniLoraConfig, r=4, save_indices=True),
    "tinylora": of(peft.TinyLoraConfig, u=8),
    "tinylora-tied": of(peft.TinyLoraConfig, r=3, u=8, weight_tying=0.5),
    "glora": of(peft.GloraConfig, r=4),
    "glora-vector": of(peft.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "glora-constant": of(peft.GloraConfig, config_A_B="constant", config_C="none"),
    "beft": of(peft.BeftConfig),
    "supertuning": of(peft.SupertuningConfig, sparsity=0.9),
    "supertuning-lora": of(peft.SupertuningConfig, sparsity=0.95, select_top=False, r=4, lora_alpha=6),
}

# Of the noise that every trained tensor is moved by, where the usual one changes too little.
STDS = {"adalora": 0.2, "adalora-bias": 0.2, "hira": 0.2, "hira-pattern": 0.3, "unilora": 0.5}


def kinds_for(architecture: str) -> Mapping[str, Callable[[str], PeftConfig]]:
    """Those that PEFT has a layer for."""
    return {name: config for name, config in KINDS.items() if architecture != "gpt2" or name not in LINEAR_ONLY}


def make_module_kind(checkpoint: Path, out: Path, name: str, architecture: str) -> Path:
    """A PEFT directory of one of KINDS."""
    seed = list(KINDS).index(name)
    return make_kind(checkpoint, out, KINDS[name](architecture), seed=seed, std=STDS.get(name, 0.05))


@contextmanager
def butterflies() -> Iterator[None]:
    """Within, BOFT may have more than one factor: PEFT takes its block-diagonal matrices from an extension for CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
        patch.setattr(boft_layer.FastBlockDiag, "apply", _block_diagonals)
        yield


def _block_diagonals(factors: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.block_diag(*blocks) for blocks in factors])
