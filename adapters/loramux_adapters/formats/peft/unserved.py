"""Methods of PEFT's that are known and not served, and why: what they do is no weight of a linear map, or the file does
not say what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterInvalid


class Unserved(NamedTuple):
    """What a method is called, and what stands against it."""

    name: str
    why: str


_NOT_IN_FILE = "it changes singular directions of the base's weights, which the file does not hold"

UNSERVED: Mapping[str, Unserved] = {
    "ADAMSS": Unserved("AdaMSS", "it trains groups of outputs by a clustering that the file does not hold"),
    "ADAPTION_PROMPT": Unserved("LLaMA-Adapter", "it adds a gated attention of its own to every layer"),
    "CPT": Unserved("CPT", "it projects its prompt's embeddings by token types that only training has"),
    "FROD": Unserved("FRoD", "it divides each weight by a matrix as wide as the weight, at every load"),
    "LILY": Unserved("Lily", "its weights depend on all tokens of a batch, so on other people's"),
    "OSF": Unserved("OSF", _NOT_IN_FILE),
    "PEANUT": Unserved("PEANuT", "it computes with a nonlinear function of the weights and the input"),
    "POLY": Unserved("Poly", "it needs the number of a task with each request"),
    "PSOFT": Unserved("PSOFT", f"{_NOT_IN_FILE} and whose signs depend on the machine"),
    "SHADOW": Unserved("Shadow", "it runs a second model beside the base"),
    "XLORA": Unserved("X-LoRA", "it runs the model twice, to mix several adapters by what it reads"),
}


def refuse_unserved(method: str) -> None:
    """Raises AdapterInvalid for a key of UNSERVED."""
    if method in UNSERVED:
        name, why = UNSERVED[method]
        raise AdapterInvalid(
            f"{CONFIG_FILE}: {name} adapters are not served: {why}",
            subject=f"{CONFIG_FILE}: peft_type",
            remedy="train with another method, such as LoRA",
        )
