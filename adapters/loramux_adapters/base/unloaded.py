"""A base as `load_base` would hold it, without its weights: the same modules on the meta device.

Which linear maps become NF4 is asked of the quantizer that the load uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from loramux_adapters.base.load import LoadedBase, base_spec, refuse_foreign_quantization


def read_unloaded(
    source: str | Path, *, compute_dtype: torch.dtype, device: torch.device, double_quant: bool = False
) -> LoadedBase:
    """What `load_base` gives for `device`, with every tensor on the meta device and no fingerprint.

    Raises OSError, ValueError and BaseRefused, as the load would.
    """
    source = str(source)
    config_json, _ = PretrainedConfig.get_config_dict(source)
    refuse_foreign_quantization(config_json)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    declared: Any = config_json.get("quantization_config")
    options = declared or {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(**{key: value for key, value in options.items() if key != "quant_method"}),
        pre_quantized=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=compute_dtype)
        quantizer.preprocess_model(model=model, dtype=compute_dtype, device_map={"": device}, checkpoint_files=None)
    model.eval().requires_grad_(False)
    spec = base_spec(model, source, "", {})
    return LoadedBase(model, spec, source, model.config, config_json, compute_dtype, device)
