"""What a kind of adapter says of itself, and what a layer of one has: the modules that end in a `KIND`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from streamconv.adapters.folder import Adapter
from streamconv.adapters.weights import Weights
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Reshape


@dataclass(frozen=True)
class Layer:
    """What an adapter has for a module.

    Attributes:
        adapter: that it is of.
        module: the name that the module had where it was trained, less the wrappers around it.
        depth: how many wrappers there are around it, of which this is the innermost but so many.
        keys: the names of its tensors, by what they are for it.
        taken: which of them have been.
    """

    adapter: Adapter
    module: str
    depth: int
    keys: Mapping[str, str]
    taken: set[str] = field(default_factory=set)

    def __contains__(self, slot: str) -> bool:
        return slot in self.keys

    @property
    def key(self) -> str:
        """One of its tensors, for messages."""
        return next(iter(self.keys.values()))

    def take(self, slot: str) -> AnyNode:
        """One of its tensors. Raises CoverageError where it has none."""
        if slot not in self.keys:
            raise self.refuse(f"{self.key} has no other half, {slot}: save the adapter again")
        self.taken.add(slot)
        return self.adapter.tensors[self.keys[slot]]

    def check_taken(self) -> None:
        """Raises CoverageError where a tensor was not: beside the others, its kind has no use for it."""
        for slot, key in self.keys.items():
            if slot not in self.taken:
                raise self.refuse(f"nothing uses {key} beside {', '.join(sorted(self.taken))}: save the adapter again")

    def refuse(self, problem: str) -> CoverageError:
        """The error that its adapter does not fit."""
        return CoverageError(f"{self.adapter.title}: {problem}")


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        name: its ``peft_type``.
        slots: what its tensors are called behind their module's name.
        merge: puts a layer into the weights.
        check: raises UsageError where the config of an adapter asks for more than that.
        has_scale: whether there is one to multiply.
    """

    name: str
    slots: frozenset[str] = frozenset()
    merge: Callable[[Layer, Weights], None] = field(default=lambda _layer, _weights: None)
    check: Callable[[Adapter], None] = field(default=lambda _adapter: None)
    has_scale: bool = True


def as_matrix(node: AnyNode) -> AnyNode:
    """A tensor with all axes but the first as one."""
    shape = node.spec.shape
    return node if len(shape) == 2 else apply(Reshape((shape[0], math.prod(shape[1:]))), node)


def in_shape(node: AnyNode, shape: tuple[int, ...]) -> AnyNode:
    """The same elements in another shape, if it is another."""
    return node if node.spec.shape == shape else apply(Reshape(shape), node)
