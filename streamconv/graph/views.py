"""Views: strided looks at stored tensors, as frameworks save them and as an index asks for them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from types import EllipsisType
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import OutOfBounds
from streamconv.graph.moves import packed_strides
from streamconv.graph.node import AnyNode, Extent, Source, apply
from streamconv.graph.ops import Rearrange, Strided
from streamconv.notation.axes import MOST_PARTS


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie between the first and the last of a view, both included; 0 where it has none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def stored_view(spec: TensorSpec, strides: Sequence[int], path: str, offset: int) -> AnyNode:
    """A tensor whose first element is at byte ``offset`` of a file, and whose others lie ``strides`` elements apart.

    What is row-major is a stored tensor; else it is a view of the stored elements from its first to its last one. Two that
    look at the same elements in the same way are equal by `graph.made_of`.
    """
    steps = tuple(0 if size == 1 else stride for size, stride in zip(spec.shape, strides, strict=True))
    rows = tuple(0 if size == 1 else stride for size, stride in zip(spec.shape, packed_strides(spec.shape), strict=True))
    if not spec.numel or steps == rows:
        return Source(spec, (Extent(path, offset, spec.nbytes),))
    numel = span(spec.shape, steps)
    flat = Source(TensorSpec(spec.dtype, (numel,)), (Extent(path, offset, numel * spec.dtype.itemsize),))
    return apply(_strided(spec.shape, steps), flat)


@lru_cache(maxsize=4096)
def _strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Strided:
    """One op for all tensors that are stored alike."""
    return Strided(shape, strides)


def join_rows(nodes: Sequence[AnyNode]) -> AnyNode:
    """Tensors one after the other, along their first axis."""
    if len(nodes) == 1:
        return nodes[0]
    if len(nodes) > MOST_PARTS:
        return join_rows([join_rows(nodes[start : start + MOST_PARTS]) for start in range(0, len(nodes), MOST_PARTS)])
    rest = [f"d{k}" for k in range(len(nodes[0].spec.shape) - 1)]
    axes = [f"r{k}" for k in range(len(nodes))]
    inputs = [" ".join([axis, *rest]) for axis in axes]
    output = " ".join([f"({' + '.join(axes)})", *rest])
    layout = f"{', '.join(inputs)} -> {output}"
    sizes = {"1": 1, **dict(zip(rest, nodes[0].spec.shape[1:], strict=True))}
    sizes |= {axis: node.spec.shape[0] for axis, node in zip(axes, nodes, strict=True)}
    return apply(Rearrange(layout, sizes, (1,) * len(nodes)), *nodes)


Index = int | slice | EllipsisType | None | tuple[int | slice | EllipsisType | None, ...]
"""What `select` takes: numpy's basic indexing."""


def select(shape: tuple[int, ...], index: Index, name: str) -> tuple[Strided, tuple[int, ...], tuple[int, ...]]:
    """What a basic index selects of a tensor of ``shape``, called ``name``: a view, its shape, and which of its axes are to be reversed.

    Raises:
        IndexError: as numpy does; it is a UsageError, too.
    """
    sizes, strides, reversed_axes = [], [], []
    start, axis = 0, 0
    pitches = packed_strides(shape)
    for item in _without_ellipsis(shape, index if isinstance(index, tuple) else (index,), name):
        if item is None:
            sizes.append(1)
            strides.append(0)
            continue
        pitch, size = pitches[axis], shape[axis]
        if isinstance(item, slice):
            indices = range(size)[item]
            if indices.step < 0:
                reversed_axes.append(len(sizes))
                indices = indices[::-1]
            start += indices.start * pitch if indices else 0
            sizes.append(len(indices))
            strides.append(indices.step * pitch)
        else:
            start += _position(item, size, axis, name) * pitch
        axis += 1
    return Strided(tuple(sizes), tuple(strides), start), tuple(sizes), tuple(reversed_axes)


def _without_ellipsis(shape: tuple[int, ...], index: tuple[Any, ...], name: str) -> list[Any]:
    """An index with an entry for each axis, and None where an axis is added."""
    count = sum(item is not None and item is not ... for item in index)
    dots = [k for k, item in enumerate(index) if item is ...]
    if count > len(shape):
        raise OutOfBounds(f"{name}: {count} indices, and its shape {list(shape)} has {len(shape)} axes: give no more than that")
    if len(dots) > 1:
        raise OutOfBounds(f"{name}: an index has one ellipsis (...) at most: leave out the others")
    at = dots[0] if dots else len(index)
    whole = [slice(None)] * (len(shape) - count)
    return [*index[:at], *whole, *index[at + 1 :]]


def _position(item: Any, size: int, axis: int, name: str) -> int:
    """A whole number as a place on an axis."""
    try:
        position = operator.index(item)
    except TypeError:
        position = None
    if position is None or isinstance(item, bool):
        kind = type(item).__name__
        raise OutOfBounds(f"{name}: indices are whole numbers, slices, ... and None, found a {kind}: index what .numpy() gives instead")
    if not -size <= position < size:
        raise OutOfBounds(f"{name}: index {position} is out of bounds for axis {axis} of {size}")
    return position % size
