"""LoHa: the elementwise product of two low-rank products is added to a weight."""

from __future__ import annotations

from streamconv.adapters.cores import core_factors
from streamconv.adapters.folder import CONFIG
from streamconv.adapters.kind import Kind, Layer, as_matrix, in_shape
from streamconv.adapters.weights import ADDED, Weights
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import AddProducts

_SLOTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def _merge(layer: Layer, weights: Weights) -> None:
    name = f"{layer.module}.weight"
    base = weights.find(name, layer.adapter.title, layer.key)
    rank, scale = layer.adapter.scale(layer.module, "alpha")
    factors = _factors(layer, rank)
    matrix = as_matrix(base)
    rows, columns = matrix.spec.shape
    if [node.spec.shape for node in factors] != [(rows, rank), (rank, columns)] * 2:
        shapes = ", ".join(str(node.spec) for node in factors)
        raise layer.refuse(f"{layer.key}: {shapes} are no factors of {name} {base.spec}, or its rank is not {rank}, as {CONFIG} says")
    merged = apply(AddProducts((rows, columns), weights.dtype_of(name), (rank, rank), scale), matrix, *factors)
    weights.set(name, in_shape(merged, base.spec.shape), ADDED)


def _factors(layer: Layer, rank: int) -> list[AnyNode]:
    """Those of both products."""
    if not any(core in layer for core in _CORES):
        return [layer.take(slot) for slot in _SLOTS]
    first = core_factors(layer, (_CORES[0], *_SLOTS[:2]), rank)
    second = core_factors(layer, (_CORES[1], *_SLOTS[2:]), rank)
    return [*first, *second]


KIND = Kind("LOHA", frozenset({*_SLOTS, *_CORES}), _merge)
