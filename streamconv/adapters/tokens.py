"""Rows of an embedding that were trained by themselves (``trainable_token_indices``), and adapters that have nothing else."""

from __future__ import annotations

from streamconv.adapters.folder import CONFIG
from streamconv.adapters.kind import Kind, Layer
from streamconv.adapters.weights import REPLACED, Weights
from streamconv.errors import UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Cast, Rows
from streamconv.graph.views import join_rows

SLOTS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
_KEYS = ("trainable_token_indices", "token_indices")


def merge_tokens(layer: Layer, weights: Weights) -> None:
    """Puts the rows of a layer into its embedding.

    Raises:
        UsageError: the config does not say which rows they are.
        CoverageError: they do not fit.
    """
    slot = next(slot for slot in SLOTS if slot in layer)
    name, own = f"{layer.module}.weight", layer.take(slot)
    base = weights.find(name, layer.adapter.title, layer.key)
    numbers = _numbers(layer)
    if own.spec.shape != (len(numbers), *base.spec.shape[1:]) or not all(0 <= number < base.spec.shape[0] for number in numbers):
        raise layer.refuse(f"{layer.key} is {own.spec}, for rows {numbers[:5]} of {name} {base.spec}: they do not fit")
    dtype = base.spec.dtype
    rows = own if own.spec.dtype == dtype else apply(Cast(dtype.name), own)
    weights.set(name, _with_rows(base, rows, numbers), REPLACED)


def _numbers(layer: Layer) -> list[int]:
    """Which rows a layer has."""
    for key in _KEYS:
        value = layer.adapter.config.get(key)
        if isinstance(value, dict):
            value = next((own for module, own in value.items() if f".{layer.module}".endswith(f".{module}")), None)
        if isinstance(value, list) and all(type(number) is int for number in value) and len(set(value)) == len(value):
            return value
    raise UsageError(f"{layer.adapter.title}: {layer.key}: {_KEYS[0]} of {CONFIG} does not say which rows these are: mend it")


def _with_rows(base: AnyNode, own: AnyNode, numbers: list[int]) -> AnyNode:
    """A matrix with others in the place of some rows; neighbours go together."""
    count, columns = base.spec.shape
    parts: list[AnyNode] = []
    start, place = 0, {number: k for k, number in enumerate(numbers)}
    order = sorted(numbers)
    k = 0
    while k < len(order):
        first, length = order[k], 1
        while k + length < len(order) and order[k + length] == first + length and place[first + length] == place[first] + length:
            length += 1
        if first > start:
            parts.append(apply(Rows(start, first, columns), base))
        parts.append(apply(Rows(place[first], place[first] + length, columns), own))
        start, k = first + length, k + length
    if start < count:
        parts.append(apply(Rows(start, count, columns), base))
    return join_rows(parts)


def _merge(layer: Layer, weights: Weights) -> None:
    merge_tokens(layer, weights)


KIND = Kind("TRAINABLE_TOKENS", frozenset(SLOTS), _merge, has_scale=False)
