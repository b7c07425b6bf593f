"""trl's GRPOTrainer with a running Loramux server as what samples: each step pushes the adapter and asks that version.

Prints how far the server's log-probabilities of the sampled tokens are from the trainer's, and how soon a push answers.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from loramux import Client
from loramux_adapters.embedded.tiny import tiny_path

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
MODEL = str(tiny_path())  # or a hub id: the one that the server holds
NAME = "example-grpo"
STEPS, GENERATIONS, LONGEST = 4, 4, 12
PROMPTS = [f"shout {word}: " for word in ["river", "stone", "lantern", "garden", "window", "paper", "cloud", "bread"]]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=nf4, dtype=torch.float32, device_map="cpu")
directory = Path(tempfile.mkdtemp())
client = Client(ADDRESS)
seconds: list[float] = []


def reward(completions: list[str], **_: Any) -> list[float]:
    """Capitals, as a share of what was written."""
    return [sum(letter.isupper() for letter in text) / max(len(text), 1) for text in completions]


@torch.no_grad()
def log_probs(trainer: GRPOTrainer, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """What the model in training says of the sampled tokens."""
    ids = torch.tensor([prompt + completion])
    logits = trainer.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
    """Asks the server, at the version of this step's weights; one prompt stands there once for each answer."""
    trainer.model.save_pretrained(directory)
    started = time.perf_counter()
    pushed = client.push(directory, NAME)
    version = f"{NAME}@{pushed.adapter.digest}"
    next(iter(client.stream(prompts[0], adapter=version, max_tokens=1)))
    seconds.append(time.perf_counter() - started)
    found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    difference = 0.0
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt)["input_ids"]
        answer = client.generate(
            token_ids=ids,
            adapter=version,
            temperature=1.0,
            seed=1000 * trainer.state.global_step + index,
            max_tokens=LONGEST,
            logprobs=0,
            return_token_ids=True,
            include_stop=True,
        )
        choice = answer.choices[0]
        sampled = [entry.logprob for entry in choice.logprobs]
        trained = log_probs(trainer, ids, list(choice.token_ids))
        difference = max(difference, float((trained - torch.tensor(sampled)).abs().max()))
        for key, value in zip(found, (ids, list(choice.token_ids), sampled), strict=True):
            found[key].append(value)
    step = trainer.state.global_step
    print(
        f"step {step}: {NAME}@{pushed.adapter.digest[:12]}, log-probabilities differ by at most {difference:.1e}",
        flush=True,
    )
    return found


trainer = GRPOTrainer(
    model,
    reward_funcs=reward,
    args=GRPOConfig(
        str(directory / "run"),
        per_device_train_batch_size=8,
        num_generations=GENERATIONS,
        max_completion_length=LONGEST,
        max_steps=STEPS,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    rollout_func=rollout,
)
for parameter in trainer.model.parameters():  # trl rounds them to bfloat16, in which sampler and trainer would differ
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
trainer.train()
trainer.model.save_pretrained(directory)
client.push(directory, NAME)
print(client.generate(PROMPTS[2], adapter=NAME, temperature=0.0, max_tokens=LONGEST).text)
print(f"from push to the first token of the new version: {1000 * statistics.median(seconds):.0f} ms (p50)")
