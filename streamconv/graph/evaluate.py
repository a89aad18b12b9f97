"""Evaluation of a region of a node into memory, within a fixed arena; one implementation for tiles of any shape.

``arena_bytes`` is the other half of ``evaluate``: the most that it takes. Memory is bounded by construction, not by estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from streamconv.graph.arena import Arena, round_up, round_up_placed
from streamconv.graph.copying import block_bytes, copy_strided
from streamconv.graph.gather import Read, gather, reads_of, scratch_of
from streamconv.graph.moves import Move, identity, packed
from streamconv.graph.node import AnyNode, Node, descend, is_wide, items_of
from streamconv.graph.ops import Compute, Elementwise, Layout, Reduce, Values
from streamconv.graph.reductions import value_of

if TYPE_CHECKING:
    from streamconv.graph.arena import Array

_SMALL = 1 << 10  # bytes of a value that is kept, whether or not another needs it
COMPARE = 1 << 20  # bytes of each side that are compared at a time
Expect = Callable[[Iterable[tuple[str, int, int]]], None]
"""Is told what will be read next: path, offset and bytes."""


def arena_bytes(node: AnyNode, tile: int, *, scattered: bool = False) -> int:
    """Bytes of arena that evaluating ``tile`` bytes of ``node`` takes at most, the tile's own included.

    Regions of a node that nothing rearranges are contiguous, as its tiles are, unless ``scattered`` says that any will be asked for.
    """
    numel = max(1, tile // node.spec.dtype.itemsize)
    return round_up_placed(numel * node.spec.dtype.itemsize) + _below(node, numel, scattered=scattered)


def _below(node: AnyNode, numel: int, *, scattered: bool = False) -> int:
    """What evaluating ``numel`` elements takes beside their own buffer; scattered ones are picked from spans."""
    if not isinstance(node, Node):
        return scratch_of(numel * node.spec.dtype.itemsize) if scattered else 0
    op = node.op
    if isinstance(op, Layout):
        one_of_each = {made_alike(child): child for child in node.inputs}  # of hundreds of experts
        return max((_below(child, numel, scattered=True) for child in one_of_each.values()), default=0)
    if isinstance(op, Reduce):
        return _below_wide(node, op) if is_wide(node) else _below_reduce(node, op)
    assert isinstance(op, Compute)
    specs = [child.spec for child in node.inputs]
    parts = list(zip(node.inputs, op.reach(numel, specs), strict=True))
    alike = [scattered or not (isinstance(op, Elementwise) and k == 0) for k in range(len(parts))]  # other regions may be of any kind
    below = max((_below(child, count, scattered=kind) for (child, count), kind in zip(parts, alike, strict=True)), default=0)
    return below + op.scratch(specs) + sum(round_up_placed(count * child.spec.dtype.itemsize) for child, count in parts)


def _below_reduce(node: Node, op: Reduce) -> int:
    """The same of a `Reduce`, which reads its inputs in order, whatever region is wanted."""
    buffers = op.buffers([child.spec for child in node.inputs])
    below = max(_below(child, buffers[0][0]) for child in node.inputs)
    return below + sum(round_up(count * itemsize) for count, itemsize in buffers) + block_bytes()


_wide: WeakKeyDictionary[Node, int] = WeakKeyDictionary()


def _below_wide(node: Node, op: Reduce) -> int:
    """The same, found once for all that share a node."""
    nbytes = _wide.get(node)
    if nbytes is None:
        nbytes = _wide[node] = _below_reduce(node, op)
    return nbytes


def made_alike(node: AnyNode) -> Hashable:
    """What nodes have in common that take as much to evaluate, wherever what they are made of is stored; wide ones have nothing."""
    if not isinstance(node, Node):
        return node.spec
    return node if is_wide(node) else (node.spec, node.op, tuple(map(made_alike, node.inputs)))


def evaluate(node: AnyNode, move: Move, out: Array, arena: Arena, read: Read) -> None:
    """Writes the region ``move`` of ``node`` into the flat array ``out``. Of infinities and NaNs in it numpy does not warn."""
    with np.errstate(all="ignore"):
        _evaluate(node, move, out, arena, read, beside=False)


def _evaluate(node: AnyNode, move: Move, out: Array, arena: Arena, read: Read, *, beside: bool) -> None:
    """The same; ``beside``: of what other regions need, too."""
    if not isinstance(node, Node):
        gather(node, move, out, arena, read)
        return
    mark, op = arena.mark, node.op
    if isinstance(op, Layout):
        for number, piece in op.pull(move):
            _evaluate(node.inputs[number], piece, out, arena, read, beside=beside)
    elif isinstance(op, Reduce):
        overflowed = arena.overflowed
        if beside or _is_kept(node):

            def make() -> tuple[Array, int]:
                value = _reduce(node, op, arena, read).copy()
                return value, arena.overflowed - overflowed

            value, count = value_of(node, make)
            arena.overflowed = overflowed + (0 if beside else count)  # the same values are counted where they are written
        else:
            value = _reduce(node, op, arena, read)
        copy_strided(out[move.dst :], value[move.src :], list(zip(move.sizes, move.dst_strides, move.src_strides, strict=True)), arena)
    else:
        assert isinstance(op, Compute)
        for part in op.cut(move, [child.spec for child in node.inputs]):
            within = arena.mark
            _compute(node, op, part, out, arena, read, beside=beside)
            arena.release(within)
    arena.release(mark)


def _compute(node: Node, op: Compute, move: Move, out: Array, arena: Arena, read: Read, *, beside: bool) -> None:
    """Has an op fill a region of its output, wherever that lies, from regions of its inputs in buffers of their own."""
    overflowed, region = arena.overflowed, packed(move)
    parts = []
    needs = op.needs(region, [child.spec for child in node.inputs])
    for (child, is_beside), input_region in zip(descend(node, beside=beside), needs, strict=True):
        first = next(reads(child, packed(input_region), beside=is_beside), ("", None, 0))
        part = arena.take(input_region.numel, child.spec.dtype.itemsize, first[1])
        _evaluate(child, packed(input_region), part, arena, read, beside=is_beside)
        parts.append(Values(part.reshape(input_region.sizes), child.spec.dtype))
    if not isinstance(op, Elementwise):  # which may ask for the same values again and again
        arena.overflowed = overflowed
    strides = [stride * out.itemsize for stride in move.dst_strides]
    target: Array = np.ndarray(move.sizes, out.dtype, out, move.dst * out.itemsize, strides)
    arena.overflowed += op.values(region, parts, Values(target, node.spec.dtype))
    if beside:
        return
    made = Values(target, node.spec.dtype)
    for loss in (op.change(region, parts, made), op.loss(region, parts, made) if arena.measures else None):
        if loss:
            arena.loss = arena.loss + loss if arena.loss else loss


def _is_kept(node: Node) -> bool:
    """Whether a `Reduce` is made once, though it is an output itself: codes are likely made of it, and several outputs the same."""
    return node.spec.nbytes <= _SMALL


def _reduce(node: Node, op: Reduce, arena: Arena, read: Read) -> Array:
    """All of a node's output, in the arena."""
    specs = [child.spec for child in node.inputs]
    buffers = [arena.take(count, itemsize) for count, itemsize in op.buffers(specs)]

    def fetch(number: int, start: int, part: Array) -> None:
        _evaluate(node.inputs[number], identity(len(part), start), part, arena, read, beside=True)

    op.reduce(specs, fetch, buffers)
    return buffers[-1]


def reads(node: AnyNode, move: Move, *, beside: bool = False) -> Iterator[tuple[str, int, int]]:
    """What evaluating the region ``move`` reads, in that order: path, offset and bytes; less what is read once for many regions."""
    if not isinstance(node, Node):
        yield from reads_of(node, move)
    elif isinstance(node.op, Layout):
        for number, piece in node.op.pull(move):
            yield from reads(node.inputs[number], piece, beside=beside)
    elif isinstance(node.op, Compute) or not (beside or _is_kept(node)):
        specs = [child.spec for child in node.inputs]
        children = list(descend(node, beside=beside))
        for part in node.op.cut(move, specs) if isinstance(node.op, Compute) else [move]:
            regions = node.op.needs(packed(part), specs) if isinstance(node.op, Compute) else [identity(spec.numel) for spec in specs]
            for (child, is_beside), region in zip(children, regions, strict=True):
                yield from reads(child, region, beside=is_beside)


def kinds(nodes: Iterable[AnyNode]) -> Iterator[Node]:
    """A node of each kind and dtypes that there are among these and below."""
    stack, visited, wide = list(nodes), set(), set[int]()
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and id(node) not in wide:
            if is_wide(node):
                wide.add(id(node))
            stack.extend(node.inputs)
            key = (node.op.kind, node.spec.dtype, *(child.spec.dtype for child in node.inputs))
            if key not in visited:
                visited.add(key)
                yield node


def prepare(nodes: Iterable[AnyNode]) -> None:
    """Loads what evaluating these nodes needs, so that measuring the process afterwards counts it."""
    for node in kinds(nodes):
        node.op.prepare([child.spec for child in node.inputs])


def same_bytes(left: AnyNode, right: AnyNode, arena: Arena, read: Read, expect: Expect = lambda _: None) -> bool:
    """Whether two nodes hold the same bytes. The arena has room for evaluating them and for `COMPARE` bytes of each."""
    if left.spec != right.spec:
        return False
    left, right = items_of(left), items_of(right)
    itemsize, mark = left.spec.dtype.itemsize, arena.mark
    step = COMPARE // itemsize
    for start in range(0, left.spec.numel, step):
        count = min(step, left.spec.numel - start)
        parts = []
        ahead = [identity(count if isinstance(node, Node) else left.spec.numel - start, start) for node in (left, right)]
        expect(itertools.chain(reads(left, ahead[0]), reads(right, ahead[1])))
        for node in (left, right):
            part = arena.take(count, itemsize)
            evaluate(node, identity(count, start), part, arena, read)
            parts.append(part)
        equal = bool(np.array_equal(parts[0], parts[1]))
        arena.release(mark)
        if not equal:
            return False
    return True
