"""What another library's own code makes of whole tensors, as an op of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.extras import require
from streamconv.graph.moves import Move, packed_strides
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops.op import Compute, Values

if TYPE_CHECKING:
    from streamconv.library.model import Group, LibraryModel


@dataclass(frozen=True)
class Foreign(Compute):
    """One of the tensors that a converter of transformers makes of a group of them, all at once.

    Attributes:
        given: the model's config and the group, as `bridge` has them, in JSON.
        output: the name of what is made.
        dtype: of that.
        shape: of that.
        numels: elements of each input.
        memory: bytes that it takes beside its inputs, those of its output included.
    """

    kind: ClassVar[str] = "foreign"

    given: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    numels: tuple[int, ...]
    memory: int

    @property
    def label(self) -> str:
        return f"the conversion that makes {self.output}"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if tuple(spec.numel for spec in inputs) != self.numels or self.memory < 0:
            raise CoverageError(f"{self.output} is made of tensors of {self.numels} elements, not of {', '.join(map(str, inputs))}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:  # noqa: ARG002
        strides = [packed_strides(spec.shape) for spec in inputs]
        return [Move(spec.shape, 0, rows, 0, rows) for spec, rows in zip(inputs, strides, strict=True)]

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        return self.memory

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:  # noqa: ARG002
        require("torch", self.label).set_num_threads(1)
        self._load()

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        conversion = json.loads(self.given)
        tensor = self._load().convert(conversion["target"], conversion["group"], self.output, [part.torch() for part in parts])
        out.torch().copy_(tensor.reshape(-1).as_strided(region.sizes, region.src_strides, region.src))
        return 0

    def _load(self) -> LibraryModel:
        return _load_model(json.dumps(json.loads(self.given)["config"], sort_keys=True))


@lru_cache(maxsize=1)
def _load_model(config: str) -> LibraryModel:
    from streamconv.library.model import LibraryModel

    return LibraryModel(json.loads(config), "a plan")


def make_foreign(model: LibraryModel, converter: Any, target: str, group: Group, nodes: Mapping[str, AnyNode]) -> dict[str, AnyNode]:
    """Nodes that run a converter on all of its tensors; their specs, and what it allocates, are found on tensors without data."""
    from streamconv.library.lazy import Allocations, spec_of, without_data

    with Allocations() as allocations:  # type: ignore[no-untyped-call]
        tensors = model.run(converter, target, group, lambda name: without_data(nodes[name].spec))
    conversion = json.dumps({"config": model.config, "target": target, "group": group}, sort_keys=True)
    numels = tuple(node.spec.numel for node in nodes.values())
    outputs: dict[str, AnyNode] = {}
    for name, tensor in tensors.items():
        spec = spec_of(tensor[0] if isinstance(tensor, list) else tensor)
        op = Foreign(conversion, name, spec.dtype.name, spec.shape, numels, allocations.nbytes + spec.nbytes)
        outputs[name] = apply(op, *nodes.values())
    return outputs
