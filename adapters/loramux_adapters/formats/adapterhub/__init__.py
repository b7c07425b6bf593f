"""Adapters in the format of AdapterHub's package `adapters`: one adapter_config.json, one adapter.safetensors."""
