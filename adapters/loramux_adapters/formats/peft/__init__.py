"""Adapters in PEFT's format: one adapter_config.json, one adapter_model.safetensors, a file here per method."""
