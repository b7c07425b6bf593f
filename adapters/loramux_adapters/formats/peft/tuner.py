"""What one method of PEFT's says of itself, so that one reader serves all of them. Torch-free.

A method is one file beside this one and one line in `formats.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from loramux_adapters.formats.peft.config import ConfigKeys
from loramux_adapters.formats.peft.work import Shape, Work, elements, work_of
from loramux_adapters.spec import BaseModelSpec, ModuleKind

if TYPE_CHECKING:
    import torch

    from loramux_adapters.formats.limits import ReadLimits
    from loramux_adapters.parts.part import Part

__all__ = ["ExtraTargets", "Shape", "Target", "Targets", "Tuner"]


class Target(ABC):
    """How one module is adapted. A *role* is what a tensor is to its method, whatever the file calls it."""

    @property
    def own_suffixes(self) -> Mapping[str, str] | None:
        """Role -> the end of the tensor's name, where it is not the method's; see `Tuner.suffixes`."""
        return None

    @abstractmethod
    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """The tensors the module must have, by role. `found` are those it has, where the config does not say it all."""

    def rank(self, found: Mapping[str, Shape]) -> int:
        """The rank rows it will take."""
        return 0

    def work(self, found: Mapping[str, Shape]) -> Work:
        """What reading and making it takes; `found` as in `shapes`. This: no more than its tensors have numbers."""
        return work_of(elements(self.shapes(found).values()))

    @abstractmethod
    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """The canonical form of tensors by role, those that the whole adapter shares among them.

        Raises AdapterInvalid where their values mean nothing.
        """


@dataclass(frozen=True)
class Targets:
    """All adapted modules by name, and the tensors that they share, by role.

    `shared_names` are names in the file of those whose number is not known before, see `Tuner.shared_names`.
    `tied_head` is the head whose adapter is the embedding's own, transposed.
    """

    modules: Mapping[str, Target]
    shared: Mapping[str, Shape] = field(default_factory=dict)
    shared_names: Mapping[str, str] = field(default_factory=dict)
    tied_head: str | None = None


class ExtraTargets(Protocol):
    """What a config asks for besides its method's own; see `extras`."""

    @property
    def token_ids(self) -> Iterable[int]:
        """Tokens whose rows are trained each for itself."""
        ...

    def resolve(self, base: BaseModelSpec, adapted: Mapping[str, Target]) -> Mapping[str, Target]:
        """Their modules; `adapted` are the method's. Raises AdapterInvalid or AdapterIncompatible."""
        ...

    def arithmetic(self, targets: Mapping[str, Target]) -> dict[str, Any]:
        """See Tuner."""
        ...


class Tuner(ABC):
    """One parsed config."""

    peft_type: ClassVar[str]
    """What PEFT calls it in every config it writes."""
    kind: ClassVar[str]
    """What specs and clients call it."""
    keys: ClassVar[ConfigKeys]
    """What each key of its config means."""
    marker: ClassVar[str]
    """What the names of its tensors have in common: ".lora_"."""
    shape_keys: ClassVar[str] = "adapter_config.json"
    """The keys that the shapes of tensors follow from, for messages."""
    smaller: ClassVar[str] = "train with a smaller rank, or adapt fewer modules"
    """How to make an adapter that takes less `work`."""
    shared_names: ClassVar[Mapping[str, str]] = {}
    """Role -> name in the file, of tensors that belong to no module."""

    index_roles: ClassVar[frozenset[str]] = frozenset()
    """Tensors of integers: positions or choices."""
    may_be_empty: ClassVar[bool] = False
    """Whether a module may have tensors without elements: what training pruned to nothing."""

    extras: ExtraTargets
    """Modules trained whole, and trained token rows."""
    bias: str
    """PEFT's `bias`: none, all, or `<method>_only`."""

    @property
    def variant(self) -> str:
        """The kind, or what a variant of it is called."""
        return self.kind

    @property
    def moved_base(self) -> str | None:
        """What initialized the adapter, where that subtracted it from the base."""
        return None

    @property
    def invocation(self) -> tuple[int, ...]:
        """See AdapterSpec."""
        return ()

    @property
    def virtual_tokens(self) -> int:
        """See AdapterSpec."""
        return 0

    @property
    def token_ids(self) -> Iterable[int]:
        """See ExtraTargets."""
        return self.extras.token_ids

    @classmethod
    @abstractmethod
    def parse(cls, raw: Mapping[str, object]) -> Self:
        """Checks every key of an adapter_config.json. Raises AdapterInvalid naming the key."""

    @classmethod
    @abstractmethod
    def suffixes(cls, kind: ModuleKind) -> Mapping[str, str]:
        """Role -> what the tensor's name ends with behind that of a module of this kind."""

    @abstractmethod
    def resolve(self, base: BaseModelSpec, limits: ReadLimits) -> Targets:
        """What the config selects of `base`. Raises AdapterInvalid or AdapterIncompatible."""

    @abstractmethod
    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """What the config asks for beyond names and shapes of tensors, as JSON: it is part of the digest.

        Two spellings of one arithmetic give one content. `kind` is in it.
        """
