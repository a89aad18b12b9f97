"""LoHa: the elementwise product of two low-rank products is added to a weight."""

from __future__ import annotations

from streamconv.adapters.folder import CONFIG
from streamconv.adapters.kind import Kind, Layer, as_matrix, in_shape
from streamconv.adapters.weights import ADDED, Weights
from streamconv.graph.node import apply
from streamconv.graph.ops import AddProducts

_SLOTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _merge(layer: Layer, weights: Weights) -> None:
    name = f"{layer.module}.weight"
    factors = [layer.take(slot) for slot in _SLOTS]
    base = weights.find(name, layer.adapter.title, layer.key)
    rank, scale = layer.adapter.scale(layer.module, "alpha")
    matrix = as_matrix(base)
    rows, columns = matrix.spec.shape
    if [node.spec.shape for node in factors] != [(rows, rank), (rank, columns)] * 2:
        shapes = ", ".join(str(node.spec) for node in factors)
        raise layer.refuse(f"{layer.key}: {shapes} are no factors of {name} {base.spec}, or its rank is not {rank}, as {CONFIG} says")
    merged = apply(AddProducts((rows, columns), weights.dtype_of(name), (rank, rank), scale), matrix, *factors)
    weights.set(name, in_shape(merged, base.spec.shape), ADDED)


KIND = Kind("LOHA", frozenset(_SLOTS), _merge)
