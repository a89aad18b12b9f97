"""Repeated names as one: ``layers.0.norm`` to ``layers.31.norm`` are ``layers.[0-31].norm``."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator
from itertools import chain, product, repeat
from typing import NamedTuple

_NUMBER = re.compile("([0-9]+)")
_PLACE = re.compile(r"(?<=\.)[0-9]+(?=\.)")  # a number that a layer or an expert has
_Point = tuple[int, ...]


class Fold(NamedTuple):
    """Rows that differ in numbers only: their texts, with ranges for the numbers that vary, and their positions."""

    texts: tuple[str, ...]
    members: list[int]


def kind_of(name: str) -> tuple[str, int]:
    """The kind of layer that a tensor is of, and the first number of its layer in its name, or 0.

    >>> kind_of("layers.3.mlp.w2.weight")
    ('layers.*.mlp.w2.weight', 3)
    """
    number = _PLACE.search(name)
    return _PLACE.sub("*", name), int(number[0]) if number else 0


def fold(rows: Iterable[tuple[Hashable, tuple[str, ...]]]) -> Iterator[Fold]:
    """Folds rows of texts that have the same key and differ in numbers only, in the order in which they come first.

    The ranges of a fold are exact, all of its numbers with all others. A number that follows another one within its row, by a constant
    difference, is a range of its own: ``("layers.0", "blocks.1")``, ``("layers.1", "blocks.2")`` are ``("layers.[0-1]", "blocks.[1-2]")``.
    """
    groups: dict[tuple[Hashable, tuple[str, ...]], list[tuple[int, list[str]]]] = {}
    for position, (key, texts) in enumerate(rows):
        parts = _NUMBER.split("\0".join(texts))
        groups.setdefault((key, tuple(parts[::2])), []).append((position, parts[1::2]))
    for (_, literals), members in groups.items():
        yield from _fold(literals, members)


def _fold(literals: tuple[str, ...], members: list[tuple[int, list[str]]]) -> Iterator[Fold]:
    columns = list(zip(*(numbers for _, numbers in members), strict=True))
    values = [tuple(map(int, column)) for column in columns]
    widths = [len(column[0]) if len({*map(len, column)}) == 1 else 1 for column in columns]
    free: list[int] = []
    follows: list[tuple[int, int]] = []  # for each column the number, among those that are free, of the one it follows, and its difference
    for number, column in enumerate(values):
        base = _find_base(column, [values[at] for at in free])
        follows.append(base or (len(free), 0))
        if base is None:
            free.append(number)
    points: dict[_Point, list[int]] = {}
    every = zip(*(values[at] for at in free), strict=True) if free else repeat(())
    for (position, _), point in zip(members, every, strict=False):
        points.setdefault(point, []).append(position)
    for box in _boxes(frozenset(points)):
        numbers = []
        for (k, difference), width in zip(follows, widths, strict=True):
            numbers.append(_show([value + difference for value in box[k]], width))
        text = literals[0] + "".join(number + literal for number, literal in zip(numbers, literals[1:], strict=True))
        positions = chain.from_iterable(points[point] for point in product(*box))
        yield Fold(tuple(text.split("\0")), sorted(positions))


def _find_base(column: _Point, bases: list[_Point]) -> tuple[int, int] | None:
    """Which of the bases a column of numbers follows by a constant difference, and this difference."""
    for k, base in enumerate(bases):
        difference = column[0] - base[0]
        if all(number - other == difference for number, other in zip(column, base, strict=True)):
            return k, difference
    return None


def _boxes(points: frozenset[_Point]) -> Iterator[tuple[list[int], ...]]:
    """Products of numbers that are these points together."""
    if points == {()}:
        yield ()
        return
    if len(next(iter(points))) == 1:  # as of the experts of a layer
        yield (sorted(number for (number,) in points),)
        return
    rests: dict[int, set[_Point]] = {}
    for first, *rest in points:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[_Point], list[int]] = {}
    for first in sorted(rests):
        firsts.setdefault(frozenset(rests[first]), []).append(first)
    for rest_points, numbers in firsts.items():
        for box in _boxes(rest_points):
            yield (numbers, *box)


def _show(numbers: list[int], width: int) -> str:
    """``7``, or ``[0-3,7]``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    text = ",".join(_show_range(ends, width) for ends in ranges)
    return text if len(numbers) == 1 else f"[{text}]"


def _show_range(ends: list[int], width: int) -> str:
    """``7``, or ``0-3``: one number, or the first and the last."""
    return "-".join(f"{end:0{width}d}" for end in ends)


def fold_names(names: Collection[str]) -> list[str]:
    """Names alone, folded: ``["experts.[0-7].w1"]``."""
    kinds: set[str] = set()
    for name in names:
        kind = _NUMBER.sub("0", name)
        if kind in kinds:
            return [folded.texts[0] for folded in fold((None, (name,)) for name in names)]
        kinds.add(kind)
    return list(names)  # nothing to fold, as a rule
