"""LoKr: a Kronecker product of two matrices, each of which is stored or a low-rank product, is added to a weight."""

from __future__ import annotations

from streamconv.adapters.cores import core_factors
from streamconv.adapters.folder import CONFIG
from streamconv.adapters.kind import Kind, Layer, as_matrix, in_shape
from streamconv.adapters.weights import ADDED, Weights
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import AddProducts, Kronecker, Zeros

_FIRST, _SECOND = "lokr_w1", "lokr_w2"
_HALVES = ("_a", "_b")
_CORE = "lokr_t2"


def _merge(layer: Layer, weights: Weights) -> None:
    name = f"{layer.module}.weight"
    base = weights.find(name, layer.adapter.title, layer.key)
    rank, scale = layer.adapter.scale(layer.module, "alpha")
    first, second = (_factor(layer, slot, rank) for slot in (_FIRST, _SECOND))
    matrix = as_matrix(base)
    rows, columns = matrix.spec.shape
    (above, beside), (down, across) = first.spec.shape, second.spec.shape
    if (above * down, beside * across) != (rows, columns):
        raise layer.refuse(f"{layer.key}: {first.spec} times {second.spec} make {above * down} x {beside * across}, {name} is {base.spec}")
    product = apply(Kronecker((rows, columns), (down, across)), first, second)
    merged = apply(AddProducts((rows, columns), weights.dtype_of(name), (0,), scale), matrix, product)
    weights.set(name, in_shape(merged, base.spec.shape), ADDED)


def _factor(layer: Layer, slot: str, rank: int) -> AnyNode:
    """One of the two matrices."""
    if slot in layer:
        return as_matrix(layer.take(slot))
    above, beside = (f"{slot}{half}" for half in _HALVES)
    if slot == _SECOND and _CORE in layer:
        left, right = core_factors(layer, (_CORE, above, beside), rank)
    else:
        left, right = layer.take(above), layer.take(beside)
    if len(left.spec.shape) != 2 or len(right.spec.shape) != 2 or left.spec.shape[1] != rank or right.spec.shape[0] != rank:
        raise layer.refuse(f"{layer.key}: {left.spec} and {right.spec} are no factors of rank {rank}, which it is by {CONFIG}")
    shape = (left.spec.shape[0], right.spec.shape[1])
    return apply(AddProducts(shape, "float32", (rank,), 1.0), apply(Zeros("float32", shape)), left, right)


_SLOTS = frozenset(f"{slot}{half}" for slot in (_FIRST, _SECOND) for half in ("", *_HALVES))
KIND = Kind("LOKR", _SLOTS | {_CORE}, _merge)
