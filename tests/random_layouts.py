"""Random layouts, and what a layout means, spelled out slowly and without `Layout.places` or `Layout.tree`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from hypothesis import strategies as st

from streamconv.axes import ELLIPSIS, Product, Sum, parse
from streamconv.ops import Rearrange
from streamconv.runs import Move, identity

NAMES = ("a", "b", "h", "kv", "two", "e_1", "Head", "a1")


def text_of(item: str | Sum | Product) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Sum):
        return "(" + " + ".join(map(text_of, item.terms)) + ")"
    return " ".join(map(text_of, item.factors))


def paths(item: str | Sum | Product) -> list[tuple[tuple[int, ...], list[str]]]:
    """(which term at each sum, axis names) of every alternative, in depth-first order."""
    if isinstance(item, str):
        return [((), [] if item == "1" else [item])]
    if isinstance(item, Sum):
        return [((k, *path), names) for k, term in enumerate(item.terms) for path, names in paths(term)]
    return [
        (tuple(k for path, _ in choice for k in path), [name for _, names in choice for name in names])
        for choice in itertools.product(*map(paths, item.factors))
    ]


def cells(item: str | Sum | Product, sizes: dict[str, int]) -> list[tuple[tuple[int, ...], dict[str, int]]]:
    """Every element in row-major order: (which term at each sum, index on every axis)."""
    if isinstance(item, str):
        return [((), {})] if item == "1" else [((), {item: k}) for k in range(sizes[item])]
    if isinstance(item, Sum):
        return [((k, *path), index) for k, term in enumerate(item.terms) for path, index in cells(term, sizes)]
    found = []
    for choice in itertools.product(*(cells(factor, sizes) for factor in item.factors)):
        index: dict[str, int] = {}
        for _, part in choice:
            index |= part
        found.append((tuple(k for path, _ in choice for k in path), index))
    return found


def side_cells(side: tuple[Product, ...], sizes: dict[str, int]) -> list[list[tuple[int, frozenset[tuple[str, int]]]]]:
    """For each tensor its elements in order: (number of the alternative, index)."""
    found, before = [], 0
    for tensor in side:
        numbers = {path: before + k for k, (path, _) in enumerate(paths(tensor))}
        before += len(numbers)
        found.append([(numbers[path], frozenset(index.items())) for path, index in cells(tensor, sizes)])
    return found


def meaning(text: str, sizes: dict[str, int]) -> list[list[tuple[int, int]]]:
    """For each right tensor, for each element: (left tensor, element there). The definition of a layout."""
    return _meaning(text, tuple(sorted(sizes.items())))


@lru_cache(maxsize=64)
def _meaning(text: str, given: tuple[tuple[str, int], ...]) -> list[list[tuple[int, int]]]:
    layout, sizes = parse(text), dict(given)
    where = {cell: (number, k) for number, tensor in enumerate(side_cells(layout.left, sizes)) for k, cell in enumerate(tensor)}
    return [[where[cell] for cell in tensor] for tensor in side_cells(layout.right, sizes)]


# -------------------------------------------------------------------------------------------------------------- strategies


@st.composite
def _grouped(draw, factors: list[str | Sum], *, ones: bool = True) -> Product:
    """Factors in this order with parentheses around some neighbours and some axes of size one in between."""
    items: list[str | Sum] = list(factors)
    for _ in range(draw(st.integers(0, 2))):
        if ones and draw(st.booleans()):
            items.insert(draw(st.integers(0, len(items))), "1")
        if items and draw(st.booleans()):
            start = draw(st.integers(0, len(items) - 1))
            stop = draw(st.integers(start + 1, len(items)))
            items[start:stop] = [Sum((Product(tuple(items[start:stop])),))]
    return Product(tuple(items))


@st.composite
def _free(draw, pool: tuple[str, ...], depth: int) -> Product:
    """Any product over some of ``pool`` in which no alternative repeats an axis."""
    names = list(draw(st.permutations(pool)))[: draw(st.integers(1, min(4, len(pool))))]
    factors: list[str | Sum] = []
    while names:
        take = draw(st.integers(1, len(names)))
        mine, names = tuple(names[:take]), names[take:]
        if depth and draw(st.booleans()):
            factors.append(Sum(tuple(draw(_free(mine, depth - 1)) for _ in range(draw(st.integers(2, 3))))))
        else:
            factors.extend(mine)
    return draw(_grouped(factors))


@st.composite
def _over(draw, alternatives: list[list[str]]) -> Product:
    """A product with exactly these alternatives, whatever they have in common outside or inside of its sum."""
    if len(alternatives) == 1:
        return draw(_grouped(list(draw(st.permutations(alternatives[0])))))
    common = sorted(set.intersection(*map(set, alternatives)))
    outside = list(draw(st.permutations(common)))[: draw(st.integers(0, len(common)))]
    cut = draw(st.integers(0, len(outside)))
    inner = [[name for name in names if name not in outside] for names in alternatives]
    terms = []
    for group in draw(_partition(inner, least=2)):
        term = draw(_over(group))
        terms.append(term if term.factors else Product(("1",)))
    return draw(_grouped([*outside[:cut], Sum(tuple(terms)), *outside[cut:]]))


@st.composite
def _partition(draw, items: list[list[str]], *, least: int = 1) -> list[list[list[str]]]:
    cuts = draw(st.sets(st.integers(1, len(items) - 1), min_size=least - 1)) if len(items) > 1 else set()
    edges = [0, *sorted(cuts), len(items)]
    return [items[start:stop] for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Drawn:
    """A layout's text, the trees it was made from, and sizes for its axes."""

    text: str
    left: tuple[Product, ...]
    right: tuple[Product, ...]
    sizes: dict[str, int]

    def shapes(self, side: str = "left") -> list[tuple[int, ...]]:
        return [tuple(extent(factor, self.sizes) for factor in tensor.factors) for tensor in getattr(self, side)]


def extent(item: str | Sum | Product, sizes: dict[str, int]) -> int:
    return len(cells(item, sizes))


@st.composite
def layouts(draw, *, dots: bool = False, smallest: int = 1, largest: int = 4, most: int = 600) -> Drawn:
    """A random layout: one side freely nested, the other over the same alternatives, both ways round."""
    free = tuple(draw(_free(NAMES, draw(st.integers(0, 2)))) for _ in range(draw(st.integers(1, 2))))
    alternatives = [names for tensor in free for _, names in paths(tensor)]
    if len(alternatives) > 8:
        free, alternatives = free[:1], [names for _, names in paths(free[0])]
    if len(alternatives) > 8:
        free = (Product(("h", "a")),)
        alternatives = [["h", "a"]]
    other = tuple(draw(_over(group)) for group in draw(_partition(alternatives)))
    sides = [free, other] if draw(st.booleans()) else [other, free]
    if dots and draw(st.booleans()):
        first = draw(st.booleans())
        sides = [tuple(Product((ELLIPSIS, *t.factors)) if first else Product((*t.factors, ELLIPSIS)) for t in side) for side in sides]
    names = sorted({name for _, names in itertools.chain.from_iterable(map(paths, sides[0])) for name in names})
    sizes = {"1": 1, **{name: draw(st.integers(smallest, largest)) for name in names if name != ELLIPSIS}}
    while not dots and sum(extent(tensor, sizes) for tensor in sides[0]) > most:
        name = max(names, key=lambda n: sizes[n])
        sizes[name] -= 1
    text = " -> ".join(", ".join(map(text_of, side)) for side in sides)
    return Drawn(text, sides[0], sides[1], sizes)


@st.composite
def permutations(draw, numel: int) -> tuple[str, dict[str, int]]:
    """A layout of one tensor of ``numel`` elements: its axes in another order, or its parts split off or side by side."""
    factors: list[int] = []
    rest = numel
    while rest > 1 and len(factors) < 4:
        divisors = [d for d in range(2, rest + 1) if rest % d == 0]
        factors.append(draw(st.sampled_from(divisors)))
        rest //= factors[-1]
    names = NAMES[: len(factors)]
    sizes = {"1": 1, **dict(zip(names, factors, strict=True))}
    if rest > 1:
        sizes["rest"], names = rest, (*names, "rest")
    given: list[str | Sum] = list(names)
    alternatives = [list(names)]
    if names and (wide := [n for n in names if sizes[n] > 1]) and draw(st.booleans()):
        cut = draw(st.sampled_from(wide))
        sizes["x"] = draw(st.integers(1, sizes[cut] - 1))
        sizes["y"] = sizes.pop(cut) - sizes["x"]
        given[given.index(cut)] = Sum((Product(("x",)), Product(("y",))))
        alternatives = [[part if name == cut else name for name in names] for part in ("x", "y")]
    right = tuple(draw(_over(group)) for group in draw(_partition(alternatives)))
    return f"{text_of(draw(_grouped(given)))} -> {', '.join(map(text_of, right))}", sizes


# --------------------------------------------------------------------------------------------------------------- execution


def indices(move: Move) -> tuple[np.ndarray, np.ndarray]:
    """(dst, src) of every element of a move."""
    grid = np.indices(move.sizes).reshape(len(move.sizes), move.numel)
    dst = move.dst + sum((i * d for i, d in zip(grid, move.dst_strides, strict=True)), np.zeros(move.numel, np.int64))
    src = move.src + sum((i * s for i, s in zip(grid, move.src_strides, strict=True)), np.zeros(move.numel, np.int64))
    return dst, src


def convert(text: str, sizes: dict[str, int], given: list[np.ndarray]) -> list[np.ndarray]:
    """The layout's right tensors for these left ones, by `Rearrange`."""
    made = []
    for output in range(len(parse(text).right)):
        op = Rearrange(text, sizes, (1,) * len(given), output)
        flat = np.empty(int(np.prod(op.shape, dtype=int)), given[0].dtype)
        for number, move in op.pull(identity(flat.size)):
            dst, src = indices(move)
            flat[dst] = given[number].reshape(-1)[src]
        made.append(flat.reshape(op.shape))
    return made
