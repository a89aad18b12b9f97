"""Tensors that lie cut into boxes, in one file or in many: put together as layouts of what is stored, or refused by name.

Boxes come from rows given to ranks, grids of rows and columns, or stripes of them: any cut that goes through a whole tensor, or through a
whole part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError
from streamconv.formats.files import short, show
from streamconv.graph.node import AnyNode, Extent, Source, apply
from streamconv.graph.ops import Rearrange, Reshape
from streamconv.storage.folder import Location

Box = tuple[tuple[int, int], ...]
"""The first element and the one behind the last, along each axis."""
Replica = tuple[AnyNode, AnyNode, str]
"""Two pieces that should hold the same bytes, and the tensor that they are of: see `Contents.replicas`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: where it begins along each axis, and what it holds, in the box's shape."""

    offsets: tuple[int, ...]
    node: AnyNode

    @property
    def box(self) -> Box:
        return tuple((start, start + size) for start, size in zip(self.offsets, self.node.spec.shape, strict=True))


def read_sizes(value: Any) -> tuple[int, ...]:
    """Sizes or offsets that a table says. Raises ValueError: they are none."""
    if type(value) not in (tuple, list) or not all(type(one) is int and 0 <= one < 1 << 62 for one in value):
        raise ValueError(f"{short.repr(value)} are no sizes")
    return tuple(value)


def assemble(path: Location, name: str, spec: TensorSpec, pieces: Sequence[Piece]) -> tuple[AnyNode, list[Replica]]:
    """A tensor made of its pieces, and pairs of those that are the same box: the first of each is taken.

    Args:
        path: where it lies, for messages.
        name: what it is called, for messages.
        spec: of the whole.
        pieces: in any order; empty ones count for nothing.

    Raises:
        FormatError: pieces leave a hole, overlap, or are not of the tensor.
    """
    taken: dict[Box, AnyNode] = {}
    replicas: list[Replica] = []
    for piece in pieces:
        if len(piece.offsets) != len(spec.shape) or piece.node.spec.dtype != spec.dtype:
            raise FormatError(f"{show(path)}: {short.repr(name)} is {spec}, and a piece of it is {piece.node.spec}: save it again")
        box = piece.box
        if any(stop > size for (_, stop), size in zip(box, spec.shape, strict=True)):
            raise FormatError(f"{show(path)}: a piece of {short.repr(name)} {spec} ends beyond it, {_text(box)}: save it again")
        if not piece.node.spec.numel and spec.numel:
            continue
        if box in taken:
            replicas.append((taken[box], piece.node, name))
        else:
            taken[box] = piece.node
    if not spec.numel:
        return Source(spec, (Extent(str(path), 0, 0),)), replicas
    whole: Box = tuple((0, size) for size in spec.shape)
    return _join(path, name, spec, whole, taken), replicas


def _join(path: Location, name: str, spec: TensorSpec, whole: Box, pieces: dict[Box, AnyNode]) -> AnyNode:
    """What fills a box, of pieces that lie in it."""
    if not pieces:
        raise FormatError(f"{show(path)}: {short.repr(name)} {spec}: {_text(whole)} is in no file: fetch the files of all ranks")
    if len(pieces) == 1:
        (box, node), *_ = pieces.items()
        if box == whole:
            return node
    for axis, (first, last) in enumerate(whole):
        groups = _cut(pieces, axis)
        if len(groups) == 1 and groups[0][:2] == (first, last):
            continue
        nodes, end = [], first
        for start, stop, inner in groups:
            if start != end:
                _raise_hole(path, name, spec, whole, axis, (end, start))
            part = (*whole[:axis], (start, stop), *whole[axis + 1 :])
            nodes.append(_join(path, name, spec, part, inner))
            end = stop
        if end != last:
            _raise_hole(path, name, spec, whole, axis, (end, last))
        return _concatenate(nodes, axis, tuple(stop - start for start, stop in whole))
    ordered = sorted(pieces)
    raise FormatError(f"{show(path)}: pieces of {short.repr(name)} {spec} overlap, such as {_text(ordered[0])} and {_text(ordered[1])}")


def _cut(pieces: dict[Box, AnyNode], axis: int) -> list[tuple[int, int, dict[Box, AnyNode]]]:
    """Pieces in groups that no piece goes beyond, along an axis: start and stop of each group, in order."""
    groups: list[tuple[int, int, dict[Box, AnyNode]]] = []
    for box in sorted(pieces, key=lambda box: box[axis]):
        start, stop = box[axis]
        if groups and start < groups[-1][1]:
            first, end, members = groups.pop()
            members[box] = pieces[box]
            groups.append((first, max(end, stop), members))
        else:
            groups.append((start, stop, {box: pieces[box]}))
    return groups


def _concatenate(nodes: list[AnyNode], axis: int, sizes: tuple[int, ...]) -> AnyNode:
    """Tensors one behind the other along an axis: where that is how they would be stored, as extents of one."""
    if len(nodes) == 1:
        return nodes[0]
    spec = TensorSpec(nodes[0].spec.dtype, sizes)
    outer = inner = 1
    for size in sizes[:axis]:
        outer *= size
    for size in sizes[axis + 1 :]:
        inner *= size
    stored = [node for node in nodes if isinstance(node, Source)]
    if outer == 1 and len(stored) == len(nodes):
        return Source(spec, tuple(extent for node in stored for extent in node.extents))
    names = [f"n{number}" for number in range(len(nodes))]
    layout = f"{', '.join(f'o {name} i' for name in names)} -> o ({' + '.join(names)}) i"
    counts = {name: node.spec.shape[axis] for name, node in zip(names, nodes, strict=True)}
    joined = apply(Rearrange(layout, {"o": outer, "i": inner, **counts}, (1,) * len(nodes)), *nodes)
    return apply(Reshape(sizes), joined)


def _raise_hole(path: Location, name: str, spec: TensorSpec, whole: Box, axis: int, missing: tuple[int, int]) -> None:
    box = (*whole[:axis], missing, *whole[axis + 1 :])
    raise FormatError(f"{show(path)}: {short.repr(name)} {spec}: {_text(box)} is in no file: fetch the files of all ranks, or save again")


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
