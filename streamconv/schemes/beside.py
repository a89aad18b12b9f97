"""Quantized weights and what stands beside them, by name: what each is made of, and that nothing is left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.entries import TensorEntry
from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import packed_strides
from streamconv.graph.node import AnyNode, Node, apply, made_of
from streamconv.graph.ops import Strided
from streamconv.schemes.scheme import Group, Match

if TYPE_CHECKING:
    from numpy import ndarray

SERVING = re.compile(
    r"\.(?:(?:input|output|activation)_(?:scale|zero_point|global_scale)|input_scale_ub|qscale_act|[qkv]_scale)$|_activation_scale$"
)
"""Names of what serves activations or a cache, which an unquantized model has none of."""
SERVES = "a scale of activations, which an unquantized model has none of"


class Companions:
    """The tensors of a checkpoint, of which weights take some.

    Args:
        specs: all of them.
        title: what messages begin with.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], title: str) -> None:
        self._specs, self._title = specs, title
        self._used: set[str] = set()

    def take(self, weight: str, names: Iterable[str]) -> str | None:
        """The one of these names that there is; None: none is. Raises CoverageError where there are several."""
        present = [name for name in names if name in self._specs]
        if len(present) > 1:
            raise CoverageError(f"{self._title}: {weight}: {' and '.join(present)} could both be its own: mend the source")
        self._used.update(present)
        return present[0] if present else None

    def need(self, weight: str, names: Sequence[str]) -> str:
        """`take`. Raises CoverageError where there is none."""
        name = self.take(weight, names)
        if name is None:
            raise CoverageError(f"{self._title}: {weight} is {self._specs[weight]}, and there is no {' or '.join(names)}: mend the source")
        return name

    def conclude(self, groups: Sequence[Group], own: re.Pattern[str], spare: Mapping[str, str] | None = None) -> Match:
        """What these weights make of a checkpoint.

        Args:
            groups: the weights.
            own: what names of a quantization's tensors end in.
            spare: tensors that nothing is made of, with the reason.

        Raises:
            CoverageError: one of them belongs to no weight.
        """
        dropped = dict(spare or {})
        for name in self._specs:
            if SERVING.search(name) and groups:
                dropped[name] = SERVES
            elif name not in self._used and name not in dropped:
                end = own.search(name)
                if end:
                    raise CoverageError(f"{self._title}: {name} belongs to {name[: end.start()]}, which has no codes: mend the source")
        return Match(groups, dropped)


def read(name: str, nodes: Mapping[str, AnyNode]) -> ndarray[Any, Any]:
    """A small tensor."""
    return TensorEntry(name, nodes[name]).numpy()


def transpose(node: AnyNode) -> AnyNode:
    """Matrices, or stacks of them, with rows and columns changed for each other."""
    *stack, rows, columns = node.spec.shape
    *outer, down, _ = packed_strides(node.spec.shape)
    return apply(Strided((*stack, columns, rows), (*outer, 1, down), 0), node)


def untransposed(node: AnyNode) -> AnyNode:
    """What matrices are that were only transposed, as gpt-oss has its experts; others themselves."""
    if isinstance(node, Node) and isinstance(node.op, Strided):
        (inner,) = node.inputs
        if len(inner.spec.shape) > 1 and made_of(transpose(inner)) == made_of(node):
            return inner
    return node
