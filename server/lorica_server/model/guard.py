"""What must be true of a base before it may serve a packed batch; what is not, is refused at start with the reason.

Some models' rotary frequencies depend on the longest sequence of the whole step, and some attention never goes through
the attention interface: both would give wrong tokens in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorica_adapters.apply.inject import AdaptedModel
from lorica_adapters.base import BaseRefused
from lorica_server.model.attention import ATTENTION_NAME
from lorica_server.model.cache import PagedCache
from lorica_server.model.decode_attention import attend_rows
from lorica_server.model.paged_context import PagedContext, Span

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
"""Largest relative error (norm of the difference over norm of the logits) between packed and solo forward.
Measured: 1e-6 in float32 and 0.01 in bfloat16 on sound models; a wrong position or mask gives 0.3 and more."""


def check_supported(model: PreTrainedModel, context: int) -> None:
    """Raises BaseRefused for architectures and rotary schemes that cannot be packed. Fixes longrope for `context`."""
    if not getattr(model, "_supports_attention_backend", False):
        raise BaseRefused(
            f"{type(model).__name__} does not route attention through transformers' attention interface, "
            "so its cache cannot be paged: serve another architecture (Llama, Mistral, Qwen, Gemma, GPT-2, ...)"
        )
    for module in model.modules():
        declared = getattr(module, "rope_type", None)
        kinds = set(declared.values()) if isinstance(declared, dict) else {declared}
        if any(kind is not None and "dynamic" in kind for kind in kinds):
            raise BaseRefused(
                "rope type 'dynamic' depends on the longest sequence of a step, so neighbours would change a request's "
                "tokens: set rope scaling to linear, llama3 or yarn in the checkpoint's config.json"
            )
        if declared == "longrope":
            _fix_longrope(module, context)
        elif "longrope" in kinds:
            raise BaseRefused("rope type 'longrope' per layer type is not supported by this version")


def _fix_longrope(module: Any, context: int) -> None:
    """Chooses the long or the short factors once, by the server's context limit, as if every sequence had it."""
    original = module.config.rope_parameters["original_max_position_embeddings"]
    if context > original:
        initialise = ROPE_INIT_FUNCTIONS["longrope"]
        long_frequencies, _ = initialise(module.config, module.inv_freq.device, seq_len=original + 1)
        module.register_buffer("inv_freq", long_frequencies, persistent=False)
    module.rope_type = "longrope, fixed"  # transformers updates the frequencies only under the exact name


@torch.inference_mode()
def self_check(adapted: AdaptedModel, cache: PagedCache, context: int) -> None:
    """Compares two packed sequences, one reaching `context` where memory allows, with the model's own solo forward.

    Writes to blocks of an empty cache. Raises BaseRefused on a mismatch.
    """
    size = cache.block_size
    long = min(context, (cache.blocks - 2) * size - size, 4096)
    lengths = [length for length in (min(11, long), long) if length > 0]
    ids = [_some_ids(length, adapted.spec.vocab_size, adapted.base.device) for length in lengths]
    packed = _packed(adapted, cache, ids)
    adapted.model.set_attn_implementation("eager")
    try:
        for row, sequence in enumerate(ids):
            solo = adapted.model(input_ids=sequence[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
            error = float((packed[row].float() - solo).norm() / solo.norm().clamp_min(1e-9))
            if not error <= TOLERANCE[adapted.base.compute_dtype]:
                raise BaseRefused(
                    f"a packed batch gives other logits than a lone sequence of {len(sequence)} tokens (relative error "
                    f"{error:.2g}): this architecture cannot be served exactly by this version"
                )
    finally:
        adapted.model.set_attn_implementation(ATTENTION_NAME)


def _some_ids(length: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(length, device=device) * 7919 + 13) % vocabulary


def _packed(adapted: AdaptedModel, cache: PagedCache, ids: list[torch.Tensor]) -> torch.Tensor:
    """The last logits of each sequence [len(ids), vocab] from one packed forward."""
    device, size = adapted.base.device, cache.block_size
    spans, rows, positions, block = [], [], [], 0
    first = 0
    for sequence in ids:
        count = -(-len(sequence) // size)
        blocks = torch.arange(block, block + count, device=device)
        spans.append(Span(first, first + len(sequence), 0, blocks))
        rows.append(torch.arange(len(sequence), device=device) + block * size)
        positions.append(torch.arange(len(sequence), device=device))
        block, first = block + count, first + len(sequence)
    output = adapted.model(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        attention_mask=None,
        use_cache=False,
        logits_to_keep=torch.tensor([span.last - 1 for span in spans], device=device),
        ctx=PagedContext(cache, torch.cat(rows), attend_rows, spans),
    )
    logits: torch.Tensor = output.logits[0]
    return logits
