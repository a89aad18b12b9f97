"""What an op is, of each of its kinds, and how it stands in a plan.

There are three kinds: a `Layout` says which pieces of its inputs a region of its output is, a `Compute` makes the values of a region of
those of its inputs, a `Reduce` sees all of its input in passes and leaves a small value. An op is a frozen dataclass whose fields are JSON
values; a subclass with a ``kind`` of its own is known by it to every plan that is read from then on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv import codec
from streamconv.dtypes import DType, TensorSpec
from streamconv.errors import FormatError
from streamconv.extensions import extensions
from streamconv.extras import require
from streamconv.graph.moves import Move

if TYPE_CHECKING:
    from numpy import ndarray

    from streamconv.graph.losses import Loss

    Array = ndarray[Any, Any]

GROUP = "streamconv.ops"
"""Entry points of other packages: the kind of an op, and the class."""

_OPS: dict[str, type[Op]] = {}
_LARGEST = 2**63


class Op(ABC):
    """What a node does: one of `Layout`, `Compute` and `Reduce`."""

    kind: ClassVar[str]
    counts: ClassVar[str] = "overflowed"
    """Which attribute of a `Loss` its values are counted as, where it is a target's last one and counts some."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__ and _OPS.setdefault(cls.kind, cls) is not cls:
            raise TypeError(f"two ops are of kind {cls.kind!r}: {_OPS[cls.kind].__module__} has one already")

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.kind

    @abstractmethod
    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        """The output's spec. Raises CoverageError where the inputs do not fit."""

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:  # noqa: B027 - most have nothing to load
        """Loads what making values uses, and uses it once where that takes memory for good: the process is measured afterwards."""

    def to_json(self) -> dict[str, Any]:
        """The op as JSON values; `from_json` reads it back."""
        return {"op": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]


class Layout(Op):
    """An op that rearranges: it moves items of N bytes, whatever they stand for."""

    @abstractmethod
    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        """Which pieces of the inputs the region ``move`` of the output is: the number of an input, and a move from it to the same place."""


@dataclass(frozen=True, slots=True)
class Values:
    """Values in memory: ``items``, unsigned integers as wide as they are, in the shape of a region, and their dtype."""

    items: Array
    dtype: DType

    def torch(self) -> Any:
        """The same memory as a torch tensor."""
        return as_torch(self.items, self.dtype)

    def numpy(self) -> Array:
        """The same memory as numpy has it: for dtypes that it does not have, as ml_dtypes has it."""
        from streamconv.graph.arrays import numpy_dtype

        return self.items.view(numpy_dtype(self.dtype.name))


class Compute(Op):
    """An op that makes values of values. A region is a `Move`: what of a tensor its source side says, packed in the order of its axes."""

    @abstractmethod
    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:
        """For each input, the region of it that a region of the output is made of."""

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:  # noqa: ARG002
        """For each input, how many elements of it `needs` asks for at most, whatever ``numel`` elements are wanted.

        Where that is all of every input, as it is unless an op says less, the planner has all of the output made at once.
        """
        return [spec.numel for spec in inputs]

    @property
    def grains(self) -> tuple[int, ...]:
        """Elements side by side of which one, or whole multiples, are computed with less work than others; larger ones first."""
        return ()

    def cut(self, region: Move, inputs: Sequence[TensorSpec]) -> Iterator[Move]:  # noqa: ARG002
        """The parts that a region of the output is made by, since all of it at once would ask for more than `reach` says."""
        yield region

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        """Bytes that `values` takes at most beside what it is given."""
        return 0

    @abstractmethod
    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        """Writes the region's values into ``out``, which has its shape, wherever it lies.

        Args:
            region: of the output.
            parts: what `needs` asked for, in the shapes of those regions.
            out: to be filled.

        Returns:
            How many of the values were made of finite ones and are infinite, being too large for their dtype.
        """

    def loss(self, region: Move, parts: Sequence[Values], out: Values) -> Loss | None:  # noqa: ARG002
        """What `values` has lost, of the same arguments afterwards; None where an op does not round, or nobody asks how much."""
        return None

    def change(self, region: Move, parts: Sequence[Values], out: Values) -> Loss | None:  # noqa: ARG002
        """How many elements of what `values` has changed are others now, whether or not anybody asks; None where an op counts none."""
        return None


class Elementwise(Compute):
    """An op each of whose output's elements is made of the element at the same place of its first input, and of its others, if any.

    Plans see through it: regions are chosen as the first input is best read. The inputs have one shape, unless `needs` says otherwise.
    """

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:
        """The same region of each input."""
        return [region] * len(inputs)

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """See `Compute.reach`."""
        return [numel] * len(inputs)


Fetch = Callable[[int, int, "Array"], None]
"""Reads elements of an input, by its number, from one on, into an array of as many."""


class Reduce(Op):
    """An op that sees its inputs once, in passes, and leaves a small value, all of it at once.

    Where a `Compute` takes it, it runs ahead of the first tile that does, once in a process, and the value is kept for the others;
    a run that is resumed makes it again. Else it is a tile of its own.
    """

    @abstractmethod
    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """The memory that `reduce` takes, as (elements, bytes of each); the first is what it reads into, the last the output."""

    @abstractmethod
    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        """Leaves all of the output in the last of the ``buffers``, in the same order of operations wherever it runs."""


def from_json(data: Mapping[str, Any]) -> Op:
    """The op that `Op.to_json` described.

    Raises:
        FormatError: there is none like that.
    """
    given = dict(data)
    kind = given.pop("op", None)
    op = _find(kind)
    if any(abs(number) >= _LARGEST for number in _numbers(given)):
        raise FormatError(f"op {kind}: whole numbers stay below 2**63")
    if unknown := sorted(given.keys() - {f.name for f in fields(op)}):  # type: ignore[arg-type]
        raise FormatError(f"op {kind} has no {unknown[0]!r}")
    try:
        return codec.convert(given, op)
    except FormatError as error:
        raise FormatError(f"op {kind}: {error}") from error


def _find(kind: object) -> type[Op]:
    """The class of ops of a kind: one of this package, that is loaded, or that another package offers."""
    if isinstance(kind, str) and kind not in _OPS:
        for module in iter_modules([str(Path(__file__).parent)]):
            import_module(f"{__package__}.{module.name}")
    if isinstance(kind, str) and kind not in _OPS:
        for extension in extensions(GROUP):
            if extension.name == kind:
                extension.load()
    if not isinstance(kind, str) or kind not in _OPS:
        raise FormatError(f"there is no op {kind!r}; known are {', '.join(_OPS)}")
    return _OPS[kind]


def _numbers(value: object) -> Iterator[int]:
    """All whole numbers in a value of JSON."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def as_torch(array: Array, dtype: DType) -> Any:
    """The same memory as a torch tensor of ``dtype``, in the array's shape.

    Raises:
        MissingDependency: torch is not installed.
    """
    torch = require("torch", "a tensor of torch")
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(getattr(torch, dtype.name))
