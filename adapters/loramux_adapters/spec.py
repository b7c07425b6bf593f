"""What an adapter and a base model are, as facts: frozen, comparable, torch-free.

Knows no tensor, no file and no name service. A name points at a digest; an
`AdapterSpec` describes content only, so two names of one content share one spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ModuleKind = Literal["linear", "conv1d", "embedding", "norm"]


@dataclass(frozen=True, order=True)
class AdapterId:
    """The name a tenant gave to an adapter; `name` is a `names.NAME`."""

    tenant: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True)
class ModuleSpec:
    """One module of the base that an adapter may touch.

    `in_features` and `out_features` are those of the map y = W x, whatever the storage
    order (Conv1D keeps its weight transposed). For an embedding they are the vocabulary
    size and the width; for a norm both are the width.
    """

    name: str
    kind: ModuleKind
    in_features: int
    out_features: int
    has_bias: bool


@dataclass(frozen=True)
class ParameterSpec:
    """An unquantized parameter of the base as its checkpoint stores it.

    `sha256` is over the raw little-endian bytes in `dtype` (safetensors spelling: F32, BF16, F16). `rounded` is, of
    the embedding and the head, dtype -> sha256 of the parameter rounded to a dtype that cannot hold it exactly.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    rounded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseModelSpec:
    """The frozen base as adapters see it: identity, arithmetic shape, adaptable modules."""

    model_id: str
    architecture: str  # config.model_type, e.g. "llama"
    fingerprint: str  # 64 hex digits; see loramux_adapters.base
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    tied_embeddings: bool
    embedding: str | None  # module name of the input embedding
    head: str | None  # module name of the output head, None when the model has none
    modules: Mapping[str, ModuleSpec] = field(repr=False)
    parameters: Mapping[str, ParameterSpec] = field(repr=False)
    kv_heads: int | None = None  # with `kv_width`: keys and values of every layer, where all have the same
    kv_width: int | None = None

    def attention_name(self, layer: int) -> str:
        """What adapters call a layer's keys and values, beside the names of modules."""
        return f"layers.{layer}.attention"


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter's content. `digest` is its version (64 hex digits)."""

    digest: str
    kind: str  # "lora", "ia3" and so on; see docs/adapters.md
    base_fingerprint: str | None  # as declared by the file, None when it declares none
    base_mismatch: bool  # accepted although the declared base is another one
    ranks: Mapping[str, int] = field(repr=False)  # module name -> LoRA rank, every adapted module
    biases: frozenset[str] = field(repr=False)  # modules whose whole bias the adapter replaces
    nbytes: int  # of the tensors as uploaded
    others: frozenset[str] = field(default=frozenset(), repr=False)  # modules with parts of other kinds
    virtual_tokens: int = 0  # trained positions before every prompt, see `virtual_token_ids`
    invocation: tuple[int, ...] = ()  # token ids from whose last occurrence in the prompt on it acts; empty: everywhere
    vocabulary: int = 0  # how many token ids it knows, where it resized the base's vocabulary; 0: those of the base
    text_files: tuple[tuple[str, str], ...] = ()  # (name, sha256) of its own tokenizer and chat template, sorted

    @property
    def max_rank(self) -> int:
        """Largest LoRA rank over the adapted modules, 0 for a bias-only adapter."""
        return max(self.ranks.values(), default=0)

    @property
    def targets(self) -> tuple[str, ...]:
        """The distinct last name components of the adapted modules, sorted: `("q_proj", "v_proj")`."""
        return tuple(sorted({name.rpartition(".")[2] for name in (*self.ranks, *self.biases, *self.others)}))


def virtual_token_ids(count: int) -> tuple[int, ...]:
    """The ids of an adapter's virtual tokens, in order: below every id of a vocabulary."""
    return tuple(range(-1, -1 - count, -1))


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights. `experts` of the unquantized ones belong to fused experts."""

    nf4: int
    unquantized: int
    experts: int

    @property
    def nf4_share(self) -> float:
        """Between 0 and 1."""
        return self.nf4 / max(1, self.nf4 + self.unquantized)
