"""`loramux status`: what a server serves, where and within which limits."""

from __future__ import annotations

from collections import Counter

from loramux.cli.arguments import DEFAULT_ADDRESS, Address, AsJson
from loramux.terminal.output import print_json, print_table, size
from loramux.types import WeightCounts


def command(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show what is served: the base model, its fingerprint, device and limits, and how many adapters are where."""
    from loramux.cli.connecting import connect

    with connect(address) as client:
        model = client.model()
        serving = client.is_healthy()
        tiers = Counter(adapter.residency.tier for adapter in client.adapters())
    adapters = {tier: tiers[tier] for tier in ("resident", "loaded", "registered")}
    if as_json:
        print_json({"address": address, "serving": serving, "model": model, "adapters": adapters})
        return
    limits = model.limits
    rows = [
        ("address", address),
        ("state", "serving" if serving else "not serving: it drains"),
        ("model", f"{model.model_id} ({model.architecture})"),
        ("fingerprint", model.fingerprint),
        ("chat template", "yes" if model.chat_template_digest else "none"),
        ("device", model.device),
        ("dtype", model.compute_dtype + (", deterministic" if model.deterministic else "")),
        ("weights", _weights(model.weights)),
        ("context", f"{limits.context_tokens:,} tokens"),
        ("KV cache", f"{limits.kv_cache_tokens:,} tokens"),
        ("batch", f"{limits.max_running_requests} requests, {limits.max_batch_tokens:,} tokens"),
        ("queue", f"{limits.max_queued_requests} requests"),
        ("adapters", ", ".join(f"{count} {tier}" for tier, count in adapters.items() if count) or "none"),
        ("adapter limits", f"rank {limits.max_rank}, {size(limits.max_adapter_bytes)} each, "
         f"{size(limits.adapter_device_bytes)} on the device"),
        ("request limits", f"n {limits.max_choices}, {limits.max_logprobs} alternatives per token, "
         f"{limits.max_stop_strings} stop strings"),
    ]  # fmt: skip
    print_table(("FIELD", "VALUE"), rows, empty="")


def _weights(counts: WeightCounts) -> str:
    total = counts.nf4 + counts.unquantized
    if not total:
        return "unknown"
    share = f"{total / 1e6:,.1f} million, {counts.nf4 / total:.0%} in NF4"
    return share + (f", {counts.experts / total:.0%} in unquantized experts" if counts.experts else "")
