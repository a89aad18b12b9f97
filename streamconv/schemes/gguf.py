"""GGUF's block types: elements with their scales in the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import BLOCK_TYPES, TensorSpec
from streamconv.graph.node import AnyNode, apply, items_of
from streamconv.graph.ops import DequantizeBlocks, Reshape
from streamconv.schemes.scheme import Group, Match, Scheme


@dataclass(frozen=True)
class Blocks(Group):
    """A tensor of such a type."""

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        (node,) = (nodes[name] for name in self.tensors)
        kind, shape = node.spec.dtype, node.spec.shape
        op = DequantizeBlocks(shape if len(shape) > 1 else (1, *shape), dtype, kind.name)
        decoded = apply(op, items_of(node))
        return decoded if decoded.spec.shape == shape else apply(Reshape(shape), decoded)


class Gguf(Scheme):
    """All tensors of GGUF's block types."""

    methods = ("gguf",)
    codes = tuple(BLOCK_TYPES)

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:  # noqa: ARG002
        """See `Scheme.match`."""
        return Match([Blocks(name, (name,)) for name, spec in specs.items() if spec.dtype.name in BLOCK_TYPES])


SCHEME = Gguf()
