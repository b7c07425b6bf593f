"""Make the embedded base `loramux-tiny` from nothing but this package and a seed.

    python -m loramux_trainer.tiny.build adapters/loramux_adapters/embedded/loramux-tiny

Writes a Hugging Face directory (bf16 safetensors, 5.5 MB). The same seed, thread count and library
versions give the same bytes; --steps, --threads and --seed change the run.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loramux_trainer.tiny.corpus import Document, documents
from loramux_trainer.tiny.tokenizer import BOS, END, PAD, VOCAB_SIZE, build_tokenizer

CONTEXT_LENGTH = 2048
_IGNORE = -100
_POOL = 2048  # documents sorted by length at a time, so that batches carry little padding


@dataclass(frozen=True)
class Recipe:
    """What the run depends on; `batch_tokens` counts padding."""

    seed: int = 20
    steps: int = 1600
    batch_tokens: int = 4096
    peak_lr: float = 4e-3
    warmup: int = 60


def tiny_config() -> LlamaConfig:
    """2.8 million parameters; every linear has in % 64 == 0 and out % 32 == 0, as NF4 packing wants."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(token ids, labels): the loss is on assistant turns and on plain text, end token included."""
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END])
    ids, labels = [bos], [_IGNORE]
    for role, content in document.messages:
        body = tokenizer.encode(content, add_special_tokens=False)
        body.append(end)
        if role != "text":
            ids.append(tokenizer.convert_tokens_to_ids(f"<|{role}|>"))
            labels.append(_IGNORE)
        ids += body
        labels += body if role in ("assistant", "text") else [_IGNORE] * len(body)
    return ids, labels


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), each [rows, length]. Right padding needs no mask under causal attention."""
    rng = random.Random(recipe.seed)
    source = documents(rng)
    pad = tokenizer.convert_tokens_to_ids(PAD)
    while True:
        pool = sorted((encode(next(source), tokenizer) for _ in range(_POOL)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * len(pair[0]) > recipe.batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [_IGNORE] * (longest - len(labels)) for _, labels in group]),
            )


def _optimizers(model: LlamaForCausalLM, lr: float) -> Sequence[torch.optim.Optimizer]:
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("model.layers.")]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or not n.startswith("model.layers.")]
    muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train from scratch in float32 weights with bf16 matmuls; returns the model in float32."""
    torch.manual_seed(recipe.seed)
    config = tiny_config()
    model = LlamaForCausalLM(config).float()
    for key, value in (("bos", BOS), ("eos", END), ("pad", PAD)):
        setattr(model.config, f"{key}_token_id", tokenizer.convert_tokens_to_ids(value))
    optimizers = _optimizers(model, recipe.peak_lr)
    source, started, shown = batches(recipe, tokenizer), time.monotonic(), 0.0
    for step in range(recipe.steps):
        # Warm up, hold, then fall linearly to zero over the last two fifths.
        fall = (recipe.steps - step) / (0.4 * recipe.steps)
        lr = recipe.peak_lr * min(1.0, (step + 1) / recipe.warmup, fall)
        ids, labels = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shown = 0.95 * shown + 0.05 * loss.item() if step else loss.item()
        if step % 50 == 49:
            print(f"step {step + 1}/{recipe.steps} loss {shown:.4f} {time.monotonic() - started:.0f} s", flush=True)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the checkpoint in bf16 with tokenizer and generation config."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description="Train the embedded base loramux-tiny.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer(CONTEXT_LENGTH)
    model = train(Recipe(seed=arguments.seed, steps=arguments.steps), tokenizer)
    save(model, tokenizer, arguments.directory)


if __name__ == "__main__":
    main()
