"""Evaluation of a region of a node into memory, within a fixed arena; one implementation for tiles of any shape.

``arena_bytes`` is the other half of ``evaluate``: the most that it takes. Memory is bounded by construction, not by estimate.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.graph.moves import Move, identity, packed, packed_strides
from streamconv.graph.node import AnyNode, Extent, Node, Source, descend, items_of
from streamconv.graph.ops import Compute, Elementwise, Layout, Reduce, Values
from streamconv.graph.reductions import value_of

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

COMPARE = 1 << 20  # bytes of each side that are compared at a time
Read = Callable[[str, int, memoryview], None]
"""Fills a buffer from a byte offset of a file."""
Expect = Callable[[Iterable[tuple[str, int, int]]], None]
"""Is told what will be read next: path, offset and bytes."""

ALIGN = 64  # bytes
SPAN = 64 << 10  # bytes: scattered items are picked from a span of at least this, read at once
DIRECT = 16 << 10  # bytes: runs of at least this are read straight to their place
PAGE = 4 << 10  # bytes: pieces shorter than this are read with what is between them ...
NEAR = 8  # ... where a span has as many of them
BAND = 256 << 10  # bytes: a transposing copy goes through packed bands of this size, which stay in the cache
NARROW = 64  # elements: axes shorter than this are not worth a band


# Shared, which is the default, would count as file pages.
PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Arena:
    """A worker's buffers: one block of anonymous memory, given out from the front and taken back in reverse."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, 1), **PRIVATE)
        self._array = np.frombuffer(self._memory, dtype=np.uint8)
        self._used = 0
        self.overflowed = 0  # values evaluated here that were finite, and are too large for what they were cast to

    def take(self, numel: int, itemsize: int) -> Array:
        """A flat array of ``numel`` items as unsigned integers (as bytes where an item is wider than eight)."""
        nbytes = numel * itemsize
        start, self._used = self._used, self._used + round_up(nbytes)
        if start + nbytes > len(self._array):
            raise MemoryError(f"arena of {len(self._array)} bytes cannot hold {start + nbytes}")
        return self._array[start : start + nbytes].view(f"u{itemsize}")

    @property
    def mark(self) -> int:
        return self._used

    def release(self, mark: int) -> None:
        """Takes back everything given out since ``mark``."""
        self._used = mark


def round_up(nbytes: int) -> int:
    """``nbytes`` as an arena counts them."""
    return -(-nbytes // ALIGN) * ALIGN


def arena_bytes(node: AnyNode, tile: int, *, scattered: bool = False) -> int:
    """Bytes of arena that evaluating ``tile`` bytes of ``node`` takes at most, the tile's own included.

    Regions of a node that nothing rearranges are contiguous, as its tiles are, unless ``scattered`` says that any will be asked for.
    """
    numel = max(1, tile // node.spec.dtype.itemsize)
    return round_up(numel * node.spec.dtype.itemsize) + _below(node, numel, scattered=scattered)


def _below(node: AnyNode, numel: int, *, scattered: bool = False) -> int:
    """What evaluating ``numel`` elements takes beside their own buffer; scattered ones are picked from spans."""
    if not isinstance(node, Node):
        return round_up(max(numel * node.spec.dtype.itemsize * 5 // 4, SPAN)) + round_up(BAND) if scattered else 0
    op, specs = node.op, [child.spec for child in node.inputs]
    if isinstance(op, Layout):
        return max((_below(child, numel, scattered=True) for child in node.inputs), default=0)
    if isinstance(op, Reduce):  # which reads its inputs in order, whatever region is wanted
        buffers = op.buffers(specs)
        below = max(_below(child, buffers[0][0]) for child in node.inputs)
        return below + sum(round_up(count * itemsize) for count, itemsize in buffers) + round_up(BAND)
    assert isinstance(op, Compute)
    parts = list(zip(node.inputs, op.reach(numel, specs), strict=True))
    alike = [scattered or not (isinstance(op, Elementwise) and k == 0) for k in range(len(parts))]  # other regions may be of any kind
    below = max((_below(child, count, scattered=kind) for (child, count), kind in zip(parts, alike, strict=True)), default=0)
    return below + op.scratch(specs) + sum(round_up(count * child.spec.dtype.itemsize) for child, count in parts)


def evaluate(node: AnyNode, move: Move, out: Array, arena: Arena, read: Read) -> None:
    """Writes the region ``move`` of ``node`` into the flat array ``out``. Of infinities and NaNs in it numpy does not warn."""
    with np.errstate(all="ignore"):
        _evaluate(node, move, out, arena, read, beside=False)


def _evaluate(node: AnyNode, move: Move, out: Array, arena: Arena, read: Read, *, beside: bool) -> None:
    """The same; ``beside``: of what other regions need, too."""
    if not isinstance(node, Node):
        _gather(node, move.simplify(), out, arena, read)
        return
    mark, op = arena.mark, node.op
    if isinstance(op, Layout):
        for number, piece in op.pull(move):
            _evaluate(node.inputs[number], piece, out, arena, read, beside=beside)
    elif isinstance(op, Reduce):
        overflowed, reduction = arena.overflowed, partial(_reduce, node, op, arena, read)
        value = value_of(node, lambda: reduction().copy()) if beside else reduction()
        if beside:  # the same values are counted where they are written
            arena.overflowed = overflowed
        copy_strided(out[move.dst :], value[move.src :], list(zip(move.sizes, move.dst_strides, move.src_strides, strict=True)), arena)
    else:
        assert isinstance(op, Compute)
        _compute(node, op, move, out, arena, read, beside=beside)
    arena.release(mark)


def _compute(node: Node, op: Compute, move: Move, out: Array, arena: Arena, read: Read, *, beside: bool) -> None:
    """Has an op fill a region of its output, wherever that lies, from regions of its inputs in buffers of their own."""
    overflowed, region = arena.overflowed, packed(move)
    parts = []
    needs = op.needs(region, [child.spec for child in node.inputs])
    for (child, is_beside), input_region in zip(descend(node, beside=beside), needs, strict=True):
        part = arena.take(input_region.numel, child.spec.dtype.itemsize)
        _evaluate(child, packed(input_region), part, arena, read, beside=is_beside)
        parts.append(Values(part.reshape(input_region.sizes), child.spec.dtype))
    if not isinstance(op, Elementwise):  # which may ask for the same values again and again
        arena.overflowed = overflowed
    strides = [stride * out.itemsize for stride in move.dst_strides]
    target: Array = np.ndarray(move.sizes, out.dtype, out, move.dst * out.itemsize, strides)
    arena.overflowed += op.values(region, parts, Values(target, node.spec.dtype))


def _reduce(node: Node, op: Reduce, arena: Arena, read: Read) -> Array:
    """All of a node's output, in the arena."""
    specs = [child.spec for child in node.inputs]
    buffers = [arena.take(count, itemsize) for count, itemsize in op.buffers(specs)]

    def fetch(number: int, start: int, part: Array) -> None:
        _evaluate(node.inputs[number], identity(len(part), start), part, arena, read, beside=True)

    op.reduce(specs, fetch, buffers)
    return buffers[-1]


def reads(node: AnyNode, move: Move, *, beside: bool = False) -> Iterator[tuple[str, int, int]]:
    """What evaluating the region ``move`` reads, in that order: path, offset and bytes; less what is read once for many regions."""
    if not isinstance(node, Node):
        for start, count in _spans(node, move.simplify()):
            yield from _split(node.extents, start, count)
    elif isinstance(node.op, Layout):
        for number, piece in node.op.pull(move):
            yield from reads(node.inputs[number], piece, beside=beside)
    elif isinstance(node.op, Compute) or not beside:
        specs = [child.spec for child in node.inputs]
        regions = node.op.needs(packed(move), specs) if isinstance(node.op, Compute) else [identity(spec.numel) for spec in specs]
        for (child, is_beside), region in zip(descend(node, beside=beside), regions, strict=True):
            yield from reads(child, region, beside=is_beside)


def kinds(nodes: Iterable[AnyNode]) -> Iterator[Node]:
    """A node of each kind and dtypes that there are among these and below."""
    stack, visited = list(nodes), set()
    while stack:
        node = stack.pop()
        if isinstance(node, Node):
            stack.extend(node.inputs)
            key = (node.op.kind, node.spec.dtype, *(child.spec.dtype for child in node.inputs))
            if key not in visited:
                visited.add(key)
                yield node


def prepare(nodes: Iterable[AnyNode]) -> None:
    """Loads what evaluating these nodes needs, so that measuring the process afterwards counts it."""
    for node in kinds(nodes):
        node.op.prepare([child.spec for child in node.inputs])


def same_bytes(left: AnyNode, right: AnyNode, arena: Arena, read: Read, expect: Expect = lambda _: None) -> bool:
    """Whether two nodes hold the same bytes. The arena has room for evaluating them and for `COMPARE` bytes of each."""
    if left.spec != right.spec:
        return False
    left, right = items_of(left), items_of(right)
    itemsize, mark = left.spec.dtype.itemsize, arena.mark
    step = COMPARE // itemsize
    for start in range(0, left.spec.numel, step):
        count = min(step, left.spec.numel - start)
        parts = []
        ahead = [identity(count if isinstance(node, Node) else left.spec.numel - start, start) for node in (left, right)]
        expect(itertools.chain(reads(left, ahead[0]), reads(right, ahead[1])))
        for node in (left, right):
            part = arena.take(count, itemsize)
            evaluate(node, identity(count, start), part, arena, read)
            parts.append(part)
        equal = bool(np.array_equal(parts[0], parts[1]))
        arena.release(mark)
        if not equal:
            return False
    return True


def _gather(source: Source, move: Move, out: Array, arena: Arena, read: Read) -> None:
    """Reads the region of a stored tensor: whole runs where they are long, else spans from which the items are picked."""
    for part in _in_spans(move, source.spec.dtype.itemsize):
        _gather_part(source, part, out, arena, read)


def _gather_part(source: Source, move: Move, out: Array, arena: Arena, read: Read) -> None:
    """The same of a region that takes a few spans, or long runs."""
    itemsize = source.spec.dtype.itemsize
    run = move.run
    if _is_direct(move, itemsize):
        for dst, src in _by_source(move).runs():
            read_bytes(source, src * itemsize, out[dst : dst + run].data.cast("B"), read)
        return
    axes, outer = _cut(move, itemsize)
    count, span, mark = _numel(axes[:outer]), _span(axes[outer:]), arena.mark
    together = count * span * itemsize <= max(move.numel * itemsize * 5 // 4, SPAN)
    scratch = arena.take(count * span if together else span, itemsize)
    bytes_of, at = scratch.data.cast("B"), 0
    for index in itertools.product(*(range(n) for n, _, _ in axes[:outer])):
        src = move.src + sum(k * s for k, (_, _, s) in zip(index, axes, strict=False))
        read_bytes(source, src * itemsize, bytes_of[at : at + span * itemsize], read)
        if together:
            at += span * itemsize
        else:
            dst = move.dst + sum(k * d for k, (_, d, _) in zip(index, axes, strict=False))
            copy_strided(out[dst:], scratch, axes[outer:], arena)
    if together:
        pitches = [span * stride for stride in packed_strides(tuple(n for n, _, _ in axes[:outer]))]
        packed = [(n, d, pitch) for (n, d, _), pitch in zip(axes, pitches, strict=False)]
        copy_strided(out[move.dst :], scratch, packed + axes[outer:], arena)
    arena.release(mark)


def _split(extents: Iterable[Extent], start: int, count: int) -> Iterator[tuple[str, int, int]]:
    """Where in which files ``count`` bytes of a stored tensor from ``start`` lie."""
    at = 0
    for extent in extents:
        first, stop = max(start, at), min(start + count, at + extent.nbytes)
        if first < stop:
            yield extent.path, extent.offset + first - at, stop - first
        at += extent.nbytes


def _spans(source: Source, move: Move) -> Iterator[tuple[int, int]]:
    """The bytes of a stored tensor that `_gather` reads for a simplified move: first and number, in order."""
    itemsize = source.spec.dtype.itemsize
    for part in _in_spans(move, itemsize):
        if _is_direct(part, itemsize):
            yield from ((src * itemsize, part.run * itemsize) for _, src in _by_source(part).runs())
            continue
        axes, outer = _cut(part, itemsize)
        nbytes = _span(axes[outer:]) * itemsize
        for index in itertools.product(*(range(n) for n, _, _ in axes[:outer])):
            yield (part.src + sum(k * s for k, (_, _, s) in zip(index, axes, strict=False))) * itemsize, nbytes


def _in_spans(move: Move, itemsize: int) -> Iterator[Move]:
    """A simplified move, cut where short pieces lie so near each other that `SPAN` bytes with many of them are better read at once."""
    if _is_direct(move, itemsize):
        yield move
        return
    axes, outer = _cut(move, itemsize)
    inner = _span(axes[outer:])
    if not outer or inner * itemsize >= PAGE:
        yield move
        return
    size, _, stride = axes[outer - 1]
    count = 1 + (SPAN // itemsize - inner) // stride
    if count < NEAR:
        yield move
        return
    tile = list(move.sizes)
    tile[move.src_strides.index(stride)] = min(size, count)
    yield from move.tiles(tuple(tile))


def _is_direct(move: Move, itemsize: int) -> bool:
    """Whether the runs of a simplified move are read straight to their place."""
    return move.run == move.numel or move.run * itemsize >= DIRECT


def _by_source(move: Move) -> Move:
    """A simplified move with its runs in the order of the source: one may be received front to back."""
    order = sorted(range(len(move.sizes) - 1), key=lambda k: -move.src_strides[k]) + [*range(len(move.sizes))][-1:]
    return replace(
        move,
        sizes=tuple(move.sizes[k] for k in order),
        dst_strides=tuple(move.dst_strides[k] for k in order),
        src_strides=tuple(move.src_strides[k] for k in order),
    )


def _cut(move: Move, itemsize: int) -> tuple[list[tuple[int, int, int]], int]:
    """The axes of a move by their source strides, the largest first, and how many of them stand outside of the spans that are read."""
    axes = sorted(zip(move.sizes, move.dst_strides, move.src_strides, strict=True), key=lambda axis: -axis[2])
    outer = 0
    while _span(axes[outer:]) * itemsize > max(_numel(axes[outer:]) * itemsize * 5 // 4, SPAN):
        outer += 1
    return axes, outer


def _span(axes: list[tuple[int, int, int]]) -> int:
    return 1 + sum((n - 1) * s for n, _, s in axes)


def _numel(axes: list[tuple[int, int, int]]) -> int:
    return math.prod(n for n, _, _ in axes)


def copy_strided(out: Array, array: Array, axes: list[tuple[int, int, int]], arena: Arena) -> None:
    """``out[index . d] = given[index . s]`` for axes of (size, d, s). Transposing copies go band by band, several times as fast."""
    itemsize = out.itemsize
    sizes = [n for n, _, _ in axes]
    target = np.lib.stride_tricks.as_strided(out, sizes, [d * itemsize for _, d, _ in axes])
    origin = np.lib.stride_tricks.as_strided(array, sizes, [s * itemsize for _, _, s in axes], writeable=False)
    rows = min(range(len(axes)), key=lambda k: axes[k][1], default=0)
    columns = min(range(len(axes)), key=lambda k: axes[k][2], default=0)
    if rows == columns or min(axes[rows][0], axes[columns][0]) < NARROW:
        target[...] = origin
        return
    order = [k for k in range(len(axes)) if k not in (rows, columns)]
    target, origin = (side.transpose(*order, rows, columns) for side in (target, origin))
    height, width = axes[rows][0], axes[columns][0]
    band = max(1, min(width, BAND // (height * itemsize)))
    mark = arena.mark
    packed = arena.take(height * band, itemsize) if height * band * itemsize <= BAND else None
    for index in itertools.product(*(range(axes[k][0]) for k in order)):
        for start in range(0, width, band):
            here: Any = (*index, slice(None), slice(start, start + band))
            if packed is None:
                target[here] = origin[here]
                continue
            shape = origin[here].shape
            piece = packed[: shape[0] * shape[1]].reshape(shape)
            piece[...] = origin[here]
            target[here] = piece
    arena.release(mark)


def read_bytes(source: Source, start: int, view: memoryview, read: Read) -> None:
    """Bytes of a stored tensor from ``start``, over as many of its extents as it takes."""
    for path, offset, nbytes in _split(source.extents, start, len(view)):
        read(path, offset, view[:nbytes])
        view = view[nbytes:]
