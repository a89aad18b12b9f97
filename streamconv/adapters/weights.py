"""The tensors of a model while adapters are merged into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamconv.dtypes import CASTABLE, TensorSpec
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Cast
from streamconv.notation.names import nearest

ADDED, SCALED, REPLACED, UNTIED = "add an adapter", "scale by an adapter", "replaced by an adapter", "untied by an adapter"
"""How tensors have become others."""

QUANTIZED = "quantization_config"
DTypeOf = Callable[[str, TensorSpec], str | None]
"""Which dtype a tensor shall have, None: its own."""


class Weights:
    """A model's tensors by name, as they have become.

    Attributes:
        entries: all of them.
        config: the model's.
        changed: those that are others now -> how.
        config_changes: keys of the config, with dots, that go with that -> what they say.
        recast: in which dtype those shall be that adapters change.
        former: tensors that have come -> the one that they were.
        replaced: those that the adapter at hand replaces.
        hint: what a message adds that names do not fit.

    Args:
        dtype_of: in which dtype those shall be that adapters change, so that they are rounded once.
    """

    def __init__(self, entries: Mapping[str, AnyNode], config: Mapping[str, Any], dtype_of: DTypeOf) -> None:
        self.entries, self.config, self.recast = dict(entries), config, dtype_of
        self.changed: dict[str, str] = {}
        self.config_changes: dict[str, Any] = {}
        self.former: dict[str, str] = {}
        self.replaced: set[str] = set()
        self.hint = ""
        self._replaced_by: dict[str, str] = {}

    def find(self, name: str, title: str, key: str) -> AnyNode:
        """The tensor that one of an adapter is for. Raises CoverageError: there is none, or it holds no numbers."""
        if name not in self.entries:
            near = nearest(name, self.entries)
            hint = f"; the nearest is {near[0]}" if near else ""
            if QUANTIZED in self.config:
                raise CoverageError(f"{title}: {key}: SRC has no {name}{hint}: it is quantized: dequantize it with --dequantize")
            raise CoverageError(f"{title}: {key}: SRC has no {name}{hint}: is it an adapter of this model?{self.hint}")
        node = self.entries[name]
        if node.spec.dtype.name not in CASTABLE:
            raise CoverageError(f"{title}: {name} of SRC is {node.spec}, no floating point: dequantize it with --dequantize")
        return node

    def dtype_of(self, name: str) -> str:
        """The dtype of what becomes of a tensor."""
        spec = self.entries[name].spec
        return self.recast(name, spec) or spec.dtype.name

    def set(self, name: str, node: AnyNode, how: str) -> None:
        """Has another tensor in the place of one."""
        self.entries[name] = node
        steps = [*filter(None, [self.changed.get(name)]), *([how] if not self.changed.get(name, "").endswith(how) else [])]
        self.changed[name] = ", then ".join(steps)

    def replace(self, name: str, node: AnyNode) -> None:
        """Has an adapter's own tensor in the place of one, in the dtype of that."""
        dtype = self.entries[name].spec.dtype
        self.replaced.add(name)
        self.set(name, node if node.spec.dtype == dtype else apply(Cast(dtype.name), node), REPLACED)

    def conclude(self, title: str) -> None:
        """Is called when all of an adapter is merged. Raises UsageError where it replaces what another one has replaced."""
        for name in sorted(self.replaced):
            if name in self._replaced_by:
                raise UsageError(f"{title}: {name} is replaced by {self._replaced_by[name]}, too: leave one of them out")
            self._replaced_by[name] = title
        self.replaced.clear()
