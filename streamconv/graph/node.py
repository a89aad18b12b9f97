"""The graph of a conversion: leaves are stored tensors, nodes have a static dtype and shape. Names of tensors are unknown here.

A node is evaluated region by region. A region of a node's flat (row-major) output is a `Move`: its source side says which
elements, its destination side where they go in a buffer. Layouts pass moves on to their inputs; other ops are given regions of their
inputs in buffers of their own and turn them into values.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops import Compute, Elementwise, Layout, Op, Rearrange, Reduce, Reshape
from streamconv.notation.axes import parse


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of the file ``path`` (absolute, resolved by the kernel only; or a URL)."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor: raw little-endian row-major bytes, in one extent or in several that follow each other."""

    spec: TensorSpec
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Node:
    """An op applied to inputs. Plain data; nothing here pretends to be a tensor."""

    spec: TensorSpec
    op: Op
    inputs: tuple[AnyNode, ...]


AnyNode = Source | Node


def apply(op: Op, *inputs: AnyNode) -> Node:
    """The node of ``op`` on ``inputs``, with the spec that follows.

    Raises:
        CoverageError: the inputs' shapes or dtypes do not fit the op.
    """
    return Node(op.infer([node.spec for node in inputs]), op, inputs)


def rearrange(op: Rearrange, inputs: tuple[AnyNode, ...]) -> AnyNode:
    """`apply`, without a node where the op changes nothing but the name."""
    if any(node.spec.dtype.is_packed for node in inputs):
        return inputs[0] if len(inputs) == 1 and op.is_identity else rearrange_packed(op, inputs)
    node = apply(op, *inputs)
    return inputs[0] if len(inputs) == 1 and op.is_identity and node.spec == inputs[0].spec else node


def is_wide(node: Node) -> bool:
    """Whether a node is a `Reduce` of many tensors, which as many others may share: who goes through all of these goes below it once."""
    return len(node.inputs) > _MANY and isinstance(node.op, Reduce)


_MANY = 8


def sources(node: AnyNode, visited: set[int] | None = None) -> Iterator[Source]:
    """The leaves below ``node``, left to right, repeated ones once each.

    Args:
        node: what they are below.
        visited: ids of wide nodes, below which nothing is looked for again; those that are found are added.
    """
    ids: set[int] = set()
    visited = set() if visited is None else visited
    stack: list[AnyNode] = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Node):
            if is_wide(node):
                if id(node) in visited:
                    continue
                visited.add(id(node))
            stack.extend(reversed(node.inputs))
        elif id(node) not in ids:
            ids.add(id(node))
            yield node


def extents(node: AnyNode, visited: set[int] | None = None) -> Iterator[Extent]:
    """Where the leaves below ``node`` lie, left to right; see `sources`."""
    for leaf in sources(node, visited):
        yield from leaf.extents


def first_source(node: AnyNode) -> Source | None:
    """The first of `sources`, or None."""
    first = node
    while isinstance(first, Node) and first.inputs:
        first = first.inputs[0]
    return first if isinstance(first, Source) else next(sources(node), None)


def first_extent(node: AnyNode) -> Extent | None:
    """The first of `extents`, or None."""
    first = first_source(node)
    return first.extents[0] if first and first.extents else next(extents(node), None)


def made_of(node: AnyNode) -> Hashable:
    """What two nodes have in common that hold the same bytes since they are made of the same stored ones in the same way."""
    if isinstance(node, Node):
        return node.spec, node.op, tuple(map(made_of, node.inputs))
    return node


@dataclass(frozen=True, slots=True)
class Trace:
    """A region of an output, followed to ``leaf``. ``exact``: its bytes are the leaf's bytes, with no arithmetic on the way."""

    leaf: AnyNode
    move: Move
    exact: bool


def trace(node: AnyNode, move: Move, *, exact: bool = True) -> Iterator[Trace]:
    """Follows a region down to stored tensors, through layouts and elementwise ops; other ops end the way as leaves."""
    if isinstance(node, Node) and isinstance(node.op, Layout):
        for number, piece in node.op.pull(move):
            yield from trace(node.inputs[number], piece, exact=exact)
    elif isinstance(node, Node) and isinstance(node.op, Elementwise):
        yield from trace(node.inputs[0], move, exact=False)
    else:
        yield Trace(node, move, exact and not isinstance(node, Node))


def is_made_whole(node: AnyNode) -> bool:
    """Whether any region of a node takes all that it is made of, so that it is best made at once."""
    if not isinstance(node, Node) or not node.inputs:
        return False
    if isinstance(node.op, Compute):
        specs = [child.spec for child in node.inputs]
        return node.op.reach(1, specs) == [spec.numel for spec in specs]
    return isinstance(node.op, Reduce)


def descend(node: Node, *, beside: bool) -> Iterator[tuple[AnyNode, bool]]:
    """The inputs of a node, and whether they stand beside what its region is followed to: other regions need their values, too."""
    for k, child in enumerate(node.inputs):
        yield child, beside or not (isinstance(node.op, Layout) or (isinstance(node.op, Elementwise) and k == 0))


def shared_values(nodes: Iterable[AnyNode]) -> list[Node]:
    """What of a graph several regions need the value of: the outputs of each `Reduce` that a computation takes."""
    stack: list[tuple[AnyNode, bool]] = [(node, False) for node in nodes]
    visits: set[tuple[int, bool]] = set()
    reductions: dict[int, Node] = {}
    while stack:
        node, beside = stack.pop()
        if not isinstance(node, Node) or (id(node), beside) in visits:
            continue
        visits.add((id(node), beside))
        if beside and isinstance(node.op, Reduce):
            reductions[id(node)] = node
        stack.extend(pair for pair in descend(node, beside=beside) if isinstance(pair[0], Node))
    return list(reductions.values())


def items_of(node: AnyNode) -> AnyNode:
    """A tensor as the items that can be moved one by one: as it is, or, of a packed type, as the bytes that it takes."""
    if not node.spec.dtype.is_packed:
        return node
    if isinstance(node, Node):
        return node.inputs[0]  # which `rearrange_packed` has made it of
    return Source(TensorSpec(DTYPES["uint8"], (node.spec.nbytes,)), node.extents)


def rearrange_packed(op: Rearrange, inputs: Sequence[AnyNode]) -> Node:
    """A layout of tensors whose dtype packs elements into blocks: a look at a layout of their bytes, which moves whole blocks.

    Raises:
        CoverageError: the inputs do not fit, or the layout takes blocks apart.
    """
    dtypes = list(dict.fromkeys(node.spec.dtype for node in inputs))
    if len(dtypes) > 1:
        raise CoverageError(f"tensors of dtypes {', '.join(sorted(map(str, dtypes)))} cannot become one: one of them packs its elements")
    (dtype,) = dtypes
    inner = parse(op.layout).innermost
    cut = next((axis for axis in sorted(inner) if op.sizes[axis] % dtype.block), None) if inner else "..."
    if cut is not None:
        raise CoverageError(f"layout {op.layout!r} takes blocks apart along {cut}: {dtype.packing}, which are moved as a whole")
    sizes = {axis: size // dtype.block * dtype.nbytes if axis in inner else size for axis, size in op.sizes.items()}
    moved = apply(replace(op, sizes=sizes), *map(items_of, inputs))
    return Node(TensorSpec(dtype, op.shape), Reshape(moved.spec.shape), (moved,))
