"""The files an adapter may consist of: the one list that formats, store and trainer share. Imports values only."""

from __future__ import annotations

from collections.abc import Mapping

from loramux_adapters.former_name import DECLARATION_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INITIAL_FILE = "initial_adapter_model.safetensors"
"""The adapter as it was before its first step, of methods that subtract it from the base (PiSSA and its like)."""

ADAPTERHUB_WEIGHTS_FILE = "adapter.safetensors"
"""In place of WEIGHTS_FILE where AdapterHub's package wrote the adapter; its config has the same name as PEFT's."""
INTERFACE_FILE = "adapter_interface.json"
"""AdapterHub's: which modules of the model were hooked. Optional."""
DECLARATION_FILES = ("loramux.json", DECLARATION_FILE)
"""Where the base may be declared beside the weights' own metadata."""

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE = TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""How the adapter's texts become token ids, where it was trained with another tokenizer or template than the base's."""

CERTIFICATE_FILE = "loramux_certificate.json"
"""What the training computed on a few probes, for a server to compute again; see `loramux_adapters.certificate`."""

REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)

MAX_FILE_BYTES: Mapping[str, int | None] = {
    CONFIG_FILE: 1 << 20,
    WEIGHTS_FILE: None,
    INITIAL_FILE: None,
    ADAPTERHUB_WEIGHTS_FILE: None,
    **dict.fromkeys((*DECLARATION_FILES, INTERFACE_FILE), 1 << 20),
    TOKENIZER_FILE: 64 << 20,
    **dict.fromkeys((TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, CERTIFICATE_FILE), 1 << 20),
}
"""Every allowed file and how large it may be; None: bounded by the upload quota alone."""

ADAPTERHUB_SAVE = "model.save_adapter(DIRECTORY, NAME, with_head=False, use_safetensors=True)"
_FUSION = "AdapterFusion attends over several adapters and is not supported: upload one of them by itself"
_HEAD = (
    "AdapterHub's prediction heads are not supported: where the model's own head was not trained along, save the "
    f"adapter without it, {ADAPTERHUB_SAVE}"
)
_REMEDIES: Mapping[str, str] = {
    "pytorch_adapter.bin": f"it is a pickle, which is never read: save the adapter with {ADAPTERHUB_SAVE}",
    **dict.fromkeys(("head_config.json", "model_head.safetensors", "pytorch_model_head.bin"), _HEAD),
    **dict.fromkeys(
        ("adapter_fusion_config.json", "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"), _FUSION
    ),
}


def remedy_for(name: str) -> str:
    """What to do about a file that is none of MAX_FILE_BYTES."""
    return _REMEDIES.get(name, f"send only {', '.join(MAX_FILE_BYTES)}")
