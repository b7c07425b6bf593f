"""A base through the server's start and a mixed batch, against the untouched model: an oracle apart from the server's
own examination.
"""

from __future__ import annotations

from pathlib import Path

import torch

from loramux_adapters.apply.inject import inject
from loramux_adapters.base.load import BaseRefused, load_base
from loramux_adapters.guard.exactness import ask_untouched
from loramux_adapters.guard.examine import examine, refusals_of
from loramux_adapters.guard.products import own_products
from loramux_server.model.cache import PagedCache
from loramux_server.model.decode_attention import attend_rows
from loramux_server.model.guard import self_check
from support.model_engine import ModelEngine

LENGTHS = (5, 40, 90, 130)
TOKENS = 6
BOUND = 1e-3
BLOCKS, BLOCK = 64, 16


def refusal_or_error(checkpoint: Path) -> tuple[str, str]:
    """("served", largest difference), ("wrong", it), ("refused", reason) or ("traceback", its last line)."""
    try:
        try:
            base = load_base(checkpoint, compute_dtype=torch.float32)
        except (OSError, ValueError) as error:  # a server's start says so
            return "refused", str(error).strip().splitlines()[0]
        context = min(base.spec.context_length, 256)
        examined = examine(base, context)
        with refusals_of(base):
            truth = ask_untouched(base, examined.layers, context, room=BLOCKS * BLOCK)
        adapted = inject(base, capacity=8)
        cache = PagedCache(examined.layers, BLOCKS + 1, BLOCK, base.compute_dtype, base.device)
        self_check(adapted, cache, truth, rope=examined.rope, decode=attend_rows, tiled=False)
    except BaseRefused as refusal:
        return "refused", (str(refusal).splitlines() or [""])[0]
    except Exception as error:
        if "memory" in str(error):  # the caller's limit, met in torch's allocator or in mmap
            return "none", "more memory than granted"
        return "traceback", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    try:
        difference = largest_difference(checkpoint)
    except RuntimeError as error:
        if "memory" in str(error):
            return "none", "more memory than granted"
        raise
    return ("served" if difference < BOUND else "wrong"), f"{difference:.1e}"


def largest_difference(checkpoint: Path) -> float:
    """Over all logits that drew a token in a mixed batch of the engine, relative to their standard deviation."""
    base = load_base(checkpoint, compute_dtype=torch.float32)
    engine = ModelEngine(base, {}, max_batch_tokens=48, max_running=8)
    vocabulary = base.spec.vocab_size
    texts = [[(row * 37 + n * (row + 3)) % vocabulary for n in range(size)] for row, size in enumerate(LENGTHS)]
    tickets = [engine.submit(None, text, TOKENS) for text in texts]
    engine.run()
    alone = load_base(checkpoint, compute_dtype=torch.float32).model
    alone.set_attn_implementation("eager")
    worst = 0.0
    for ticket, text in zip(tickets, texts, strict=True):
        whole = torch.tensor([text + engine.tokens(ticket)])
        with torch.inference_mode(), own_products(alone, torch.float32):
            expected = alone(input_ids=whole, use_cache=False).logits[0, len(text) - 1 : -1].float()
        worst = max(worst, float((engine.logits(ticket) - expected).abs().max() / expected.std()))
    return worst
