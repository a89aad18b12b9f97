"""The ops of the graph. Each is plain data with a JSON form, knows its output's spec statically, and what its inputs must deliver.

Layout ops are dtype-blind: they move items of N bytes. Only `Cast` and its like interpret values, with torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv import axes
from streamconv.dtypes import CASTABLE, DTYPES, DType, TensorSpec
from streamconv.errors import CoverageError
from streamconv.runs import Move, packed_strides, place, pull, split_stack

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_OPS: dict[str, type[Op]] = {}
_MASKED = 1 << 16  # elements: pieces in which NaNs are looked for


class Op:
    """What a node does. Subclasses are frozen dataclasses whose fields are JSON values.

    An op either rearranges (`pull` gives pieces, nothing is computed), or is elementwise (`pull` gives the move itself, so
    that the plan can see through it, and `compute` turns values), or neither (`pull` gives None, `demand` and `compute`).
    """

    kind: ClassVar[str]
    layout_only: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            _OPS[cls.kind] = cls

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        """The output's spec. Raises CoverageError where the inputs do not fit."""
        raise NotImplementedError

    def pull(self, move: Move) -> Iterator[tuple[int, Move]] | None:
        """(input number, move) pieces that deliver the region, or None where it has to be computed from other regions."""
        raise NotImplementedError

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        """For each part that `compute` needs: the input, and a move of the region wanted into a buffer of its own."""
        raise NotImplementedError

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> None:
        """Writes the region ``move`` of the output into the flat ``out``. Arrays hold items as unsigned integers of their width."""
        raise NotImplementedError

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        """Loads the libraries that `compute` uses, and runs it once where that allocates more."""

    def to_json(self) -> dict[str, Any]:
        """The op as JSON values; `from_json` reads it back."""
        return {"op": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]


def from_json(data: dict[str, Any]) -> Op:
    """The op that `Op.to_json` described."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "op"}
    return _OPS[data["op"]](**values)


@dataclass(frozen=True)
class Rearrange(Op):
    """One output tensor of a layout.

    Attributes:
        layout: the layout's text, without ``...``.
        sizes: the size of every axis.
        stacks: for each left tensor, how many inputs stand behind it (a leading axis given by names counts its tensors).
        output: which right tensor this is.
        leading: how many leading axes of the right tensor enumerate tensors.
        part: which of these tensors this is.
    """

    kind: ClassVar[str] = "rearrange"
    layout_only: ClassVar[bool] = True

    layout: str
    sizes: dict[str, int] = field(hash=False)
    stacks: tuple[int, ...]
    output: int = 0
    leading: int = 0
    part: int = 0

    @cached_property
    def _compiled(self) -> tuple[axes.Tree, list[axes.Place], list[int], int, list[int]]:
        layout = axes.parse(self.layout)
        right = layout.shapes("right", self.sizes)[self.output]
        numel = math.prod(right[self.leading :])
        left = [math.prod(shape) for shape in layout.shapes("left", self.sizes)]
        firsts = [sum(self.stacks[:k]) for k in range(len(self.stacks))]
        return layout.tree(self.output, self.sizes), layout.places("left", self.sizes), left, numel, firsts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output: the right tensor's, without the leading axes that its names enumerate."""
        return axes.parse(self.layout).shapes("right", self.sizes)[self.output][self.leading :]

    @property
    def is_identity(self) -> bool:
        left, right = (side.strip() for side in self.layout.split("->"))
        return left == right and not self.leading and self.stacks == (1,)

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(inputs) != sum(self.stacks):
            raise CoverageError(f"layout {self.layout!r} takes {sum(self.stacks)} tensors, got {len(inputs)}")
        if len(dtypes := {spec.dtype.name for spec in inputs}) > 1:
            raise CoverageError(f"tensors of dtypes {', '.join(sorted(dtypes))} cannot become one; --dtype settles it")
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        numels = [n // count for n, count in zip(self._compiled[2], self.stacks, strict=True) for _ in range(count)]
        for spec, numel in zip(inputs, numels, strict=True):
            if spec.numel != numel:
                raise CoverageError(f"layout {self.layout!r} expects a tensor of {numel} elements, found {spec}")
        return TensorSpec(inputs[0].dtype, self.shape)

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        tree, places, numels, numel, firsts = self._compiled
        start = self.part * numel
        shifted = Move(move.sizes, move.dst, move.dst_strides, move.src + start, move.src_strides) if start else move
        for alternative, piece, digits in pull(tree, shifted):
            where = places[alternative]
            count = self.stacks[where.tensor]
            for number, found in split_stack(place(piece, digits, where), count, numels[where.tensor] // count):
                yield firsts[where.tensor] + number, found


class Elementwise(Op):
    """An op whose output element depends on the one input element at the same place."""

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        yield 0, move

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        return [(0, Move(move.sizes, 0, packed_strides(move.sizes), move.src, move.src_strides))]


@dataclass(frozen=True)
class Cast(Elementwise):
    """Conversion to another floating type by torch, rounding to nearest even; NaNs come out as the one quiet NaN.

    What bits torch itself gives a NaN differs between its vector and its scalar loops, hence with the shape of a tile.
    """

    kind: ClassVar[str] = "cast"

    dtype: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE or self.dtype not in CASTABLE:
            raise CoverageError(f"cannot cast {inputs[0].dtype} to {self.dtype}; casts go between {', '.join(CASTABLE)}")
        return TensorSpec(DTYPES[self.dtype], inputs[0].shape)

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)  # the engine's workers are the threads
        given = torch.full((64,), math.nan, dtype=getattr(torch, inputs[0].dtype.name))
        if given.min().isnan():
            _settle_nans(given.to(getattr(torch, self.dtype)))

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> None:
        given = as_torch(parts[0], specs[0].dtype).view(move.sizes)
        made = as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst).copy_(given)
        if spec.dtype != specs[0].dtype and given.min().isnan():
            _settle_nans(made)


def _settle_nans(values: Any) -> None:
    """Makes every NaN the same, in pieces small enough for their masks not to count."""
    if values.numel() > _MASKED:
        for half in values.chunk(2, dim=max(range(values.dim()), key=lambda k: values.shape[k])):
            _settle_nans(half)
    else:
        values.masked_fill_(values.isnan(), math.nan)


def as_torch(array: Array, dtype: DType) -> Any:
    """The same memory as a flat torch tensor of ``dtype``."""
    import torch

    return torch.from_numpy(array.view("u1")).view(getattr(torch, dtype.name))
