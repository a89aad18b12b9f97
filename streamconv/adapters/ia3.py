"""IA3: each output of a module is multiplied by a number, or each of its inputs."""

from __future__ import annotations

import math

from streamconv.adapters.kind import Kind, Layer, as_matrix, in_shape
from streamconv.adapters.weights import SCALED, Weights
from streamconv.graph.node import apply
from streamconv.graph.ops import ScaleLines

_SLOT = "ia3_l"


def _merge(layer: Layer, weights: Weights) -> None:
    name, own = f"{layer.module}.weight", layer.take(_SLOT)
    base = weights.find(name, layer.adapter.title, layer.key)
    shape, numel = base.spec.shape, own.spec.numel
    is_line = numel == max(own.spec.shape, default=0) and len(own.spec.shape) > 1
    is_convolution = len(own.spec.shape) > 2
    of_inputs = layer.adapter.names("feedforward_modules", layer.module) if is_convolution else own.spec.shape[0] == 1
    is_turned = False
    if len(shape) == 2 and not is_convolution:
        other = shape[1] if of_inputs else shape[0]
        is_turned = numel == shape[0 if of_inputs else 1] and (numel != other or layer.adapter.is_turned(shape, *shape))
    by_columns = of_inputs != is_turned
    if not is_line or len(shape) < 2 or numel != shape[1 if by_columns else 0]:
        raise layer.refuse(f"{layer.key} is {own.spec}, {name} of SRC {base.spec}: it has no number for each of its lines")
    matrix = as_matrix(base)
    run = math.prod(shape[2:]) if by_columns else 0
    scaled = apply(ScaleLines(matrix.spec.shape, weights.dtype_of(name), run), matrix, in_shape(own, (numel,)))
    weights.set(name, in_shape(scaled, shape), SCALED)
    bias = f"{layer.module}.bias"
    if not of_inputs and bias in weights.entries:
        stored = weights.find(bias, layer.adapter.title, layer.key)
        row = in_shape(stored, (1, numel))
        products = apply(ScaleLines((1, numel), weights.dtype_of(bias), 1), row, in_shape(own, (numel,)))
        weights.set(bias, in_shape(products, stored.spec.shape), SCALED)


KIND = Kind("IA3", frozenset({_SLOT}), _merge, has_scale=False)
