"""Whether pieces that are written fill a range of bytes, each byte once.

A piece is a `Box`: runs of bytes at regular distances. Nothing is expanded: what a layout weaves into each other repeats from block to
block, and each kind of block is looked at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import attrgetter

Axes = tuple[tuple[int, int], ...]
MOST_CUTS = 1 << 20  # pieces into which one weave is cut; no layout's come near


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """``run`` bytes from ``start`` on, again for each index of the ``axes``: (how many, distance in bytes), the largest distance first.

    A distance is at least what lies within it, so that no byte is in a box twice.
    """

    start: int
    run: int
    axes: Axes = ()

    @property
    def stop(self) -> int:
        """One past its last byte."""
        return self.start + self.run + sum((count - 1) * stride for count, stride in self.axes)

    def at(self, start: int, axes: Axes | None = None) -> Box:
        """The same runs from ``start`` on, with other axes if they are given."""
        present = self.axes if axes is None else axes
        return Box(start, self.run, tuple((count, stride) for count, stride in present if count > 1))


class Fault(Exception):
    """Bytes from ``at`` on are in no piece, or in more than one (``again``)."""

    def __init__(self, at: int, *, again: bool) -> None:
        self.at, self.again = at, again
        super().__init__(f"byte {at} is written {'more than once' if again else 'by nothing'}")


def make_box(start: int, itemsize: int, sizes: Sequence[int], strides: Sequence[int]) -> Box:
    """The bytes of items at ``start + index . strides`` for each index of ``sizes``; strides in items, the start in bytes.

    Raises:
        Fault: some bytes are in it twice.
    """
    form = _form(itemsize, tuple(sizes), tuple(strides))
    if form is None:
        raise Fault(start, again=True)
    return Box(start, *form)


@lru_cache(maxsize=1024)
def _form(itemsize: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, Axes] | None:
    """The run and the axes of `make_box`, wherever it starts; None: some bytes are in it twice."""
    run, outer = itemsize, list[tuple[int, int]]()
    span = itemsize
    for stride, count in sorted(zip(strides, sizes, strict=True)):
        distance = stride * itemsize
        if count == 1:
            continue
        if distance < span:
            return None
        if distance == run and not outer:
            run *= count
        else:
            outer.append((count, distance))
        span += (count - 1) * distance
    return run, tuple(reversed(outer))


def check_ranges(ranges: Iterable[tuple[int, int]], stop: int) -> None:
    """Raises Fault unless these (start, stop) fill all bytes below ``stop`` once each."""
    at = 0
    for start, end in sorted(ranges):
        if start != at:
            raise Fault(min(start, at), again=start < at)
        at = end
    if at != stop:
        raise Fault(min(at, stop), again=at > stop)


def check_boxes(boxes: Iterable[Box], stop: int) -> None:
    """Raises Fault unless these fill all bytes below ``stop`` once each."""
    at, by_start, first = 0, sorted(boxes, key=attrgetter("start")), 0
    proven: set[tuple[Box, ...]] = set()  # what lies between each other, from 0 on: that of one expert is that of the next
    while first < len(by_start):
        if by_start[first].start != at:
            raise Fault(at, again=False)
        last, reach = first + 1, by_start[first].stop
        while last < len(by_start) and by_start[last].start < reach:
            reach = max(reach, by_start[last].stop)
            last += 1
        if last - first > 1 or by_start[first].axes:
            woven = tuple([Box(box.start - at, box.run, box.axes) for box in by_start[first:last]])
            if woven not in proven:
                _check_woven(woven, at, reach)
                proven.add(woven)
        at, first = reach, last
    if at != stop:
        raise Fault(min(at, stop), again=at > stop)


def _check_woven(boxes: Sequence[Box], start: int, stop: int) -> None:
    """`check_boxes` of pieces that lie between each other, by blocks as long as the largest distance in them; they count from ``start``."""
    size = max((box.axes[0][1] for box in boxes if box.axes), default=0)
    if not size:
        raise Fault(start + boxes[1].start, again=True)
    rows = list(chain.from_iterable(_rows(box.at(box.start), size) for box in boxes))
    opening = sorted(rows, key=lambda row: row[0], reverse=True)
    closing = sorted(rows, key=lambda row: row[1], reverse=True)
    whole, rest = divmod(stop - start, size)
    edges = sorted({row[0] for row in rows} | {row[1] for row in rows} | {0, whole})
    inside: Counter[Box] = Counter()
    kinds: set[tuple[int, tuple[Box, ...]]] = set()
    for edge in edges:
        while opening and opening[-1][0] == edge:
            inside[opening.pop()[2]] += 1
        while closing and closing[-1][1] == edge:
            inside[closing.pop()[2]] -= 1
        inside = +inside if len(inside) > 64 else inside
        length = size if edge < whole else rest
        if edge > whole or not length:
            continue
        pieces = tuple(sorted(inside.elements()))
        if (length, pieces) not in kinds:
            kinds.add((length, pieces))
            try:
                check_boxes(pieces, length)
            except Fault as fault:
                raise Fault(start + edge * size + fault.at, again=fault.again) from None


def _rows(box: Box, size: int) -> Iterator[tuple[int, int, Box]]:
    """A box cut by blocks of ``size`` bytes: the blocks, from one to before another, that each hold this of it."""
    waiting, cuts = [box], 0
    while waiting:
        box, cuts = waiting.pop(), cuts + 1
        if cuts > MOST_CUTS:
            raise Fault(box.start, again=True)
        block, inside = divmod(box.start, size)
        box = box.at(inside)
        count, stride = box.axes[0] if box.axes else (1, 0)
        if stride == size:
            below, above = _split(box.at(inside, box.axes[1:]), size)
            yield from ((block, block + count, piece) for piece in below)
            yield from ((block + 1, block + 1 + count, piece.at(piece.start - size)) for piece in above)
        elif box.stop <= size:
            yield block, block + 1, box
        elif not box.axes and not inside:
            blocks = box.run // size
            yield block, block + blocks, Box(0, size)
            if box.run % size:
                yield block + blocks, block + blocks + 1, Box(0, box.run % size)
        elif each := _count_inside(box, size):
            blocks, rest = divmod(count, each)
            yield block, block + blocks, box.at(inside, ((each, stride), *box.axes[1:]))
            if rest:
                waiting.append(box.at((block + blocks) * size + inside, ((rest, stride), *box.axes[1:])))
        else:
            below, above = _split(box, size)
            yield from ((block, block + 1, piece) for piece in below)
            waiting.extend(piece.at(piece.start + block * size) for piece in above)


def _count_inside(box: Box, size: int) -> int:
    """How many indices of the first axis fill a block, if each block then holds the same of the box; else 0."""
    if not box.axes or size % box.axes[0][1]:
        return 0
    (count, stride), *inner = box.axes
    each = size // stride
    fits = box.at(box.start, ((each, stride), *inner)).stop <= size
    return each if count > each and fits else 0


def _split(box: Box, at: int) -> tuple[list[Box], list[Box]]:
    """What of a box lies below ``at``, and what does not."""
    if box.stop <= at:
        return [box], []
    if box.start >= at:
        return [], [box]
    if not box.axes:
        return [Box(box.start, at - box.start)], [Box(at, box.stop - at)]
    (count, stride), inner = box.axes[0], box.axes[1:]
    one = box.at(box.start, inner)
    whole = max(0, (at - one.stop) // stride + 1)
    below = [box.at(box.start, ((whole, stride), *inner))] if whole else []
    start = box.start + whole * stride
    if start >= at:
        return below, [box.at(start, ((count - whole, stride), *inner))]
    left, right = _split(box.at(start, inner), at)
    rest = count - whole - 1
    return below + left, right + ([box.at(start + stride, ((rest, stride), *inner))] if rest else [])
