"""LoRA, with all that changes its numbers: scales, magnitudes (DoRA), embeddings, convolutions, biases, parameters of experts."""

from __future__ import annotations

import math

from streamconv.adapters.folder import CONFIG, Adapter
from streamconv.adapters.kind import Kind, Layer, as_matrix, in_shape
from streamconv.adapters.parameters import is_parameter, merge_parameter
from streamconv.adapters.weights import ADDED, Weights
from streamconv.errors import UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import AddProducts, ColumnNorms, Magnify
from streamconv.schemes.beside import transpose

DOWN, UP, BIAS, MAGNITUDE = "lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"
_OF_WORDS = {DOWN: "lora_embedding_A", UP: "lora_embedding_B"}
_OTHERS = ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "use_qalora")
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "true", "false", "mica", "lora_ga", None)
_TWICE = "mica"  # an init whose products are rounded before they are added


def _check(adapter: Adapter) -> None:
    for key in _OTHERS:
        if adapter.config.get(key):
            raise adapter.refuse(key)
    init = adapter.config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        way = "save it with path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        raise UsageError(f"{adapter.title}: init_lora_weights {init!r} changes the base's own weights: {way}")


def _merge(layer: Layer, weights: Weights) -> None:
    if is_parameter(layer, weights):
        merge_parameter(layer, weights)
        return
    name, is_embedding = f"{layer.module}.weight", _OF_WORDS[DOWN] in layer or _OF_WORDS[UP] in layer
    slots = _OF_WORDS if is_embedding else {DOWN: DOWN, UP: UP}
    down, up = layer.take(slots[DOWN]), layer.take(slots[UP])
    base = weights.find(name, layer.adapter.title, layer.key)
    named = f"{layer.module}.weight" if layer.adapter.names("target_parameters", name) else layer.module
    rank, scale = layer.adapter.scale(named, "lora_alpha")
    if down.spec.shape[0] != rank or len(up.spec.shape) < 2 or up.spec.shape[1] != rank:
        raise layer.refuse(f"{layer.keys[slots[DOWN]]} is {down.spec}: its rank is {rank} by {CONFIG}")
    down, up = as_matrix(down), as_matrix(in_shape(up, (up.spec.shape[0], math.prod(up.spec.shape[1:]))))
    outputs, inputs, shape = up.spec.shape[0], down.spec.shape[1], base.spec.shape
    is_turned = is_embedding or layer.adapter.is_turned(shape, outputs, inputs)
    rows, columns = (inputs, outputs) if is_turned else (outputs, inputs)
    if shape[:1] != (rows,) or math.prod(shape[1:]) != columns:
        what = f"{layer.keys[slots[DOWN]]} {down.spec} and {up.spec} make {outputs} x {inputs}"
        raise layer.refuse(f"{what}, {name} of SRC is {base.spec}")
    if is_turned:
        down, up = transpose(up), transpose(down)
    dtype = weights.dtype_of(name)
    is_rounded = is_embedding or layer.adapter.config.get("init_lora_weights") == _TWICE or named != layer.module
    through = dtype if is_rounded and dtype == base.spec.dtype.name else ""
    merged = _magnified(layer, as_matrix(base), up, down, scale, dtype, is_turned=is_turned) or apply(
        AddProducts((rows, columns), dtype, (rank,), scale, through), as_matrix(base), up, down
    )
    weights.set(name, in_shape(merged, shape), ADDED)
    if BIAS in layer:
        _merge_bias(layer, weights, scale)


def _magnified(layer: Layer, base: AnyNode, up: AnyNode, down: AnyNode, scale: float, dtype: str, *, is_turned: bool) -> AnyNode | None:
    """A weight with the magnitudes that an adapter has for its rows, or columns; None: it has none.

    Raises:
        CoverageError: it should have some, or should not, or of another length.
    """
    wants = bool(layer.adapter.config.get("use_dora"))
    if wants != (MAGNITUDE in layer):
        what = (
            "has no magnitude beside it, which use_dora asks for" if wants else f"has a magnitude beside it ({MAGNITUDE}) without use_dora"
        )
        raise layer.refuse(f"{layer.key} {what}: mend {CONFIG}, or save the adapter again")
    if not wants:
        return None
    magnitude = layer.take(MAGNITUDE)
    (rows, columns), rank = base.spec.shape, down.spec.shape[0]
    if magnitude.spec.numel != (columns if is_turned else rows):
        raise layer.refuse(f"{layer.keys[MAGNITUDE]} is {magnitude.spec}, a magnitude for each output of {[rows, columns]}")
    if not is_turned:
        return apply(Magnify((rows, columns), dtype, (rank,), scale), base, up, down, magnitude)
    norms = apply(ColumnNorms(), apply(AddProducts((rows, columns), "float32", (rank,), scale), base, up, down))
    return apply(Magnify((rows, columns), dtype, (rank,), scale, columns=True), base, up, down, magnitude, norms)


def _merge_bias(layer: Layer, weights: Weights, scale: float) -> None:
    name, own = f"{layer.module}.bias", layer.take(BIAS)
    base = weights.find(name, layer.adapter.title, layer.keys[BIAS])
    if own.spec.shape != base.spec.shape:
        raise layer.refuse(f"{layer.keys[BIAS]} is {own.spec}, {name} of SRC {base.spec}")
    row = (1, base.spec.numel)
    added = apply(AddProducts(row, weights.dtype_of(name), (0,), scale), in_shape(base, row), in_shape(own, row))
    weights.set(name, in_shape(added, base.spec.shape), ADDED)


KIND = Kind("LORA", frozenset({DOWN, UP, BIAS, MAGNITUDE, *_OF_WORDS.values()}), _merge, _check)
