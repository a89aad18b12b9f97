"""Convolutions whose kernel is a core, contracted with a matrix for its outputs and one for its inputs (``use_effective_conv2d``)."""

from __future__ import annotations

import math

from streamconv.adapters.folder import CONFIG
from streamconv.adapters.kind import Layer, in_shape
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import AddProducts, Strided, Zeros
from streamconv.schemes.beside import transpose


def core_factors(layer: Layer, slots: tuple[str, str, str], rank: int) -> tuple[AnyNode, AnyNode]:
    """The factors of a kernel as a matrix: (outputs, rank), and (rank, inputs * places), which is small.

    Args:
        slots: of the core, (rank, rank, places ..), of (rank, outputs) and of (rank, inputs).
        rank: of the layer.

    Raises:
        CoverageError: their shapes are others.
    """
    core, left, right = (layer.take(slot) for slot in slots)
    ranks = (*core.spec.shape[:2], *left.spec.shape[:1], *right.spec.shape[:1])
    if len(core.spec.shape) < 3 or len(left.spec.shape) != 2 or len(right.spec.shape) != 2 or ranks != (rank,) * 4:
        shapes = ", ".join(str(node.spec) for node in (core, left, right))
        raise layer.refuse(f"{layer.keys[slots[0]]}: {shapes} are no core and factors of rank {rank}, which it is by {CONFIG}")
    inputs, places = right.spec.shape[1], math.prod(core.spec.shape[2:])
    shape = (rank, inputs, places)
    every = apply(Strided((rank, inputs, rank), (0, 1, inputs)), right)
    inner = AddProducts(shape, "float32", (rank,), 1.0)
    contracted = apply(inner, apply(Zeros("float32", shape)), every, in_shape(core, (rank, rank, places)))
    return transpose(left), in_shape(contracted, (rank, inputs * places))
