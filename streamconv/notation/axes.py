"""The layout notation: a rearrangement of axes as one string that flips by swapping its sides.

It is einops' notation with one addition, ``+`` for concatenation::

    h c, h c, h c -> (h + h + h) c                      q, k, v fused
    (g q d) c, (g d) c, (g d) c -> (g (q d + d + d)) c  grouped, as InternLM2 has it
    (h two d) c -> (h d two) c                          rotary: half-split to interleaved

Juxtaposition binds tighter than ``+``. A side is a list of alternatives (commas first, then ``+``, depth first); the
i-th alternative on the left has the same axes as the i-th on the right and corresponds to it. ``1`` is an axis of size
one, ``...`` stands for the same axes wherever it appears. Only strings and integers live here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain

from streamconv.errors import CoverageError, NotationError

ELLIPSIS = "..."
MOST_PARTS = 4096  # alternatives on a side; sums side by side multiply them
_DEEPEST = 50  # parentheses inside each other
_MOST_AXES = 100  # side by side
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<one>\d+)|(?P<dots>\.\.\.)|(?P<mark>[()+,]))")


@dataclass(frozen=True, slots=True)
class Product:
    """Axes side by side, outermost first. Each factor is an axis name or a `Sum` in parentheses."""

    factors: tuple[str | Sum, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """Parts one after the other; a parenthesis without ``+`` is a sum of one."""

    terms: tuple[Product, ...]


Tensor = Product
Sizes = dict[str, int]


@dataclass(frozen=True, slots=True)
class Axis:
    """One digit of a flat index: ``index // stride`` is the position on ``name``, the remainder goes to ``child``."""

    name: str
    stride: int
    child: Tree


@dataclass(frozen=True, slots=True)
class Parts:
    """Consecutive parts that start at ``offsets`` (ascending, the first is 0)."""

    offsets: tuple[int, ...]
    children: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """All digits are known: the index belongs to alternative number ``alternative``."""

    alternative: int


Tree = Axis | Parts | Leaf


@dataclass(frozen=True, slots=True)
class Place:
    """Where an alternative lies in a tensor: element ``offset + sum(index[axis] * strides[axis])`` of tensor ``tensor``."""

    tensor: int
    offset: int
    strides: Sizes


@dataclass(frozen=True)
class Layout:
    """A parsed layout; ``str`` gives the text back, `flip` the other direction."""

    text: str = field(compare=False)
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    def __str__(self) -> str:
        return self.text

    def flip(self) -> Layout:
        """The inverse: the same facts read from right to left."""
        left, right = self.text.split("->")
        return parse(f"{right.strip()} -> {left.strip()}")

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axis names in order of appearance on the left, without ``...``."""
        names = chain.from_iterable(map(_names, self.left))
        return tuple(dict.fromkeys(name for name in names if name != ELLIPSIS))

    @cached_property
    def innermost(self) -> frozenset[str]:
        """The axes that parts end in, where none of them stands further out in another part, or on the other side; else none."""
        parts = _parts((*self.left, *self.right))
        if [] in parts:
            return frozenset()
        last = frozenset(names[-1] for names in parts)
        others = chain.from_iterable(names[:-1] for names in parts)
        return last if last.isdisjoint(others) else frozenset()

    def spread(self, rank: Sequence[int], side: str = "left") -> Layout:
        """This layout with ``...`` replaced by as many axes as tensors of these ranks leave for it.

        Raises:
            CoverageError: a tensor has another number of axes than its side of the layout says.
        """
        tensors = getattr(self, side)
        extra: int | None = None
        for tensor, axes in zip(tensors, rank, strict=True):
            dots = tensor.factors.count(ELLIPSIS)
            missing = axes - (len(tensor.factors) - dots)
            if missing < 0 or (not dots and missing) or (dots and extra is not None and missing != extra):
                raise CoverageError(f"layout {self.text!r}: tensor {_text(tensor)!r} has {axes} axes, expected {len(tensor.factors)}")
            extra = missing if dots else extra
        if ELLIPSIS not in self.text:
            return self
        names = [f"dots{k}" for k in range(extra or 0)]
        return parse(self.text.replace(ELLIPSIS, " ".join(["", *names, ""])))

    def shapes(self, side: str, sizes: Sizes) -> list[tuple[int, ...]]:
        """The shapes of the tensors of ``side`` ("left" or "right"), in elements."""
        return [_shape(tensor, sizes) for tensor in getattr(self, side)]

    def solve(
        self,
        shapes: Sequence[tuple[int, ...]],
        lookup: Callable[[str], int | None],
        where: str = "",
        fixed: Mapping[str, int] | None = None,
    ) -> Sizes:
        """All axis sizes: the ``fixed`` ones, then from the left tensors' shapes, then from ``lookup`` for what they leave open.

        Raises:
            CoverageError: the sizes contradict each other or are not determined.
        """
        equations: list[tuple[str | Sum, int]] = []
        for tensor, shape in zip(self.left, shapes, strict=True):
            equations += zip(tensor.factors, shape, strict=True)
        sizes: Sizes = {"1": 1, **(fixed or {})}
        open_axes = list(self.axes)
        while True:
            self._propagate(equations, sizes, where)
            open_axes = [axis for axis in open_axes if axis not in sizes]
            if not open_axes:
                return sizes
            axis, size = _look_up(open_axes, lookup)
            if size is None:
                raise CoverageError(
                    f"{where}layout {self.text!r}: the sizes of {', '.join(open_axes)} do not follow from the shapes "
                    f"{', '.join(map(str, shapes))}; give them with --set, in the recipe's dims, or in config.json "
                    "(--sidecars-from a folder of the model)"
                )
            if size < 1:
                raise CoverageError(f"{where}layout {self.text!r}: axis {axis} cannot have size {size}")
            sizes[axis] = size

    def _propagate(self, equations: list[tuple[str | Sum, int]], sizes: Sizes, where: str) -> None:
        """Solves every dimension with a single unknown axis (its extent is linear in it) until nothing more follows."""
        progress = True
        while progress:
            progress = False
            for factor, extent in equations:
                unknown = {name for name in _names(factor) if name not in sizes}
                if not unknown:
                    expected = _extent(factor, sizes)
                    if expected != extent:
                        terms = ", ".join(f"{name}={sizes[name]}" for name in dict.fromkeys(_names(factor)))
                        raise CoverageError(
                            f"{where}layout {self.text!r}: {_text(factor)} has {extent} elements, expected {expected} ({terms})"
                        )
                elif len(unknown) == 1:
                    (name,) = unknown
                    zero, one = (_extent(factor, {**sizes, name: n}) for n in (0, 1))
                    if _extent(factor, {**sizes, name: 2}) - one != one - zero or one == zero:
                        continue
                    size, remainder = divmod(extent - zero, one - zero)
                    if remainder or size < (1 if extent else 0):
                        raise CoverageError(
                            f"{where}layout {self.text!r}: {extent} elements cannot be {_text(factor)} ({_list_sizes(factor, sizes)})"
                        )
                    sizes[name] = size
                    progress = True

    def tree(self, output: int, sizes: Sizes) -> Tree:
        """The digits of a flat index into right tensor ``output``, ending in the alternative it belongs to."""
        first = len(_parts(self.right[:output]))
        counter = iter(range(first, 10**9))
        return _grow(list(self.right[output].factors), sizes, counter)

    def places(self, side: str, sizes: Sizes) -> list[Place]:
        """For each alternative, in order, its place in the tensors of ``side``."""
        places: list[Place] = []
        for number, tensor in enumerate(getattr(self, side)):
            places += [Place(number, offset, strides) for offset, strides in _places(list(tensor.factors), sizes)]
        return places


@lru_cache(maxsize=4096)
def parse(text: str) -> Layout:
    """Parses ``left -> right``.

    Raises:
        NotationError: malformed, or the sides do not hold the same axes.
    """
    arrows = [match.start() for match in re.finditer("->", text)]
    if len(arrows) != 1:
        raise NotationError("a layout has exactly one '->'", text, arrows[1] if arrows else len(text))
    left = _Parser(text, 0, arrows[0]).side()
    right = _Parser(text, arrows[0] + 2, len(text)).side()
    if max(sum(map(_count, side)) for side in (left, right)) > MOST_PARTS:
        raise NotationError(f"more than {MOST_PARTS} parts", text, 0)
    left_parts, right_parts = _parts(left), _parts(right)
    if len(left_parts) != len(right_parts):
        raise NotationError(f"{len(left_parts)} parts on the left, {len(right_parts)} on the right", text, arrows[0])
    left_range, right_range = (0, arrows[0]), (arrows[0] + 2, len(text))
    for number, (mine, theirs) in enumerate(zip(left_parts, right_parts, strict=True), 1):
        for names, where in ((mine, left_range), (theirs, right_range)):
            repeated = [name for name in names if names.count(name) > 1]
            if repeated:
                at = _positions(repeated[0], text, *where)[-1]
                raise NotationError(f"axis {repeated[0]!r} appears twice in part {number} ({' '.join(names)})", text, at)
        unmatched = sorted(set(mine) ^ set(theirs))
        if unmatched:
            at = _positions(unmatched[0], text, *(left_range if unmatched[0] in mine else right_range))[0]
            raise NotationError(f"axis {unmatched[0]!r} is on one side only of part {number}", text, at)
    return Layout(text, left, right)


def _look_up(axes: Sequence[str], lookup: Callable[[str], int | None]) -> tuple[str, int | None]:
    """The first of the axes whose size ``lookup`` knows, and that size; else the last one and None."""
    for axis in axes:
        size = lookup(axis)
        if size is not None:
            return axis, size
    return axes[-1], None


class _Parser:
    """Recursive descent over ``text[start:stop]``."""

    def __init__(self, text: str, start: int, stop: int) -> None:
        self.text, self.at, self.stop, self.depth = text, start, stop, 0

    def side(self) -> tuple[Tensor, ...]:
        tensors = [self.product(top=True)]
        while self.peek() == ",":
            self.take()
            tensors.append(self.product(top=True))
        if self.peek():
            raise self.error(f"unexpected {self.peek()!r}")
        return tuple(tensors)

    def product(self, *, top: bool = False) -> Product:
        factors: list[str | Sum] = []
        while (word := self.peek()) and word not in ",+)":
            start = self.at
            if self.take() == "(":
                factors.append(self.sum(start))
            elif word == ELLIPSIS and (not top or ELLIPSIS in factors):
                self.at = start
                raise self.error("'...' stands once per tensor, outside parentheses")
            elif word.isdigit() and word != "1":
                self.at = start
                raise self.error("an axis is a name or 1; give its size in dims")
            else:
                factors.append(word)
            if len(factors) > _MOST_AXES:
                self.at = start
                raise self.error(f"more than {_MOST_AXES} axes side by side")
        return Product(tuple(factors))

    def sum(self, start: int) -> Sum:
        self.depth += 1
        if self.depth > _DEEPEST:
            self.at = start
            raise self.error("too many parentheses inside each other")
        terms = [self.product()]
        while self.peek() == "+":
            self.take()
            terms.append(self.product())
        if self.peek() != ")":
            if not self.peek():
                self.at = start
                raise self.error("'(' is never closed")
            raise self.error(f"unexpected {self.peek()!r}")
        if len(terms) > 1 and not all(term.factors for term in terms):
            raise self.error("empty part in a sum")
        self.take()
        self.depth -= 1
        return Sum(tuple(terms))

    def peek(self) -> str:
        match = self._match()
        return match[0].strip() if match else ""

    def take(self) -> str:
        match = self._match()
        assert match is not None
        self.at = match.end()
        return match[0].strip()

    def _match(self) -> re.Match[str] | None:
        rest = self.text[self.at : self.stop]
        if not rest.strip():
            return None
        match = _TOKEN.match(self.text, self.at, self.stop)
        if match is None:
            self.at += len(rest) - len(rest.lstrip())
            raise self.error("neither an axis name nor one of ( ) + , ...")
        return match

    def error(self, message: str) -> NotationError:
        at = self.at + len(self.text[self.at : self.stop]) - len(self.text[self.at : self.stop].lstrip())
        return NotationError(message, self.text, at)


def _positions(name: str, text: str, start: int, stop: int) -> list[int]:
    """Where the token ``name`` stands in ``text[start:stop]``."""
    return [match.end() - len(name) for match in _TOKEN.finditer(text, start, stop) if match[0].strip() == name]


def _names(item: str | Sum | Product) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    else:
        for child in item.terms if isinstance(item, Sum) else item.factors:
            yield from _names(child)


def _text(item: str | Sum | Product) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Sum):
        return f"({' + '.join(map(_text, item.terms))})"
    return " ".join(map(_text, item.factors))


def _list_sizes(item: str | Sum, sizes: Sizes) -> str:
    """``h=8, d=64``: the sizes of those of its axes that have one."""
    texts = [f"{name}={sizes[name]}" for name in dict.fromkeys(_names(item)) if name in sizes]
    return ", ".join(texts) or "nothing else is known"


def _shape(tensor: Tensor, sizes: Sizes) -> tuple[int, ...]:
    return tuple(_extent(factor, sizes) for factor in tensor.factors)


def _extent(item: str | Sum | Product, sizes: Sizes) -> int:
    if isinstance(item, str):
        return sizes[item]
    if isinstance(item, Sum):
        return sum(_extent(term, sizes) for term in item.terms)
    return math.prod(_extent(factor, sizes) for factor in item.factors)


def _count(item: str | Sum | Product) -> int:
    """How many alternatives there are, without making them."""
    if isinstance(item, str):
        return 1
    return sum(map(_count, item.terms)) if isinstance(item, Sum) else math.prod(map(_count, item.factors))


def _alternatives(tensor: Tensor) -> Iterator[list[str]]:
    """The axis names of each alternative of a tensor, depth first."""
    if not tensor.factors:
        yield []
        return
    head, rest = tensor.factors[0], tensor.factors[1:]
    if isinstance(head, str):
        yield from ([*([head] if head != "1" else []), *names] for names in _alternatives(Product(rest)))
        return
    for term in head.terms:
        yield from _alternatives(Product((*term.factors, *rest)))


def _parts(side: Iterable[Tensor]) -> list[list[str]]:
    """The axis names of each alternative of some tensors, in order."""
    return list(chain.from_iterable(map(_alternatives, side)))


def _grow(factors: list[str | Sum], sizes: Sizes, counter: Iterator[int]) -> Tree:
    """The tree of ``factors``."""
    while factors and factors[0] == "1":
        factors = factors[1:]
    if not factors:
        return Leaf(next(counter))
    head, rest = factors[0], factors[1:]
    stride = math.prod(_extent(factor, sizes) for factor in rest)
    if isinstance(head, str):
        return Axis(head, stride, _grow(rest, sizes, counter))
    offsets, children, offset = [], [], 0
    for term in head.terms:
        offsets.append(offset)
        children.append(_grow([*term.factors, *rest], sizes, counter))
        offset += _extent(term, sizes) * stride
    return children[0] if len(children) == 1 else Parts(tuple(offsets), tuple(children))


def _places(factors: list[str | Sum], sizes: Sizes) -> Iterator[tuple[int, Sizes]]:
    """Offset and strides of each alternative of ``factors`` in their flat row-major product."""
    if not factors:
        yield 0, {}
        return
    head, rest = factors[0], factors[1:]
    stride = math.prod(_extent(factor, sizes) for factor in rest)
    if isinstance(head, str):
        for offset, strides in _places(rest, sizes):
            yield offset, strides if head == "1" else {head: stride, **strides}
        return
    start = 0
    for term in head.terms:
        for offset, strides in _places([*term.factors, *rest], sizes):
            yield start + offset, strides
        start += _extent(term, sizes) * stride
