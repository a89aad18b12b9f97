"""Ops that rearrange: tensors cut, permuted and joined by a layout, other shapes of the same elements, strided views, rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move, packed_strides, place, pull, split_stack
from streamconv.graph.ops.op import Layout
from streamconv.notation import axes
from streamconv.notation.axes import Axis, Leaf


@dataclass(frozen=True)
class Rearrange(Layout):
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

    layout: str
    sizes: dict[str, int] = field(hash=False)
    stacks: tuple[int, ...]
    output: int = 0
    leading: int = 0
    part: int = 0

    @cached_property
    def _compiled(self) -> tuple[axes.Tree, list[axes.Place], list[int], int, list[int]]:
        layout = axes.parse(self.layout)
        if not 0 <= self.output < len(layout.right) or min(self.sizes.values(), default=0) < 0 or self.sizes.get("1", 1) != 1:
            raise CoverageError(f"layout {self.layout!r} has no output {self.output} of these sizes")
        right = layout.shapes("right", self.sizes)[self.output]
        if not 0 <= self.leading <= len(right) or not 0 <= self.part < math.prod(right[: self.leading]):
            raise CoverageError(f"layout {self.layout!r} makes no tensor {self.part} along {self.leading} leading axes of {list(right)}")
        numel = math.prod(right[self.leading :])
        left = [math.prod(shape) for shape in layout.shapes("left", self.sizes)]
        if len(self.stacks) != len(left) or any(count < 1 or n % count for n, count in zip(left, self.stacks, strict=True)):
            raise CoverageError(f"layout {self.layout!r} does not take {list(self.stacks)} tensors")
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
            for number, part in split_stack(place(piece, digits, where), count, numels[where.tensor] // count):
                yield firsts[where.tensor] + number, part


@dataclass(frozen=True)
class Reshape(Layout):
    """The same elements in the same order under another shape."""

    kind: ClassVar[str] = "reshape"

    shape: tuple[int, ...]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        if math.prod(self.shape) != inputs[0].numel:
            raise CoverageError(f"{inputs[0]} cannot have shape {self.shape}")
        return TensorSpec(inputs[0].dtype, self.shape)

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        yield 0, move


@dataclass(frozen=True)
class Strided(Layout):
    """The elements that start at ``start`` of a tensor's row-major ones and lie ``strides`` apart along the axes of ``shape``.

    Strides are not negative; where one is 0, or smaller than what the axes within it span, elements are repeated.
    """

    kind: ClassVar[str] = "strided"

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @cached_property
    def _compiled(self) -> tuple[axes.Tree, axes.Place]:
        """The digits of a place in the output, as few as its strides allow, and where they lie in the input."""
        whole = Move(self.shape, 0, packed_strides(self.shape), 0, self.strides).simplify()
        tree: axes.Tree = Leaf(0)
        for k in reversed(range(len(whole.sizes))):
            tree = Axis(str(k), whole.dst_strides[k], tree)
        return tree, axes.Place(0, self.start, {str(k): stride for k, stride in enumerate(whole.src_strides)})

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        last = self.start + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        is_inside = 0 in self.shape or last < inputs[0].numel
        if min(self.start, *self.strides, 0) < 0 or not is_inside:
            raise CoverageError(f"a view of shape {list(self.shape)}, strides {list(self.strides)} from {self.start} is not in {inputs[0]}")
        return TensorSpec(inputs[0].dtype, self.shape)

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        tree, where = self._compiled
        for _, piece, digits in pull(tree, move):
            yield 0, place(piece, digits, where)


@dataclass(frozen=True)
class Rows(Layout):
    """Rows ``start`` to ``stop`` of a tensor, along its first axis."""

    kind: ClassVar[str] = "rows"

    start: int
    stop: int
    row: int  # elements

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        shape = inputs[0].shape
        if not shape or not 0 <= self.start <= self.stop <= shape[0] or math.prod(shape[1:]) != self.row:
            raise CoverageError(f"rows {self.start} to {self.stop} are not in {inputs[0]}")
        return TensorSpec(inputs[0].dtype, (self.stop - self.start, *shape[1:]))

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        yield 0, replace(move, src=move.src + self.start * self.row)


@dataclass(frozen=True)
class PickRows(Layout):
    """Rows of one or two tensors in another order: runs of them, one after the other.

    Attributes:
        runs: of each the number of its tensor, its first row there, and how many it has.
        row: elements of one.
    """

    kind: ClassVar[str] = "pick_rows"

    runs: tuple[tuple[int, int, int], ...]
    row: int

    @cached_property
    def _tree(self) -> axes.Tree:
        """Where each run begins."""
        starts = itertools.accumulate((count * self.row for _, _, count in self.runs[:-1]), initial=0)
        return axes.Parts(tuple(starts), tuple(Axis("at", 1, Leaf(k)) for k in range(len(self.runs))))

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        first = inputs[0]
        fits = all(spec.dtype == first.dtype and spec.shape[1:] == first.shape[1:] for spec in inputs)
        fits = fits and bool(first.shape) and math.prod(first.shape[1:]) == self.row
        for tensor, start, count in self.runs:
            fits = fits and 0 <= tensor < len(inputs) and start >= 0 < count and start + count <= inputs[tensor].shape[0]
        if not fits or not self.runs:
            raise CoverageError(f"{self.kind}: there are no such rows in {', '.join(map(str, inputs))}")
        return TensorSpec(first.dtype, (sum(count for _, _, count in self.runs), *first.shape[1:]))

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        for k, piece, digits in pull(self._tree, move):
            tensor, start, _ = self.runs[k]
            yield tensor, place(piece, digits, axes.Place(tensor, start * self.row, {"at": 1}))
