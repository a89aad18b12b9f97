"""Files front to back, as a stream takes them, and cut into stretches that several threads make and send at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from streamconv.engine.order import place_of
from streamconv.engine.worker import Worker
from streamconv.engine.writers import Stream
from streamconv.graph.moves import Move
from streamconv.planning.plan import Compute, Copy, FilePlan, Plan, Segment


class Piece(NamedTuple):
    """Bytes [start, stop) of a file, and what makes them: literal bytes, a copy, or a tile of a segment."""

    start: int
    stop: int
    content: bytes | Copy | tuple[Compute, Move]


@dataclass(frozen=True)
class Stretch:
    """Bytes [start, stop) of a file, by number; they are sent as parts of at most ``part`` bytes, the first of which has this number."""

    file: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    first: int
    part: int


def place_of_segment(plan: Plan, segment: Segment) -> int:
    """Where in its file a segment begins, in bytes."""
    return place_of(plan, (0, segment, segment.move if isinstance(segment, Compute) else None))


def pieces_in_order(plan: Plan, file: FilePlan) -> Iterator[Piece]:
    """What a file is made of, from its first byte to its last; what is between two pieces is zeros."""
    parts: list[tuple[int, bytes | Segment]] = [
        *file.literals,
        *((place_of_segment(plan, segment), segment) for segment in file.segments),
    ]
    for start, part in sorted(parts, key=lambda item: item[0]):
        if isinstance(part, bytes):
            yield Piece(start, start + len(part), part)
        elif isinstance(part, Copy):
            yield Piece(start, start + part.nbytes, part)
        else:
            itemsize = plan.nodes[part.node].spec.dtype.itemsize
            for tile in part.move.tiles(part.tile):
                place = place_of(plan, (0, part, tile))
                yield Piece(place, place + tile.numel * itemsize, (part, tile))


def cut(plan: Plan, number: int, part: int) -> Iterator[Stretch]:
    """The stretches of a file, for parts of at most ``part`` bytes, of which all but the file's last have at least half as many.

    Copies are cut anywhere. A tile is made by one thread, so that what it takes is read once, and is sent as several parts if it is large.
    """
    file, first = plan.files[number], 1
    for start, stop, pieces in _cut(pieces_in_order(plan, file), file.size, part):
        count = max(1, -(-(stop - start) // part))
        stretch = Stretch(number, start, stop, pieces, first, -(-(stop - start) // count))
        first += count
        yield stretch


def _cut(pieces: Iterable[Piece], size: int, part: int) -> Iterator[tuple[int, int, tuple[Piece, ...]]]:
    begin, inside, most = 0, list[Piece](), part - part // 5  # of copies: they take a buffer beside the part, tiles do not
    for piece in pieces:
        rest = piece
        while True:
            content = rest.content
            if isinstance(content, Copy) and rest.start - begin < most < rest.stop - begin:
                stop = begin + most
                done = stop - rest.start
                inside.append(Piece(rest.start, stop, content._replace(nbytes=done)))
                content = Copy(content.source, content.offset + done, content.dst + done, content.nbytes - done)
                rest = Piece(stop, rest.stop, content)
            elif rest.stop - begin > part and rest.start - begin >= part // 2:
                stop = rest.start
            else:
                break
            yield begin, stop, tuple(inside)
            begin, inside = stop, []
        inside.append(rest)
    yield begin, size, tuple(inside)


def send(pieces: Iterable[Piece], worker: Worker, stream: Stream) -> None:
    """Has a worker send pieces one after the other."""
    for piece in pieces:
        if isinstance(piece.content, bytes):
            stream.write(memoryview(piece.content), piece.start)
        elif isinstance(piece.content, Copy):
            worker.copy(piece.content, stream)
        else:
            worker.compute(*piece.content, stream)
