"""Exact covers: random ones are recognized, and so is every one that is spoilt, as counting byte by byte would."""

from __future__ import annotations

import random

import pytest

from streamconv.planning.cover import Box, Fault, check_boxes, check_ranges, make_box


def expand(box: Box) -> list[int]:
    """Every byte of a box, as often as it is in it."""
    starts = [box.start]
    for count, stride in box.axes:
        starts = [start + k * stride for start in starts for k in range(count)]
    return [start + k for start in starts for k in range(box.run)]


def is_cover(boxes: list[Box], stop: int) -> bool:
    return sorted(place for box in boxes for place in expand(box)) == list(range(stop))


def merged(box: Box) -> Box:
    while box.axes and box.axes[-1][1] == box.run:
        box = Box(box.start, box.run * box.axes[-1][0], box.axes[:-1])
    return box


def make_cover(draw: random.Random, length: int, start: int = 0, depth: int = 0) -> list[Box]:
    """Boxes that fill ``length`` bytes from ``start`` on: split in two, or woven from what fills one block of several."""
    counts = [count for count in range(2, length) if not length % count]
    if depth > 3 or length < 2 or draw.random() < 0.25:
        return [Box(start, length)]
    if not counts or draw.random() < 0.5:
        first = draw.randrange(1, length)
        return make_cover(draw, first, start, depth + 1) + make_cover(draw, length - first, start + first, depth + 1)
    count = draw.choice(counts)
    stride, boxes = length // count, list[Box]()
    for box in make_cover(draw, length // count, 0, depth + 1):
        cut = draw.choice([0, draw.randrange(count), *range(count)] if draw.random() < 0.3 else [0])
        for first, last in ((0, cut), (cut, count)):
            if last > first:
                boxes.append(merged(box.at(start + box.start + first * stride, ((last - first, stride), *box.axes))))
    return boxes


def spoil(draw: random.Random, boxes: list[Box]) -> None:
    k = draw.randrange(len(boxes))
    box = boxes[k]
    change = draw.randrange(4)
    if change == 0:
        boxes[k] = box.at(max(0, box.start + draw.choice([-1, 1, 2])))
    elif change == 1:
        del boxes[k]
    elif change == 2:
        boxes.append(box)
    elif box.axes:
        axes, j = list(box.axes), draw.randrange(len(box.axes))
        axes[j] = (max(1, axes[j][0] + draw.choice([-1, 1])), axes[j][1])
        boxes[k] = box.at(box.start, tuple(axes))


def test_covers_are_told_from_what_is_none():
    draw = random.Random(5)
    found = {True: 0, False: 0}
    for _ in range(6000):
        length = draw.choice([6, 12, 24, 30, 36, 48, 60, 64, 96])
        boxes = make_cover(draw, length)
        if draw.random() < 0.6:
            spoil(draw, boxes)
        draw.shuffle(boxes)
        try:
            check_boxes(boxes, length)
            exact = True
        except Fault:
            exact = False
        assert exact == is_cover(boxes, length), boxes
        found[exact] += 1
    assert min(found.values()) > 1000


def test_a_fault_says_where_it_is():
    with pytest.raises(Fault, match="byte 4 is written by nothing"):
        check_ranges([(0, 4), (5, 9)], 9)
    with pytest.raises(Fault, match="byte 3 is written more than once"):
        check_ranges([(0, 4), (3, 9)], 9)
    with pytest.raises(Fault, match="byte 9 is written by nothing"):
        check_ranges([(0, 9)], 10)
    with pytest.raises(Fault, match="byte 14 is written by nothing"):
        check_boxes([make_box(0, 2, (3,), (3,)), Box(2, 4), Box(8, 4)], 18)
    assert make_box(8, 4, (2, 1, 3), (3, 7, 1)) == Box(8, 24)
    with pytest.raises(Fault, match="more than once"):
        make_box(0, 4, (3, 3), (2, 1))


def test_terabytes_take_no_longer():
    """Two interleaved halves of 16 TB, one of them in copies of long runs."""
    rows, half = 1 << 12, 1 << 31
    boxes = [Box(0, half, ((rows, 2 * half),)), *(Box((2 * k + 1) * half, half) for k in range(rows))]
    check_boxes(boxes, 2 * half * rows)
    with pytest.raises(Fault):
        check_boxes(boxes[:-1], 2 * half * rows)
