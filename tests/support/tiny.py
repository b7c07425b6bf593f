"""The embedded base in tests: load it, ask it, write training files for it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer.data.examples import ExampleEncoder


def load_tiny() -> LoadedBase:
    """A fresh copy in float32 compute: half a second."""
    return load_base(tiny_path(), compute_dtype=torch.float32)


def tiny_tokenizer() -> Any:
    """The embedded base's tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_path())


def tiny_encoder(tokenizer: Any) -> ExampleEncoder:
    """Records to examples, as the trainer does for the embedded base."""
    return ExampleEncoder(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))


def conversation(question: str, answer: str | None = None, *, system: str | None = None) -> list[dict[str, str]]:
    """Chat messages; without an answer, a prompt."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]], *, tokens: int = 64) -> list[str]:
    """Greedy answers to chats by transformers' own generate, left-padded in batches of 64."""
    texts = []
    for start in range(0, len(prompts), 64):
        encoded = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            for chat in prompts[start : start + 64]
        ]
        width = max(map(len, encoded))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        texts += [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]
    return texts
