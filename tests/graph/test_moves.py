from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import Drawn, indices, layouts, meaning

from streamconv.graph.moves import Move, identity, packed_strides, place, pull, region, split_stack
from streamconv.notation.axes import parse


@st.composite
def moves(draw, numel: int) -> Move:
    """A region of a tensor of ``numel`` elements into a packed buffer, its axes in any order and of any stride."""
    axes: list[tuple[int, int]] = []
    left = numel - 1
    for _ in range(draw(st.integers(0, 3))):
        stride = draw(st.integers(1, max(1, left)))
        size = draw(st.integers(1, min(6, left // stride + 1)))
        axes.append((size, stride))
        left -= (size - 1) * stride
    sizes = tuple(size for size, _ in axes)
    order = draw(st.permutations(range(len(sizes))))
    packed = packed_strides(tuple(sizes[k] for k in order))
    gap = draw(st.integers(1, 2))
    strides = [0] * len(sizes)
    for k, stride in zip(order, packed, strict=True):
        strides[k] = stride * gap
    return Move(sizes, draw(st.integers(0, 5)), tuple(strides), draw(st.integers(0, left)), tuple(s for _, s in axes))


def pairs(move: Move) -> list[tuple[int, int]]:
    dst, src = indices(move)
    return sorted(zip(dst.tolist(), src.tolist(), strict=True))


# -------------------------------------------------------------------------------------------------------------------- pull


@settings(deadline=None, max_examples=250)
@given(layouts(), st.data())
def test_pull_of_any_region_is_brute_force(drawn: Drawn, data: st.DataObject) -> None:
    layout = parse(drawn.text)
    output = data.draw(st.integers(0, len(layout.right) - 1))
    numel = math.prod(drawn.shapes("right")[output])
    move = data.draw(moves(numel) | st.just(identity(numel)))
    places = layout.places("left", drawn.sizes)
    expected = [(dst, *meaning(drawn.text, drawn.sizes)[output][src]) for dst, src in pairs(move)]
    found = []
    for alternative, piece, digits in itertools.islice(pull(layout.tree(output, drawn.sizes), move), move.numel + 1):
        where = places[alternative]
        assert piece.numel
        found += [(dst, where.tensor, src) for dst, src in pairs(place(piece, digits, where))]
    assert sorted(found) == expected  # every element once: so there were at most as many pieces, and it ended


@pytest.mark.parametrize(
    ("text", "sizes", "most"),
    [
        ("a b -> b a", {"a": 5000, "b": 7000}, 1),
        ("(h two d) c -> (h d two) c", {"h": 64, "two": 2, "d": 64, "c": 4096}, 1),
        ("q c, k c, k c -> (q + k + k) c", {"q": 4096, "k": 1024, "c": 4096}, 3),
        ("(g q d) c, (g d) c, (g d) c -> (g (q d + d + d)) c", {"g": 8, "q": 4, "d": 128, "c": 4096}, 3),
        ("f c, f c -> (f (1 + 1)) c", {"f": 14336, "c": 4096}, 2),
        ("e f h, e f h -> e h (f + f)", {"e": 256, "f": 2048, "h": 7168}, 2),
        ("(r h d + r k d + r k d) c -> r (h d + k d + k d) c", {"r": 8, "h": 8, "k": 1, "d": 128, "c": 8192}, 3),
    ],
)
def test_aligned_tensors_come_out_in_as_few_pieces_as_there_are_parts(text: str, sizes: dict[str, int], most: int) -> None:
    layout = parse(text)
    sizes = {"1": 1, **sizes}
    (shape,) = layout.shapes("right", sizes)
    pieces = list(pull(layout.tree(0, sizes), identity(math.prod(shape))))
    assert len(pieces) == most
    assert sum(piece.numel for _, piece, _ in pieces) == math.prod(shape)


def test_pull_of_nothing_is_nothing() -> None:
    tree = parse("a b -> b a").tree(0, {"a": 0, "b": 3})
    assert list(pull(tree, identity(0))) == []
    assert list(split_stack(identity(0), 1, 0)) == [(0, identity(0))]


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_split_stack(count: int, numel: int, data: st.DataObject) -> None:
    move = data.draw(moves(count * numel))
    found = []
    for number, piece in itertools.islice(split_stack(move, count, numel), move.numel + 1):
        assert 0 <= number < count
        inside = pairs(piece)
        assert all(0 <= src < numel for _, src in inside)
        found += [(dst, number * numel + src) for dst, src in inside]
    assert sorted(found) == pairs(move)


# ------------------------------------------------------------------------------------------------- the same move in other forms


@settings(deadline=None, max_examples=200)
@given(moves(400))
def test_simplify_and_runs_cover_the_same_pairs(move: Move) -> None:
    simple = move.simplify()
    assert pairs(simple) == pairs(move)
    assert len(simple.sizes) <= len(move.sizes)
    assert simple.simplify() == simple
    runs = list(simple.runs())
    assert sorted((dst + k, src + k) for dst, src in runs for k in range(simple.run)) == pairs(move)
    assert [dst for dst, _ in runs] == sorted(dst for dst, _ in runs)


def test_simplify_joins_what_is_contiguous() -> None:
    assert Move((2, 1, 3, 4), 7, (12, 99, 4, 1), 5, (12, 99, 4, 1)).simplify() == Move((24,), 7, (1,), 5, (1,))
    assert Move((3, 2), 0, (1, 3), 0, (1, 3)).simplify() == identity(6)
    assert Move((2, 3), 0, (3, 1), 0, (1, 2)).simplify() == Move((2, 3), 0, (3, 1), 0, (1, 2))
    assert Move((), 3, (), 4, ()).simplify().run == 1


@settings(deadline=None, max_examples=150)
@given(moves(400), st.data())
def test_tiles_cover_the_same_pairs_in_the_order_of_their_sources(move: Move, data: st.DataObject) -> None:
    tile = tuple(data.draw(st.integers(1, size)) for size in move.sizes)
    tiles = list(move.tiles(tile))
    assert sorted(pair for part in tiles for pair in pairs(part)) == pairs(move)
    assert all(n <= t for part in tiles for n, t in zip(part.sizes, tile, strict=True))
    nested = sorted(zip(move.src_strides, move.sizes, strict=True))
    if all(outer >= inner * size for (inner, size), (outer, _) in itertools.pairwise(nested)):
        assert [part.src for part in tiles] == sorted(part.src for part in tiles)


@settings(deadline=None, max_examples=50)
@given(moves(200))
def test_region_asks_for_the_destination_packed(move: Move) -> None:
    wanted = region(move)
    dst, src = indices(wanted)
    assert sorted(dst.tolist()) == list(range(move.numel))
    assert src.tolist() == indices(move)[0].tolist()
    assert np.array_equal(dst, np.arange(move.numel))
