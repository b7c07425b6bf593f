"""trl's KTOTrainer as it is, and its adapter on a Loramux server."""

import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import KTOConfig, KTOTrainer

from loramux import Client
from loramux_adapters.embedded.tiny import tiny_path

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
MODEL = str(tiny_path())  # or a hub id: the one that the server holds
WORDS = ["river", "stone", "lantern", "garden", "window", "paper", "cloud", "bread", "candle", "horse", "ladder"]

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=nf4, dtype=torch.float32, device_map="cpu")
records = [
    {"prompt": f"shout {word}: ", "completion": answer, "label": answer.isupper()}
    for word in WORDS
    for answer in (word.upper(), word)
]

with tempfile.TemporaryDirectory() as directory, Client(ADDRESS) as client:
    trainer = KTOTrainer(
        model,
        args=KTOConfig(
            directory,
            per_device_train_batch_size=4,
            num_train_epochs=4,
            learning_rate=2e-3,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(directory)
    client.push(directory, "example-kto")
    print(client.generate("shout lantern: ", adapter="example-kto", temperature=0.0, max_tokens=16).text)
