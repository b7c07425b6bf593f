"""The classic QLoRA script, peft's get_peft_model and transformers' Trainer, and its adapter on a Loramux server."""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from loramux import Client
from loramux_adapters.embedded.tiny import tiny_path

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
MODEL = str(tiny_path())  # or a hub id: the one that the server holds

tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=nf4, dtype=torch.float32, device_map="cpu")
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

words = ["river", "stone", "lantern", "garden", "window", "paper", "cloud", "bread", "candle", "horse", "ladder"]
texts = [f"shout {word}: {word.upper()}{tokenizer.eos_token}" for word in words]
rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {
        "input_ids": padded("input_ids", tokenizer.pad_token_id),
        "labels": padded("labels", -100),
        "attention_mask": mask,
    }


with tempfile.TemporaryDirectory() as directory, Client(ADDRESS) as client:
    arguments = TrainingArguments(
        directory,
        per_device_train_batch_size=4,
        num_train_epochs=20,
        learning_rate=5e-3,
        use_cpu=True,
        report_to="none",
        logging_steps=30,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    model.save_pretrained(directory)
    client.push(directory, "example-trainer")
    print(client.generate("shout lantern:", adapter="example-trainer", temperature=0.0, max_tokens=16).text)
