"""One adapter as `loramux adapters show` tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramux.cli.lifetimes import describe_end
from loramux.terminal.output import size

if TYPE_CHECKING:
    from loramux.types import Adapter, CertificateReplay


def fields_of(adapter: Adapter) -> list[tuple[str, object]]:
    """(field, value) in the order in which they are shown."""
    residency = adapter.residency
    merged = ": ".join(filter(None, (residency.merged, residency.merged_reason))) + of_another_name(adapter)
    return [
        ("name", adapter.name),
        ("digest", adapter.digest),
        ("versions", ", ".join(digest[:12] for digest in adapter.versions) or "-"),
        ("kind", adapter.kind),
        ("base", adapter.base_fingerprint or "undeclared"),
        ("accepted for", ", ".join(adapter.accepted_bases) or "not known"),
        ("rank", adapter.max_rank or "-"),
        ("targets", ", ".join(adapter.targets)),
        ("vocabulary", f"{adapter.vocabulary} tokens, other than the base's" if adapter.vocabulary else "the base's"),
        ("text", ", ".join(adapter.text_files) or "by the base's tokenizer and chat template"),
        ("size", f"{size(adapter.size_bytes)} ({adapter.size_bytes} bytes)"),
        ("labels", ", ".join(f"{k}={v}" for k, v in sorted(adapter.labels.items())) or "-"),
        ("aliases", ", ".join(adapter.aliases) or "-"),
        ("pinned", "yes" if adapter.pinned else "no"),
        ("merge", "yes" if adapter.merge else "no"),
        ("health", adapter.health + (" (base mismatch allowed)" if adapter.base_mismatch else "")),
        ("tier", residency.tier + (f", slot {residency.slot}" if residency.slot is not None else "")),
        ("host memory", size(residency.host_bytes) if residency.host_bytes else "not there"),
        ("leases", residency.leases),
        ("merged", merged),
        ("certificate", _certified(adapter.certificate) or "none: uploaded without one"),
        ("when merged", _certified(residency.merged_certificate) or "not replayed"),
        ("ends", describe_end(adapter) or "never by itself"),
        ("created", adapter.created.isoformat(timespec="seconds")),
        ("updated", adapter.updated.isoformat(timespec="seconds")),
    ]


def of_another_name(adapter: Adapter) -> str:
    """What explains merged weights of a name that does not desire them: one version may have several names."""
    is_explained = adapter.merge or adapter.residency.merged == "none"
    return "" if is_explained else ", desired by another name of this version"


def _certified(replay: CertificateReplay | None) -> str:
    if replay is None:
        return ""
    holds = replay.difference <= replay.tolerance
    return (
        f"{'certified' if holds else 'refused'}: log-probabilities differ by at most {replay.difference:.2g} from the "
        f"training's (in standard deviations of the logits; {replay.tolerance:g} allowed in {replay.compute_dtype}), "
        f"KL {replay.divergence:.2g}"
    )
