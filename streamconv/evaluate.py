"""Evaluation of a region of a node into memory, within a fixed arena; one implementation for tiles of any shape.

``arena_bytes`` is the other half of ``evaluate``: the most that it takes. Memory is bounded by construction, not by estimate.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.graph import AnyNode, Node, Source
from streamconv.runs import Move, identity

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

COMPARE = 1 << 20  # bytes of each side that are compared at a time
Read = Callable[[str, int, memoryview], None]
"""Fills a buffer from a byte offset of a file."""

ALIGN = 64  # bytes
SPAN = 64 << 10  # bytes: scattered items are picked from a span of at least this, read at once
DIRECT = 16 << 10  # bytes: runs of at least this are read straight to their place
BLOCK = 64  # elements: a transposing copy goes block by block, so that both sides stay in the cache


class Arena:
    """A worker's buffers: one block of anonymous memory, given out from the front and taken back in reverse."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, 1))
        self._array = np.frombuffer(self._memory, dtype=np.uint8)
        self._used = 0

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


def arena_bytes(node: AnyNode, tile: int) -> int:
    """Bytes of arena that evaluating ``tile`` bytes of ``node`` takes at most, the tile's own included."""
    numel = max(1, tile // node.spec.dtype.itemsize)
    return round_up(numel * node.spec.dtype.itemsize) + _below(node, numel)


def _below(node: AnyNode, numel: int, *, scattered: bool = False) -> int:
    """What evaluating ``numel`` elements takes beside their own buffer; scattered ones are picked from spans."""
    if not isinstance(node, Node):
        return round_up(max(numel * node.spec.dtype.itemsize * 5 // 4, SPAN)) if scattered else 0
    below = max((_below(child, numel, scattered=scattered or node.op.layout_only) for child in node.inputs), default=0)
    if node.op.layout_only:
        return below
    return below + sum(round_up(numel * child.spec.dtype.itemsize) for child in node.inputs)


def evaluate(node: AnyNode, move: Move, out: Array, arena: Arena, read: Read) -> None:
    """Writes the region ``move`` of ``node`` into the flat array ``out``."""
    if not isinstance(node, Node):
        _gather(node, move.simplify(), out, arena, read)
    elif node.op.layout_only:
        pieces = node.op.pull(move)
        assert pieces is not None
        for number, piece in pieces:
            evaluate(node.inputs[number], piece, out, arena, read)
    else:
        mark = arena.mark
        parts, specs = [], []
        for number, wanted in node.op.demand(move):
            part = arena.take(wanted.numel, node.inputs[number].spec.dtype.itemsize)
            evaluate(node.inputs[number], wanted, part, arena, read)
            parts.append(part)
            specs.append(node.inputs[number].spec)
        node.op.compute(parts, specs, move, out, node.spec)
        arena.release(mark)


def prepare(nodes: Iterable[AnyNode]) -> None:
    """Loads what evaluating these nodes needs, so that measuring the process afterwards counts it."""
    stack, seen = list(nodes), set()
    while stack:
        node = stack.pop()
        if isinstance(node, Node):
            stack.extend(node.inputs)
            if (key := (node.op.kind, node.spec.dtype, *(child.spec.dtype for child in node.inputs))) not in seen:
                seen.add(key)
                node.op.prepare([child.spec for child in node.inputs])


def same_bytes(left: AnyNode, right: AnyNode, arena: Arena, read: Read) -> bool:
    """Whether two nodes hold the same bytes. The arena has room for evaluating them and for `COMPARE` bytes of each."""
    if left.spec != right.spec:
        return False
    itemsize, mark = left.spec.dtype.itemsize, arena.mark
    step = COMPARE // itemsize
    for start in range(0, left.spec.numel, step):
        count = min(step, left.spec.numel - start)
        parts = []
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
    itemsize = source.spec.dtype.itemsize
    run = move.run
    if run == move.numel or run * itemsize >= DIRECT:
        for dst, src in move.runs():
            read_bytes(source, src * itemsize, out[dst : dst + run].data.cast("B"), read)
        return
    axes = sorted(zip(move.sizes, move.dst_strides, move.src_strides, strict=True), key=lambda axis: -axis[2])
    outer = 0
    while _span(axes[outer:]) * itemsize > max(_numel(axes[outer:]) * itemsize * 5 // 4, SPAN):
        outer += 1
    inner = axes[outer:]
    span, mark = _span(inner), arena.mark
    scratch = arena.take(span, itemsize)
    for index in itertools.product(*(range(n) for n, _, _ in axes[:outer])):
        dst = move.dst + sum(k * d for k, (_, d, _) in zip(index, axes, strict=False))
        src = move.src + sum(k * s for k, (_, _, s) in zip(index, axes, strict=False))
        read_bytes(source, src * itemsize, scratch.data.cast("B"), read)
        copy_strided(out[dst:], scratch, inner, itemsize)
    arena.release(mark)


def _span(axes: list[tuple[int, int, int]]) -> int:
    return 1 + sum((n - 1) * s for n, _, s in axes)


def _numel(axes: list[tuple[int, int, int]]) -> int:
    total = 1
    for n, _, _ in axes:
        total *= n
    return total


def copy_strided(out: Array, given: Array, axes: list[tuple[int, int, int]], itemsize: int) -> None:
    """``out[index . d] = given[index . s]`` for axes of (size, d, s); transposing copies go in blocks."""
    sizes = [n for n, _, _ in axes]
    target = np.lib.stride_tricks.as_strided(out, sizes, [d * itemsize for _, d, _ in axes])
    origin = np.lib.stride_tricks.as_strided(given, sizes, [s * itemsize for _, _, s in axes], writeable=False)
    for block in _blocks(axes):
        target[block] = origin[block]


def _blocks(axes: list[tuple[int, int, int]]) -> Iterator[tuple[slice, ...]]:
    """Index ranges for `copy_strided`: all at once where both sides are contiguous along the same axis, else blocks of the two."""
    inner_dst = min(range(len(axes)), key=lambda k: axes[k][1]) if axes else 0
    inner_src = min(range(len(axes)), key=lambda k: axes[k][2]) if axes else 0
    if inner_dst == inner_src or min(axes[inner_dst][0], axes[inner_src][0]) < BLOCK:
        yield ()
        return
    cuts = [[slice(None)]] * len(axes)
    for k in (inner_dst, inner_src):
        cuts[k] = [slice(start, start + BLOCK) for start in range(0, axes[k][0], BLOCK)]
    yield from itertools.product(*cuts)


def read_bytes(source: Source, start: int, view: memoryview, read: Read) -> None:
    """Bytes of a stored tensor from ``start``, over as many of its extents as it takes."""
    for extent in source.extents:
        if start < extent.nbytes:
            take = min(len(view), extent.nbytes - start)
            read(extent.path, extent.offset + start, view[:take])
            view, start = view[take:], start + take
            if not view:
                return
        start -= extent.nbytes
