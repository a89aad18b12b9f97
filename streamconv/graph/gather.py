"""Regions of stored tensors, read into memory: long runs straight to their place, other items picked from spans that are read at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from streamconv.graph.arena import do_nothing, do_now, place, round_up, round_up_placed
from streamconv.graph.copying import block_bytes, copy_strided
from streamconv.graph.moves import Move, packed_strides

if TYPE_CHECKING:
    from streamconv.graph.arena import Arena, Array
    from streamconv.graph.node import Extent, Source

Axis = tuple[int, int, int]
Read = Callable[[str, int, memoryview], None]
"""Fills a buffer from a byte offset of a file."""

SCRATCH = 1 << 20  # bytes: larger regions are gathered by parts of at most this, the next one read while the last one is picked from
SPAN = 64 << 10  # bytes: scattered items are picked from a span of at least this, read at once
DIRECT = 16 << 10  # bytes: runs of at least this are read straight to their place
PAGE = 4 << 10  # bytes: pieces shorter than this are read with what is between them ...
NEAR = 8  # ... where a span has as many of them
LONG = 256 << 10  # bytes: what takes less time to read than this is not worth another thread


@dataclass(frozen=True)
class _Piece:
    """A part of a region that is read at once: runs that go to their place, or spans of the source from which its items are picked.

    Attributes:
        move: of the items.
        axes: their (size, stride in the region, stride in the source), by the last in descending order.
        outer: how many of these axes stand outside of a span.
        is_direct: it is simplified, and its runs go to their place.
    """

    move: Move
    axes: tuple[Axis, ...]
    outer: int = 0
    is_direct: bool = False

    @property
    def span(self) -> int:
        """Elements of a span."""
        return _span(self.axes[self.outer :])

    @property
    def numel(self) -> int:
        """Elements of all spans."""
        return _numel(self.axes[: self.outer]) * self.span

    def starts(self) -> Iterator[tuple[int, int]]:
        """Where spans begin, in elements: in the region, in the source."""
        outer = self.axes[: self.outer]
        for index in itertools.product(*(range(n) for n, _, _ in outer)):
            dst = sum(k * d for k, (_, d, _) in zip(index, outer, strict=True))
            src = sum(k * s for k, (_, _, s) in zip(index, outer, strict=True))
            yield self.move.dst + dst, self.move.src + src

    def reads(self) -> Iterator[tuple[int, int]]:
        """What is read of the source, in elements: first and number, in order."""
        if self.is_direct:
            return ((src, self.move.run) for _, src in _by_source(self.move).runs())
        return ((src, self.span) for _, src in self.starts())

    def read(self, source: Source, buffer: Array, read: Read) -> None:
        """Fills ``buffer``: of runs that go to their place the region itself, else the spans, one after the other."""
        itemsize = source.spec.dtype.itemsize
        if self.is_direct:
            for dst, src in _by_source(self.move).runs():
                read_bytes(source, src * itemsize, buffer[dst : dst + self.move.run].data.cast("B"), read)
            return
        view, nbytes = buffer.data.cast("B"), self.span * itemsize
        for number, (src, _) in enumerate(self.reads()):
            read_bytes(source, src * itemsize, view[number * nbytes : (number + 1) * nbytes], read)

    def pick(self, spans: Array, out: Array, arena: Arena) -> None:
        """Has the items brought from the spans to the region ``out``."""
        pitches = [self.span * stride for stride in packed_strides(tuple(n for n, _, _ in self.axes[: self.outer]))]
        outer = [(n, d, pitch) for (n, d, _), pitch in zip(self.axes, pitches, strict=False)]
        copy_strided(out[self.move.dst :], spans, outer + list(self.axes[self.outer :]), arena)


def gather(source: Source, move: Move, out: Array, arena: Arena, read: Read) -> None:
    """Reads the region ``move`` of a stored tensor into the flat array ``out``."""
    move, itemsize, mark = move.simplify(), source.spec.dtype.itemsize, arena.mark
    is_long = move.numel * itemsize > SCRATCH
    nbytes = _scratch_bytes(move.numel * itemsize)
    scratches: Iterator[Array] | None = None
    wait, pick = do_nothing, do_nothing
    for piece in _pieces(move, itemsize):
        wait()
        if piece.is_direct:
            pick()
            piece.read(source, out, read)
            wait, pick = do_nothing, do_nothing
            continue
        if scratches is None:
            scratches = itertools.cycle([arena.take(round_up_placed(nbytes), 1) for _ in range(1 + is_long)])
        if not is_long:
            pick()
        first = next(_split(source.extents, piece.move.src * itemsize, 1))
        scratch = place(next(scratches), piece.numel * itemsize, itemsize, first[1]).view(f"u{itemsize}")
        begin = arena.begin if is_long and piece.numel * itemsize >= LONG else do_now
        wait = begin(partial(piece.read, source, scratch, read))
        if is_long:
            pick()
        pick = partial(piece.pick, scratch, out, arena)
    wait()
    pick()
    arena.release(mark)


def scratch_of(nbytes: int) -> int:
    """Bytes of arena that gathering a region of ``nbytes`` takes at most."""
    return (1 + (nbytes > SCRATCH)) * round_up(round_up_placed(_scratch_bytes(nbytes))) + block_bytes()


def reads_of(source: Source, move: Move) -> Iterator[tuple[str, int, int]]:
    """What `gather` reads for a region, in that order: path, offset and bytes."""
    itemsize = source.spec.dtype.itemsize
    for piece in _pieces(move.simplify(), itemsize):
        for start, count in piece.reads():
            yield from _split(source.extents, start * itemsize, count * itemsize)


def read_bytes(source: Source, start: int, view: memoryview, read: Read) -> None:
    """Bytes of a stored tensor from ``start``, over as many of its extents as it takes."""
    for path, offset, nbytes in _split(source.extents, start, len(view)):
        read(path, offset, view[:nbytes])
        view = view[nbytes:]


def _split(extents: Iterable[Extent], start: int, count: int) -> Iterator[tuple[str, int, int]]:
    """Where in which files ``count`` bytes of a stored tensor from ``start`` lie."""
    at = 0
    for extent in extents:
        first, stop = max(start, at), min(start + count, at + extent.nbytes)
        if first < stop:
            yield extent.path, extent.offset + first - at, stop - first
        at += extent.nbytes


def _scratch_bytes(nbytes: int) -> int:
    """Bytes of the spans of a piece of such a region, at most."""
    return max(min(nbytes, SCRATCH) * 5 // 4, SPAN)


def _pieces(move: Move, itemsize: int) -> Iterator[_Piece]:
    """A simplified move in pieces that take no more than `_scratch_bytes` each, in the order of their source as far as that goes."""
    axes = _axes_of(move)
    if _is_direct(move, itemsize):
        yield _Piece(move, axes, is_direct=True)
        return
    if move.numel * itemsize > SCRATCH:
        for part in _cut(move, axes[0], max(1, SCRATCH * axes[0][0] // (move.numel * itemsize))):
            yield from _pieces(part.simplify(), itemsize)
        return
    outer = _count_outer(axes, itemsize)
    steps = _steps_of_span(axes, outer, itemsize)
    for part in _cut(move, axes[outer - 1], steps) if steps else [move]:
        yield from _by_spans(part, itemsize)


def _count_outer(axes: Sequence[Axis], itemsize: int) -> int:
    """How many axes stand outside of a span: those across which most of what lies between items is not wanted."""
    outer = 0
    while _span(axes[outer:]) * itemsize > max(_numel(axes[outer:]) * itemsize * 5 // 4, SPAN):
        outer += 1
    return outer


def _steps_of_span(axes: Sequence[Axis], outer: int, itemsize: int) -> int:
    """How many steps of the last outer axis are better read at once, since what is short lies near the next; 0 if none are."""
    inner = _span(axes[outer:])
    if not outer or inner * itemsize >= PAGE:
        return 0
    steps = 1 + (SPAN // itemsize - inner) // axes[outer - 1][2]
    return steps if steps >= NEAR else 0


def _by_spans(move: Move, itemsize: int) -> Iterator[_Piece]:
    """A move with all of its spans at once, or each alone where they are too long together."""
    axes = _axes_of(move)
    outer = _count_outer(axes, itemsize)
    piece = _Piece(move, axes, outer)
    if piece.numel * itemsize <= max(move.numel * itemsize * 5 // 4, SPAN):
        yield piece
        return
    inner = piece.axes[outer:]
    sizes, dst_strides, src_strides = (tuple(axis[k] for axis in inner) for k in range(3))
    for dst, src in piece.starts():
        yield _Piece(Move(sizes, dst, dst_strides, src, src_strides), inner)


def _axes_of(move: Move) -> tuple[Axis, ...]:
    return tuple(sorted(zip(move.sizes, move.dst_strides, move.src_strides, strict=True), key=lambda axis: -axis[2]))


def _cut(move: Move, axis: Axis, steps: int) -> Iterator[Move]:
    """A move cut along one of its axes into parts of so many steps, in the order of its source."""
    at = list(zip(move.sizes, move.dst_strides, move.src_strides, strict=True)).index(axis)
    return move.tiles(tuple(min(n, steps) if k == at else n for k, n in enumerate(move.sizes)))


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


def _span(axes: Sequence[Axis]) -> int:
    return 1 + sum((n - 1) * s for n, _, s in axes)


def _numel(axes: Sequence[Axis]) -> int:
    return math.prod(n for n, _, _ in axes)
