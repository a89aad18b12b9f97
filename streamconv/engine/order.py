"""In which order a plan's work is done: by source offset across all output files, so that each source is read once, front to back."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from streamconv.graph.moves import Move, region
from streamconv.memory import BLOCK
from streamconv.planning.plan import Copy, Plan, Segment

COPY_CHUNK = 32 << 20  # bytes of one task of copying: between two looks at the stop flag

Task = tuple[int, Segment, Move | None]
"""File number, segment (of a `Copy`: a chunk of it), and a `Compute`'s tile."""

Position = tuple[int, int]
"""Source file number and byte offset."""


def tasks_in_order(plan: Plan, files: Iterable[int]) -> Iterator[Task]:
    """All tasks of these files in the order of their source positions; segments are expanded only when reached."""
    segments: list[tuple[Position, int, int]] = []
    for number in files:
        segments += [(_start(segment), number, k) for k, segment in enumerate(plan.files[number].segments)]
    segments.sort(reverse=True)
    active: list[tuple[Position, int, int, Task, Iterator[tuple[Position, Task]]]] = []
    while segments or active:
        while segments and (not active or segments[-1][0] <= active[0][0]):
            _, number, k = segments.pop()
            tasks = _expand(number, plan.files[number].segments[k])
            if (first := next(tasks, None)) is not None:
                heapq.heappush(active, (first[0], number, k, first[1], tasks))
        if not active:
            continue
        _, number, k, task, tasks = heapq.heappop(active)
        yield task
        if (following := next(tasks, None)) is not None:
            heapq.heappush(active, (following[0], number, k, following[1], tasks))


def _start(segment: Segment) -> Position:
    if isinstance(segment, Copy):
        return segment.source, segment.offset
    return segment.source, segment.offset + segment.move.src * segment.itemsize


def _expand(number: int, segment: Segment) -> Iterator[tuple[Position, Task]]:
    """The tasks of a segment with the source positions they begin at, ascending."""
    if isinstance(segment, Copy):
        edge = segment.dst % BLOCK % COPY_CHUNK  # all but the first begin at a block of the target
        for at in range(-edge, segment.nbytes, COPY_CHUNK):
            start, stop = max(0, at), min(at + COPY_CHUNK, segment.nbytes)
            chunk = Copy(segment.source, segment.offset + start, segment.dst + start, stop - start)
            yield (segment.source, chunk.offset), (number, chunk, None)
    else:
        for tile in segment.move.tiles(segment.tile):
            yield (segment.source, segment.offset + tile.src * segment.itemsize), (number, segment, tile)


def place_of(plan: Plan, task: Task) -> int:
    """Where in its file a task begins to write, in bytes: no other task of the file begins there."""
    _, segment, tile = task
    if isinstance(segment, Copy):
        return segment.dst
    assert tile is not None
    return segment.dst + tile.dst * plan.nodes[segment.node].spec.dtype.itemsize


def tile_pieces(tile: Move, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(offset in the packed tile, offset in the tensor, length), in bytes, of each contiguous piece of a tile's destination."""
    packed = region(tile)
    pieces = Move(tile.sizes, tile.dst, tile.dst_strides, 0, packed.dst_strides).simplify()
    length = pieces.run * itemsize
    for dst, src in pieces.runs():
        yield src * itemsize, dst * itemsize, length
