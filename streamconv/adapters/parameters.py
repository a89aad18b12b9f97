"""LoRA of parameters (``target_parameters``): of fused experts, each of which has matrices of its own in PEFT's order of axes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from streamconv.adapters.folder import CONFIG, PREFIX, WRAPPER
from streamconv.adapters.kind import Layer
from streamconv.adapters.weights import ADDED, Weights
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import AddProducts, Reshape, Strided
from streamconv.schemes.beside import transpose
from streamconv.schemes.orientation import MARKED, is_of

_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")  # as modules define their parameters
_SINCE = (0, 19)  # versions of peft before this took inputs to come first in any model


def is_parameter(layer: Layer, weights: Weights) -> bool:
    """Whether a layer is for a parameter that is no module's weight."""
    return f"{layer.module}.weight" not in weights.entries and bool(_parameters(layer, weights))


def merge_parameter(layer: Layer, weights: Weights) -> None:
    """Adds the products of a layer to the parameter that they fit; of several, the wrappers inside are for those that come first.

    Raises:
        CoverageError: they fit none.
    """
    down, up = layer.take("lora_A"), layer.take("lora_B")
    fitting = [name for name in _parameters(layer, weights) if _fits(weights.entries[name], up, down)]
    if not fitting:
        names = ", ".join(f"{name} {weights.entries[name].spec}" for name in _parameters(layer, weights))
        raise layer.refuse(f"{layer.key}: {down.spec} and {up.spec} fit none of {names}")
    name = fitting[0 if len(fitting) == 1 else min(len(fitting) - 1, _place(layer))]
    base = weights.find(name, layer.adapter.title, layer.key)
    rank, scale = layer.adapter.scale(name, "lora_alpha")
    experts, *_ = shape = base.spec.shape
    outputs, inputs = up.spec.shape[0], down.spec.shape[1]
    if down.spec.shape[0] != experts * rank or up.spec.shape[1] != experts * rank:
        raise layer.refuse(f"{layer.key} is {down.spec}, of {experts} experts: its rank is {rank} by {CONFIG}")
    downs: AnyNode = apply(Reshape((experts, rank, inputs)), down)
    ups: AnyNode = apply(Strided((experts, outputs, rank), (1, rank * experts, experts)), up)
    if _is_turned(layer, shape, outputs, inputs):
        downs, ups = transpose(ups), transpose(downs)
    dtype = weights.dtype_of(name)
    through = dtype if dtype == base.spec.dtype.name else ""
    weights.set(name, apply(AddProducts(shape, dtype, (rank,), scale, through), base, ups, downs), ADDED)


def _parameters(layer: Layer, weights: Weights) -> list[str]:
    """The parameters of a layer's module that it may be for, in the order in which the module has them."""
    return sorted(_candidates(layer, weights), key=lambda name: (_rank_of(name), name))


def _candidates(layer: Layer, weights: Weights) -> Iterator[str]:
    start, adapter = f"{layer.module}.", layer.adapter
    for name, node in weights.entries.items():
        is_own = name.startswith(start) and "." not in name.removeprefix(start) and len(node.spec.shape) == 3
        if is_own and (adapter.names("target_parameters", name) or not adapter.config.get("target_parameters")):
            yield name


def _rank_of(name: str) -> int:
    last = name.rpartition(".")[2]
    return _ORDER.index(last) if last in _ORDER else len(_ORDER)


def _fits(base: AnyNode, up: AnyNode, down: AnyNode) -> bool:
    """Whether these make a matrix for each expert of a parameter, in one order of axes or the other."""
    sides = (up.spec.shape[0], down.spec.shape[1])
    return base.spec.shape[1:] in (sides, sides[::-1])


def _place(layer: Layer) -> int:
    """How many wrappers of the same module are inside this one: keys know how many are around it."""
    start = f"{PREFIX}{layer.module}."
    depths = [key.removeprefix(start).count(WRAPPER) for key in layer.adapter.tensors if key.startswith(start)]
    return max(depths) - layer.depth


def _is_turned(layer: Layer, shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    """Whether experts are (inputs, outputs); where their shape does not tell, the model's type does, and who made the adapter."""
    if outputs != inputs:
        return shape[1:] == (inputs, outputs)
    version = tuple(map(int, re.findall(r"\d+", str(layer.adapter.config.get("peft_version") or "0.0"))[:2]))
    return version < _SINCE or is_of(MARKED, layer.adapter.model)
