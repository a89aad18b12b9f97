from __future__ import annotations

import math
import re

import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import Drawn, convert, layouts, meaning, paths, side_cells

from streamconv.errors import CoverageError, NotationError
from streamconv.notation.axes import Product, Sum, parse

# ----------------------------------------------------------------------------------------------------------------- parsing


def test_parse_gives_the_tree() -> None:
    layout = parse("(g q d) c, (g d) c -> (g (q d + d)) c")
    assert layout.left == (
        Product((Sum((Product(("g", "q", "d")),)), "c")),
        Product((Sum((Product(("g", "d")),)), "c")),
    )
    assert layout.right == (Product((Sum((Product(("g", Sum((Product(("q", "d")), Product(("d",)))))),)), "c")),)
    assert layout.axes == ("g", "q", "d", "c")


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("a b -> b a", "b a -> a b"),
        ("a, b -> (a + b)", "(a + b) -> a, b"),
        ("  a b->b a ", "b a -> a b"),
        ("->", " -> "),
        ("1 -> ", " -> 1"),
        ("... -> 1 ...", "1 ... -> ..."),
    ],
)
def test_str_and_flip(text: str, flipped: str) -> None:
    layout = parse(text)
    assert str(layout) == text
    assert str(layout.flip()) == flipped
    assert (layout.flip().left, layout.flip().right) == (layout.right, layout.left)


def test_layouts_with_the_same_facts_are_equal() -> None:
    assert parse("a  b->b a") == parse("a b -> b a")
    assert hash(parse("a  b->b a")) == hash(parse("a b -> b a"))
    assert parse("a b -> b a") != parse("b a -> a b")


@settings(deadline=None, max_examples=150)
@given(layouts(dots=True), st.booleans())
def test_flip_twice_is_the_layout(drawn: Drawn, tight: bool) -> None:
    text = re.sub(r"\s*([(),+]|->)\s*", r"\1", drawn.text) if tight else drawn.text
    layout = parse(text)
    assert (layout.left, layout.right) == (drawn.left, drawn.right)
    assert str(layout) == text
    assert layout.flip() == parse(" -> ".join(reversed(text.split("->"))))
    assert layout.flip().flip() == layout


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        ("a b", ">>>", "exactly one '->'"),
        ("a -> a -> a", ">>>-> a", "exactly one '->'"),
        ("a -> (a b", ">>>(a b", "never closed"),
        ("(a -> a", ">>>(a -> a", "never closed"),
        ("a) -> a", ">>>) -> a", "unexpected ')'"),
        ("a + b -> (a + b)", ">>>+ b -> ", "unexpected '+'"),
        ("(a, b) -> a", ">>>, b)", "unexpected ','"),
        ("a (b + ) -> a b", ">>>) ->", "empty part"),
        ("a & b -> b a", ">>>& b", "neither an axis name"),
        ("a -> a.b", ">>>.b", "neither an axis name"),
        ("a - b -> a", ">>>- b", "neither an axis name"),
        ("a 2 -> a", ">>>2 ->", "an axis is a name or 1"),
        ("a 01 -> a", ">>>01 ->", "an axis is a name or 1"),
        ("a -> (a ...)", ">>>...)", "outside parentheses"),
        ("... a ... -> a ...", ">>>... ->", "once per tensor"),
        ("a, b -> a", ">>>-> a", "2 parts on the left, 1 on the right"),
        ("a -> (a + a)", ">>>-> (a", "1 parts on the left, 2 on the right"),
        ("a a -> a", ">>>a -> a", "'a' appears twice in part 1"),
        ("h h -> h that", ">>>h -> h that", "'h' appears twice"),
        ("a b -> a (b b)", ">>>b)", "'b' appears twice"),
        ("head d -> head h", ">>>d -> head h", "'d' is on one side only of part 1"),
        ("head -> head e", ">>>e", "'e' is on one side only of part 1"),
        ("a ... -> a", ">>>... -> a", "'...' is on one side only"),
        ("a, b -> (b + a)", ">>>a, b", "'a' is on one side only of part 1"),
        ("(" * 60 + "a" + ")" * 60 + " -> a", "(>>>(", "inside each other"),
    ],
)
def test_errors_point_at_the_character(text: str, at: str, words: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert at in str(caught.value)
    assert str(caught.value).endswith(f"{text[: caught.value.position]}>>>{text[caught.value.position :]}")


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="ab1 ()+,.->_", max_size=24) | st.text(max_size=10))
def test_any_text_is_a_layout_or_a_notation_error(text: str) -> None:
    try:
        layout = parse(text)
    except NotationError as caught:
        position = caught.position
    else:
        position = 0
        assert parse(str(layout)) == layout
    assert 0 <= position <= len(text)


# ----------------------------------------------------------------------------------------------------------------- solving


def nothing(_: str) -> None:
    return None


@pytest.mark.parametrize(
    ("text", "shapes", "dims", "sizes"),
    [
        ("a b -> b a", [(2, 3)], {}, {"a": 2, "b": 3}),
        (" -> ", [()], {}, {}),
        ("1 a -> a", [(1, 4)], {}, {"a": 4}),
        ("h c, h c -> (h + h) c", [(4, 2), (4, 2)], {}, {"h": 4, "c": 2}),
        ("q c, k c -> (q + k) c", [(4, 2), (6, 2)], {}, {"q": 4, "k": 6, "c": 2}),
        # grouped queries: from the key's rows and one number of the config
        ("(g q d) c, (g d) c -> (g (q d + d)) c", [(32, 5), (8, 5)], {"g": 2}, {"g": 2, "q": 4, "d": 4, "c": 5}),
        ("(g q d) c, (g d) c -> (g (q d + d)) c", [(32, 5), (8, 5)], {"d": 4}, {"g": 2, "q": 4, "d": 4, "c": 5}),
        ("(g q d) c, (g d) c -> (g (q d + d)) c", [(32, 5), (32, 5)], {"g": 8, "d": 4, "q": 7}, {"g": 8, "q": 1, "d": 4, "c": 5}),
        ("(g (q d + d + d)) c -> (g q d) c, (g d) c, (g d) c", [(48, 5)], {"g": 2, "d": 4}, {"g": 2, "q": 4, "d": 4, "c": 5}),
        ("(g (q d + d + d)) c -> (g q d) c, (g d) c, (g d) c", [(48, 5)], {"g": 2, "q": 4}, {"g": 2, "q": 4, "d": 4, "c": 5}),
        ("(kv + e two) c -> (kv + two e) c", [(10, 3)], {"kv": 4, "two": 2}, {"kv": 4, "e": 3, "two": 2, "c": 3}),
        ("(three d) c -> three d c", [(6, 2)], {"three": 3}, {"three": 3, "d": 2, "c": 2}),
        # empty tensors
        ("a b -> b a", [(0, 3)], {}, {"a": 0, "b": 3}),
        ("a c, b c -> (a + b) c", [(0, 3), (2, 3)], {}, {"a": 0, "b": 2, "c": 3}),
        ("(h d) c -> h d c", [(0, 3)], {"h": 2}, {"h": 2, "d": 0, "c": 3}),
    ],
)
def test_solve(text: str, shapes: list[tuple[int, ...]], dims: dict[str, int], sizes: dict[str, int]) -> None:
    assert parse(text).solve(shapes, dims.get) == {"1": 1, **sizes}


@pytest.mark.parametrize(
    ("text", "shapes", "dims", "words"),
    [
        ("h c, h c -> (h + h) c", [(4, 2), (5, 2)], {}, "h has 5 elements, expected 4"),
        ("h c, h c -> (h + h) c", [(4, 2), (4, 3)], {}, "c has 3 elements, expected 2"),
        ("1 a -> a", [(2, 4)], {}, "1 has 2 elements, expected 1"),
        ("(h d) c -> h d c", [(7, 2)], {"h": 2}, "7 elements cannot be (h d) (h=2)"),
        ("(kv + e two) c -> (kv + two e) c", [(3, 3)], {"kv": 4, "two": 2}, "3 elements cannot be (kv + e two)"),
        ("(kv + e two) c -> (kv + two e) c", [(4, 3)], {"kv": 4, "two": 2}, "4 elements cannot be"),
        ("(kv + e two) c -> (kv + two e) c", [(9, 3)], {"kv": 4, "two": 2}, "9 elements cannot be"),
        ("(h d) c -> h d c", [(8, 2)], {}, "the sizes of h, d do not follow from the shapes (8, 2)"),
        ("(h d) c -> h d c", [(8, 2)], {"h": 0}, "axis h cannot have size 0"),
        ("(h d) c -> h d c", [(8, 2)], {"h": -2}, "axis h cannot have size -2"),
        ("(a b) -> a b", [(6,)], {"b": 4}, "6 elements cannot be (a b) (b=4)"),
    ],
)
def test_solve_refuses(text: str, shapes: list[tuple[int, ...]], dims: dict[str, int], words: str) -> None:
    with pytest.raises(CoverageError, match=re.escape(words)):
        parse(text).solve(shapes, dims.get, "here: ")


@settings(deadline=None, max_examples=100)
@given(layouts(smallest=1))
def test_solve_finds_the_sizes_it_was_made_from(drawn: Drawn) -> None:
    layout = parse(drawn.text)
    shapes = drawn.shapes()
    assert layout.shapes("left", drawn.sizes) == shapes
    assert layout.shapes("right", drawn.sizes) == drawn.shapes("right")
    assert layout.solve(shapes, drawn.sizes.get) == drawn.sizes
    assert layout.flip().solve(drawn.shapes("right"), drawn.sizes.get) == drawn.sizes


@settings(deadline=None, max_examples=100)
@given(layouts(smallest=0))
def test_places_are_where_the_elements_lie(drawn: Drawn) -> None:
    layout = parse(drawn.text)
    for side, tensors in (("left", drawn.left), ("right", drawn.right)):
        places = layout.places(side, drawn.sizes)
        assert len(places) == sum(len(paths(tensor)) for tensor in tensors)
        for number, tensor in enumerate(side_cells(tensors, drawn.sizes)):
            for at, (alternative, index) in enumerate(tensor):
                place = places[alternative]
                assert place.tensor == number
                assert place.offset + sum(k * place.strides[axis] for axis, k in index) == at


# ---------------------------------------------------------------------------------------------------------------- ellipsis


@pytest.mark.parametrize(
    ("text", "rank", "wide"),
    [
        ("h ..., h ... -> (h + h) ...", [2, 2], "h d, h d -> (h + h) d"),
        ("h ..., h ... -> (h + h) ...", [1, 1], "h, h -> (h + h)"),
        ("... c -> c ...", [3], "a b c -> c a b"),
        ("a...b -> b...a", [2], "a b -> b a"),
        ("a...b -> b...a", [3], "a x b -> b x a"),
        ("... -> 1 ...", [0], " -> 1"),
        ("a b -> b a", [2], "a b -> b a"),
        ("a ..., b -> a ..., b", [3, 1], "a x y, b -> a x y, b"),
    ],
)
def test_spread(text: str, rank: list[int], wide: str) -> None:
    assert [len(t.factors) for t in parse(text).spread(rank).left] == rank
    found, expected = parse(text).spread(rank), parse(wide)
    renamed = dict(zip(found.axes, expected.axes, strict=True))
    assert parse(re.sub(r"\w+", lambda m: renamed.get(m[0], m[0]), str(found))) == expected


@pytest.mark.parametrize(
    ("text", "rank"), [("a b -> b a", [3]), ("a b -> b a", [1]), ("a b ... -> b a ...", [1]), ("a ..., b ... -> (a + b) ...", [2, 3])]
)
def test_spread_refuses_other_ranks(text: str, rank: list[int]) -> None:
    with pytest.raises(CoverageError, match="axes, expected"):
        parse(text).spread(rank)


# -------------------------------------------------------------------------------------------------------- the layouts of spec/


def cat(*parts: np.ndarray, axis: int = 0) -> np.ndarray:
    return np.concatenate(parts, axis)


def llama_permute(w: np.ndarray, heads: int) -> np.ndarray:
    """As the reference writes it: interleaved pairs to halves."""
    rows, dim = w.shape
    return w.reshape(heads, rows // heads // 2, 2, dim).transpose(0, 2, 1, 3).reshape(rows, dim)


def internlm2(w: np.ndarray, groups: int, d: int) -> list[np.ndarray]:
    grouped = w.reshape(groups, -1, d, *w.shape[1:])
    return [grouped[:, at].reshape(-1, *w.shape[1:]) for at in (slice(0, -2), -2, -1)]


def sat_partition(w: np.ndarray, n: int, strides: list[int]) -> list[np.ndarray]:
    blocks = np.split(w, np.cumsum([len(w) * s // sum(strides) for s in strides])[:-1])
    return [cat(*(np.split(block, n)[rank] for block in blocks)) for rank in range(n)]


def heads_first(w: np.ndarray, heads: int) -> list[np.ndarray]:
    """Rows (heads three d) to three tensors."""
    split = w.reshape(heads, 3, -1, *w.shape[1:])
    return [split[:, k].reshape(-1, *w.shape[1:]) for k in range(3)]


def evens_first(w: np.ndarray, heads: int, start: int = 0) -> np.ndarray:
    """Within the rows of each head from ``start``: even ones, then odd ones."""
    made = []
    for head in np.split(w, heads):
        tail = head[start:]
        made += [head[:start], tail[0::2], tail[1::2]]
    return cat(*made)


# layout, shapes of the left tensors, dims, the same by numpy
SPEC = {
    "internvl, detr, swin: q, k, v one after the other": (
        "h ..., h ..., h ... -> (h + h + h) ...", [(4, 3)] * 3, {}, lambda q, k, v: [cat(q, k, v)],
    ),
    "internvl: the biases": ("h ..., h ..., h ... -> (h + h + h) ...", [(4,)] * 3, {}, lambda q, k, v: [cat(q, k, v)]),
    "internlm2: grouped, split": (
        "(g (q d + d + d)) ... -> (g q d) ..., (g d) ..., (g d) ...", [(24, 3)], {"g": 2, "d": 3}, lambda w: internlm2(w, 2, 3),
    ),
    "internlm2: its bias": (
        "(g (q d + d + d)) ... -> (g q d) ..., (g d) ..., (g d) ...", [(24,)], {"g": 2, "d": 3}, lambda w: internlm2(w, 2, 3),
    ),
    "internlm2, grouped fusing: joined": (
        "(g q d) c, (g d) c, (g d) c -> (g (q d + d + d)) c", [(12, 5), (6, 5), (6, 5)], {"d": 3},
        lambda q, k, v: [cat(*(cat(q[6 * g : 6 * g + 6], k[3 * g : 3 * g + 3], v[3 * g : 3 * g + 3]) for g in range(2)))],
    ),
    "meta: rotary, interleaved to half-split": (
        "(h j two) c -> (h two j) c", [(12, 3)], {"h": 2, "two": 2}, lambda w: [llama_permute(w, 2)],
    ),
    "meta: rotary, half-split to interleaved": (
        "(h two d) c -> (h d two) c", [(12, 3)], {"h": 2, "two": 2}, lambda w: [rearrange(w, "(h t d) c -> (h d t) c", h=2, t=2)],
    ),
    "meta: shards on rows, with the permute": (
        "r (h j two) c -> (r h two j) c", [(2, 8, 3)], {"h": 2, "two": 2}, lambda w: [llama_permute(w.reshape(16, 3), 4)],
    ),
    "meta: shards on columns": ("r o c -> o (r c)", [(4, 3, 2)], {}, lambda w: [cat(*w, axis=1)]),
    "meta: shards on rows": ("r o c -> (r o) c", [(4, 3, 2)], {}, lambda w: [cat(*w)]),
    "mixtral (meta): row blocks": ("(e f) d -> e f d", [(6, 4)], {"e": 3}, lambda w: [np.stack(np.split(w, 3))]),
    "mixtral (meta): row blocks, transposed": (
        "(e f) d -> e d f", [(6, 4)], {"e": 3}, lambda w: [np.stack([block.T for block in np.split(w, 3)])],
    ),
    "mixtral gmm: experts transposed": ("e a b -> e b a", [(3, 4, 5)], {}, lambda w: [w.transpose(0, 2, 1)]),
    "gemma, sat, cogvlm2: q, k, v rows of other lengths": (
        "(q + k + k) ... -> q ..., k ..., k ...", [(10, 3)], {"k": 2}, lambda w: [w[:6], w[6:8], w[8:]],
    ),
    "gemma: by heads": (
        "(h d + k d + k d) c -> (h d) c, (k d) c, (k d) c", [(16, 3)], {"h": 4, "k": 2, "d": 2}, lambda w: [w[:8], w[8:12], w[12:]],
    ),
    "sat: model parallel, plain columns": ("(r o) ... -> r o ...", [(6, 2)], {"r": 3}, lambda w: [np.stack(np.split(w, 3))]),
    "sat: model parallel, rows of the matrix": ("o (r c) -> r o c", [(2, 6)], {"r": 3}, lambda w: [np.stack(np.split(w, 3, axis=1))]),
    "sat: model parallel, strides [1, 1, 1]": (
        "(r a + r a + r a) ... -> r (a + a + a) ...", [(12, 2)], {"r": 2}, lambda w: [np.stack(sat_partition(w, 2, [1, 1, 1]))],
    ),
    "sat: model parallel, grouped strides [H, K, K]": (
        "(r h d + r k d + r k d) c -> r (h d + k d + k d) c", [(24, 2)], {"r": 2, "h": 2, "k": 1},
        lambda w: [np.stack(sat_partition(w, 2, [4, 2, 2]))],
    ),
    "sat: merge": (
        "r (h d + k d + k d) c -> (r h d + r k d + r k d) c", [(2, 12, 2)], {"h": 2, "k": 1},
        lambda w: [cat(w[0][:6], w[1][:6], w[0][6:9], w[1][6:9], w[0][9:], w[1][9:])],
    ),
    "qwen: three equal parts": ("(three p) i -> three p i", [(6, 2)], {"three": 3}, lambda w: [np.stack(np.split(w, 3))]),
    "gpt: columns in three, each transposed": (
        "i (o + o + o) -> o i, o i, o i", [(2, 9)], {}, lambda w: [part.T for part in np.split(w, 3, axis=1)],
    ),
    "gpt, bloom, vit: transposed": ("o i -> i o", [(3, 4)], {}, lambda w: [w.T]),
    "whisper: a convolution gains an axis": ("o i k -> o i 1 k", [(2, 3, 4)], {}, lambda w: [w[:, :, None, :]]),
    "qwenvl, bloom: heads of q, k, v": (
        "(h three d) i -> three (h d) i", [(12, 3)], {"h": 2, "three": 3}, lambda w: [np.stack(heads_first(w, 2))],
    ),
    "qwenvl, bloom: heads of q, k, v, any rank": (
        "(h three d) ... -> three (h d) ...", [(12,)], {"h": 2, "three": 3}, lambda w: [np.stack(heads_first(w, 2))],
    ),
    "bloom: three tensors": (
        "(h (d + d + d)) ... -> (h d) ..., (h d) ..., (h d) ...", [(12, 3)], {"h": 2}, lambda w: heads_first(w, 2),
    ),
    "cogvlm2: class token": ("1 w -> 1 1 w", [(1, 3)], {}, lambda w: [w[None]]),
    "cogvlm2: position embedding": ("n w -> 1 n w", [(4, 3)], {}, lambda w: [w[None]]),
    "glm-n: rotary, even rows first": (
        "(h e two) ... -> (h two e) ...", [(12, 3)], {"h": 2, "two": 2}, lambda w: [evens_first(w, 2)],
    ),
    "glm-n: split, q and k rearranged": (
        "(h e two + k e two + k e two) c -> (h two e) c, (k two e) c, (k e two) c", [(16, 3)], {"h": 2, "k": 1, "two": 2},
        lambda w: [evens_first(w[:8], 2), evens_first(w[8:12], 1), w[12:]],
    ),
    "glm-n: rearranged inside of the fused tensor": (
        "(h e two + k e two + v) c -> (h two e + k two e + v) c", [(16, 3)], {"h": 2, "k": 1, "two": 2, "v": 4},
        lambda w: [cat(evens_first(w[:8], 2), evens_first(w[8:12], 1), w[12:])],
    ),
    "glm-n: gate and up": ("(f + f) c -> f c, f c", [(6, 2)], {}, lambda w: np.split(w, 2)),
    "llama, qwen2_5: single rows of gate and up in turn": (
        "f c, f c -> (f (1 + 1)) c", [(4, 3)] * 2, {}, lambda a, b: [np.stack([a, b], 1).reshape(8, 3)],
    ),
    "deepseek3: q_b": (
        "(h (a + e two)) i -> (h a) i, (h two e) i", [(14, 3)], {"h": 2, "two": 2, "e": 2},
        lambda w: [w.reshape(2, 7, 3)[:, :3].reshape(6, 3), evens_first(w.reshape(2, 7, 3)[:, 3:].reshape(8, 3), 2)],
    ),
    "deepseek3: kv_a": (
        "(c + e two) i -> c i, (two e) i", [(9, 3)], {"two": 2, "e": 2}, lambda w: [w[:5], evens_first(w[5:], 1)],
    ),
    "deepseek3: kv_b": (
        "(h (a + v)) c -> (h a) c, (h v) c", [(10, 3)], {"h": 2, "a": 3},
        lambda w: [w.reshape(2, 5, 3)[:, :3].reshape(6, 3), w.reshape(2, 5, 3)[:, 3:].reshape(4, 3)],
    ),
    "deepseek: rotary part inside of a tensor": (
        "(kv + e two) c -> (kv + two e) c", [(9, 3)], {"kv": 5, "two": 2}, lambda w: [evens_first(w, 1, 5)],
    ),
    "deepseek3: experts' gate and up one after the other": (
        "e f d, e f d -> e (f + f) d", [(3, 4, 2)] * 2, {}, lambda a, b: [cat(a, b, axis=1)],
    ),
    "deepseek3 grouped: transposed gate and up side by side": (
        "e f h, e f h -> e h (f + f)", [(3, 4, 2)] * 2, {}, lambda a, b: [cat(a.transpose(0, 2, 1), b.transpose(0, 2, 1), axis=2)],
    ),
    "telechat2 fusing: q, then all k, then all v": (
        "q c, (k (d + d)) c -> (q + k d + k d) c", [(6, 2), (8, 2)], {"k": 2},
        lambda q, kv: [cat(q, kv[0:2], kv[4:6], kv[2:4], kv[6:8])],
    ),
    "telechat2: biases of experts": ("e o -> 1 e 1 o", [(3, 4)], {}, lambda w: [w[None, :, None, :]]),
    "telechat 52b, mp = 1": (
        "i (three h d) -> (h three d) i", [(2, 12)], {"three": 3, "h": 2},
        lambda w: [w.reshape(2, 3, 2, 2).transpose(2, 1, 3, 0).reshape(12, 2)],
    ),
    "telechat 52b, mp > 1": (
        "i (three m n d) -> (m three n d) i", [(2, 24)], {"three": 3, "m": 2, "n": 2},
        lambda w: [w.reshape(2, 3, 2, 4).transpose(2, 1, 3, 0).reshape(24, 2)],
    ),
    "telechat 52b: gate and up": (
        "i (two m f) -> (m two f) i", [(2, 12)], {"two": 2, "m": 2},
        lambda w: [w.reshape(2, 2, 2, 3).transpose(2, 1, 3, 0).reshape(12, 2)],
    ),
    "wizardcoder: multi-query": ("(q + d + d) ... -> q ..., d ..., d ...", [(8,)], {"d": 1}, lambda w: [w[:6], w[6:7], w[7:]]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPEC)
def test_the_layouts_of_the_families(name: str) -> None:
    text, shapes, dims, formula = SPEC[name]
    layout = parse(text)
    assert layout.flip().flip() == layout
    wide = layout.spread([len(shape) for shape in shapes])
    sizes = wide.solve(shapes, dims.get)
    given = [np.arange(math.prod(shape), dtype=np.int32).reshape(shape) + 1000 * k for k, shape in enumerate(shapes)]
    made = convert(str(wide), sizes, given)
    expected = formula(*given)
    assert len(made) == len(expected)
    for mine, theirs in zip(made, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)
    back = layout.flip().spread([tensor.ndim for tensor in made])
    again = convert(str(back), back.solve([tensor.shape for tensor in made], sizes.get), made)
    for mine, theirs in zip(again, given, strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_layouts_without_sums_are_einops(data: st.DataObject) -> None:
    drawn = data.draw(layouts())
    if "+" in drawn.text or "," in drawn.text:
        names = data.draw(st.permutations(["a", "b", "c", "d"]))
        drawn = Drawn("(a b) c 1 d -> {} ({} 1 {}) {}".format(*names), (), (), {"1": 1, "a": 2, "b": 3, "c": 4, "d": 2})
    left = parse(drawn.text).shapes("left", drawn.sizes)[0]
    given = np.arange(math.prod(left)).reshape(left)
    sides = [_unnest(side) for side in drawn.text.split("->")]
    expected = rearrange(given, "->".join(sides), **{k: n for k, n in drawn.sizes.items() if k != "1"})
    (made,) = convert(drawn.text, drawn.sizes, [given])
    np.testing.assert_array_equal(made, expected, strict=True)


def _unnest(side: str) -> str:
    """Without the parentheses inside of parentheses, which einops does not know and which mean nothing without ``+``."""
    depth, kept = 0, []
    for mark in side:
        depth -= mark == ")"
        kept.append("" if mark in "()" and depth else mark)
        depth += mark == "("
    return "".join(kept)


@settings(deadline=None, max_examples=100)
@given(layouts(smallest=0))
def test_a_layout_is_its_meaning_and_its_flip_undoes_it(drawn: Drawn) -> None:
    given = [np.arange(math.prod(shape)).reshape(shape) + 1000 * k for k, shape in enumerate(drawn.shapes())]
    made = convert(drawn.text, drawn.sizes, given)
    for tensor, where, shape in zip(made, meaning(drawn.text, drawn.sizes), drawn.shapes("right"), strict=True):
        assert tensor.shape == shape
        assert tensor.reshape(-1).tolist() == [1000 * number + at for number, at in where]
    for mine, theirs in zip(convert(str(parse(drawn.text).flip()), drawn.sizes, made), given, strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)
