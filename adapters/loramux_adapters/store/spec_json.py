"""An AdapterSpec as one line of JSON, as the catalog keeps it."""

from __future__ import annotations

import json

from loramux_adapters.spec import AdapterSpec


def encode_spec(spec: AdapterSpec) -> str:
    """Deterministic: equal specs give equal text."""
    return json.dumps(
        {
            "digest": spec.digest,
            "kind": spec.kind,
            "base_fingerprint": spec.base_fingerprint,
            "base_mismatch": spec.base_mismatch,
            "ranks": dict(spec.ranks),
            "biases": sorted(spec.biases),
            "nbytes": spec.nbytes,
            **({"others": sorted(spec.others)} if spec.others else {}),
            **({"virtual_tokens": spec.virtual_tokens} if spec.virtual_tokens else {}),
            **({"invocation": list(spec.invocation)} if spec.invocation else {}),
            **({"vocabulary": spec.vocabulary} if spec.vocabulary else {}),
            **({"text_files": [list(each) for each in spec.text_files]} if spec.text_files else {}),
        },
        sort_keys=True,
        separators=(",", ":"),
    )


def decode_spec(text: str) -> AdapterSpec:
    """What `encode_spec` was given."""
    fields = json.loads(text)
    fields.pop("prefix_tokens", None)  # older catalogs have it, always 0
    sets = {key: frozenset(fields.get(key, ())) for key in ("biases", "others")}
    text_files = tuple((name, sha256) for name, sha256 in fields.get("text_files", ()))
    invocation = tuple(fields.get("invocation", ()))
    return AdapterSpec(**{**fields, **sets, "invocation": invocation, "text_files": text_files})
