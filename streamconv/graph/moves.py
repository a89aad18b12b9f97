"""Strided moves: the one form into which every rearrangement is evaluated.

A `Move` says which elements of a flat tensor go where: for each index of a small box of ``sizes``, element
``src + index . src_strides`` goes to ``dst + index . dst_strides``. A layout is evaluated on a move, not on data: `pull`
follows a region of an output back to the same elements in the inputs. What is contiguous on both sides afterwards is a run
that the kernel can copy; the rest is evaluated in tiles. Both come from the same moves.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from streamconv.notation.axes import Axis, Leaf, Parts, Place, Tree


@dataclass(frozen=True, slots=True)
class Move:
    """A strided correspondence, in elements. Strides of the destination are in the order of ``sizes``."""

    sizes: tuple[int, ...]
    dst: int
    dst_strides: tuple[int, ...]
    src: int
    src_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def simplify(self) -> Move:
        """The same move with as few axes as possible, the destination's largest stride first."""
        sizes, dst_strides, src_strides = _simplified(self.sizes, self.dst_strides, self.src_strides)
        return Move(sizes, self.dst, dst_strides, self.src, src_strides)

    @property
    def run(self) -> int:
        """Elements that are contiguous on both sides (of a simplified move: its innermost axis, if that is dense)."""
        if not self.sizes:
            return 1
        return self.sizes[-1] if self.dst_strides[-1] == self.src_strides[-1] == 1 else 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """(dst, src) of every run of a simplified move, destination ascending where its strides allow."""
        outer = len(self.sizes) - (1 if self.run > 1 else 0)
        for index in itertools.product(*map(range, self.sizes[:outer])):
            yield (
                self.dst + sum(map(int.__mul__, index, self.dst_strides)),
                self.src + sum(map(int.__mul__, index, self.src_strides)),
            )

    def tiles(self, tile: tuple[int, ...]) -> Iterator[Move]:
        """The move cut into boxes of at most ``tile`` indices along each axis, in the order of their sources."""
        order = sorted(range(len(tile)), key=lambda k: -self.src_strides[k])
        for start in itertools.product(*(range(0, self.sizes[k], tile[k]) for k in order)):
            at = dict(zip(order, start, strict=True))
            yield Move(
                tuple(min(t, self.sizes[k] - at[k]) for k, t in enumerate(tile)),
                self.dst + sum(at[k] * d for k, d in enumerate(self.dst_strides)),
                self.dst_strides,
                self.src + sum(at[k] * s for k, s in enumerate(self.src_strides)),
                self.src_strides,
            )


@lru_cache(maxsize=1024)
def _simplified(
    sizes: tuple[int, ...], dst_strides: tuple[int, ...], src_strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of `Move.simplify`, which are those of the next layer, too: sizes and strides."""
    axes = sorted(
        ((d, s, n) for n, d, s in zip(sizes, dst_strides, src_strides, strict=True) if n != 1),
        key=lambda axis: (-axis[0], -axis[1]),
    )
    simple: list[tuple[int, int, int]] = []
    for d, s, n in axes:
        if simple and simple[-1][0] == d * n and simple[-1][1] == s * n:
            simple[-1] = (d, s, n * simple[-1][2])
        else:
            simple.append((d, s, n))
    return tuple(n for _, _, n in simple), tuple(d for d, _, _ in simple), tuple(s for _, s, _ in simple)


def identity(numel: int, start: int = 0) -> Move:
    """All of a flat tensor of ``numel`` elements onto itself, ``start`` elements further into the source."""
    return Move((numel,), 0, (1,), start, (1,))


def region(move: Move) -> Move:
    """The destination side of ``move`` as a region of its own tensor, packed in the order of its axes."""
    return Move(move.sizes, 0, packed_strides(move.sizes), move.dst, move.dst_strides)


def packed(move: Move) -> Move:
    """The elements that a move takes, into a buffer of their own, packed in the order of its axes."""
    return Move(move.sizes, 0, packed_strides(move.sizes), move.src, move.src_strides)


def packed_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major buffer of these sizes."""
    strides, stride = [], 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


@dataclass(slots=True)
class _State:
    """A move on its way down a tree: what of ``src`` is still to be resolved, and the digits found so far.

    ``axes`` holds [size, dst stride, remaining src stride]; ``digits`` maps an axis name to the position at the move's
    origin and to the steps that each of the move's axes takes along it.
    """

    tree: Tree
    dst: int
    src: int
    axes: list[tuple[int, int, int]]
    digits: dict[str, tuple[int, tuple[int, ...]]]


def pull(tree: Tree, move: Move) -> Iterator[tuple[int, Move, dict[str, tuple[int, tuple[int, ...]]]]]:
    """Resolves ``move.src`` into the digits of ``tree``.

    Yields (alternative, move, digits) pieces that together cover the move; in each piece a digit is affine in the move's
    indices. A move that is aligned with the tree comes out in one piece; others are cut, at worst down to single indices.
    """
    stack = [_State(tree, move.dst, move.src, list(zip(move.sizes, move.dst_strides, move.src_strides, strict=True)), {})]
    if 0 in move.sizes:
        return
    while stack:
        state = stack.pop()
        if isinstance(state.tree, Leaf):
            sizes, strides = tuple(n for n, _, _ in state.axes), tuple(d for _, d, _ in state.axes)
            yield state.tree.alternative, Move(sizes, state.dst, strides, 0, (0,) * len(sizes)), state.digits
        elif isinstance(state.tree, Parts):
            stack.extend(_enter_part(state, state.tree))
        else:
            stack.extend(_enter_axis(state, state.tree))


def _enter_part(state: _State, parts: Parts) -> list[_State]:
    """The state inside the one part it lies in, or cut in two along its largest stride."""
    number = bisect_right(parts.offsets, state.src) - 1
    span = sum((n - 1) * s for n, _, s in state.axes)
    end = parts.offsets[number + 1] if number + 1 < len(parts.offsets) else None
    if end is None or state.src + span < end:
        return [_State(parts.children[number], state.dst, state.src - parts.offsets[number], state.axes, state.digits)]
    largest = max((k for k, (n, _, _) in enumerate(state.axes) if n > 1), key=lambda k: state.axes[k][2])
    n, _, s = state.axes[largest]
    others = span - (n - 1) * s
    return _cut(state, largest, max(1, (end - 1 - state.src - others) // s + 1))


def _enter_axis(state: _State, axis: Axis) -> list[_State]:
    """The state below ``axis``, or the state cut so that its pieces do not carry into that digit."""
    stride = axis.stride
    inner = [(s, k) for k, (n, _, s) in enumerate(state.axes) if s % stride and n > 1]
    if any(s > stride for s, _ in inner):
        return _cut(state, max(inner)[1], 1)
    span = sum((state.axes[k][0] - 1) * s for s, k in inner)
    if state.src % stride + span >= stride:
        return _align(state, stride, *max(inner), span)
    steps = tuple(0 if s % stride else s // stride for _, _, s in state.axes)
    axes = [(n, d, s if s % stride else 0) for n, d, s in state.axes]
    digits = {**state.digits, axis.name: (state.src // stride, steps)}
    return [_State(axis.child, state.dst, state.src % stride, axes, digits)]


def _align(state: _State, stride: int, s: int, largest: int, span: int) -> list[_State]:
    """Cuts the axis of src stride ``s``, which carries into a digit of ``stride``, at the digit's boundaries."""
    n, d, _ = state.axes[largest]
    others = span - (n - 1) * s
    start = state.src % stride
    if stride % s or start % s + others >= s:
        return _cut(state, largest, max(1, min(n - 1, (stride - 1 - start - others) // s + 1)))
    per = stride // s
    head = min(n, per - start // s) if start // s else 0
    if head:
        return _cut(state, largest, head) if head < n else [state]
    groups = n // per
    if groups * per < n:
        return _cut(state, largest, groups * per)
    axes = [*state.axes[:largest], (groups, d * per, stride), (per, d, s), *state.axes[largest + 1 :]]
    digits = {name: (at, (*k[:largest], k[largest] * per, k[largest], *k[largest + 1 :])) for name, (at, k) in state.digits.items()}
    return [_State(state.tree, state.dst, state.src, axes, digits)]


def _cut(state: _State, axis: int, at: int) -> list[_State]:
    """The state in two pieces along ``axis``, the second first (they go onto a stack)."""
    n, d, s = state.axes[axis]
    pieces = []
    for start, size in ((at, n - at), (0, at)):
        if size < 1:
            continue
        axes = [*state.axes[:axis], (size, d, s), *state.axes[axis + 1 :]]
        digits = {name: (first + start * k[axis], k) for name, (first, k) in state.digits.items()}
        pieces.append(_State(state.tree, state.dst + start * d, state.src + start * s, axes, digits))
    return pieces


def place(piece: Move, digits: dict[str, tuple[int, tuple[int, ...]]], where: Place) -> Move:
    """The piece with its source set to where its digits lie in ``where``'s tensor."""
    strides = [0] * len(piece.sizes)
    src = where.offset
    for name, (first, steps) in digits.items():
        unit = where.strides[name]
        src += first * unit
        for k, step in enumerate(steps):
            strides[k] += step * unit
    return Move(piece.sizes, piece.dst, piece.dst_strides, src, tuple(strides))


def split_stack(move: Move, count: int, numel: int) -> Iterator[tuple[int, Move]]:
    """A move whose source is ``count`` equal tensors of ``numel`` elements one after the other, cut so that each piece reads one."""
    if count == 1:
        yield 0, move
        return
    number, start = divmod(move.src, numel)
    axis = next((k for k, (n, s) in enumerate(zip(move.sizes, move.src_strides, strict=True)) if s == numel and n > 1), None)
    span = sum((n - 1) * s for k, (n, s) in enumerate(zip(move.sizes, move.src_strides, strict=True)) if k != axis)
    if axis is not None and start + span < numel and 0 not in move.sizes:  # one after the other, as most are
        sizes, step = (*move.sizes[:axis], 1, *move.sizes[axis + 1 :]), move.dst_strides[axis]
        for k in range(move.sizes[axis]):
            yield number + k, Move(sizes, move.dst + k * step, move.dst_strides, start, move.src_strides)
        return
    parts = Parts(tuple(range(0, count * numel, numel)), tuple(Axis("at", 1, Leaf(k)) for k in range(count)))
    for number, piece, digits in pull(parts, move):
        yield number, place(piece, digits, Place(0, 0, {"at": 1}))
