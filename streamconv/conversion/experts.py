"""Experts that are stored in one tensor, a stack, as modules of their own: what llm-compressor makes of them before it quantizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, Node, apply
from streamconv.graph.ops import Dequantize, DequantizeFloats
from streamconv.graph.views import select
from streamconv.schemes.beside import transpose, untransposed

STACK = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)")
"""Names of stacks of weights; those of their biases end in ``_bias``."""
_TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")  # model types whose stacks have inputs before outputs
_WOVEN = ("gpt_oss",)  # of which gate and up take turns


def model_types(config: Mapping[str, Any]) -> list[object]:
    """The model types of a config, and of its text model."""
    text = config.get("text_config")
    return [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]


def has_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a model's stacks have inputs before outputs."""
    return any(kind in _TRANSPOSED for kind in model_types(config))


def take_apart(name: str, node: AnyNode, config: Mapping[str, Any]) -> Iterator[tuple[str, AnyNode]]:
    """The weight of each expert of a stack, or its bias, gate and up apart, outputs before inputs.

    Args:
        name: of the stack.
        node: weights, of three axes, or biases, of two.
        config: of the model.

    Raises:
        CoverageError: it has no gate and up of one height.
    """
    stack = STACK.fullmatch(name.removesuffix("_bias"))
    assert stack is not None
    is_transposed = has_transposed(config) and len(node.spec.shape) == 3
    names = ("gate_proj", "up_proj") if stack[2] == "gate_up_proj" else (stack[2],)
    count, rows = node.spec.shape[0], node.spec.shape[2 if is_transposed else 1]
    height, rest = divmod(rows, len(names))
    if rest:
        raise CoverageError(f"{name} {node.spec} has {rows} rows, which are no gate and up of one height: mend the source")
    is_woven = any(kind in _WOVEN for kind in model_types(config))
    end = "bias" if name.endswith("_bias") else "weight"
    for expert in range(count):
        for number, part in enumerate(names):
            chosen = slice(number, rows, len(names)) if is_woven else slice(number * height, (number + 1) * height, 1)
            yield f"{stack[1]}.{expert}.{part}.{end}", _rows_of(node, expert, chosen, is_transposed=is_transposed)


def _rows_of(node: AnyNode, expert: int, rows: slice, *, is_transposed: bool) -> AnyNode:
    """Rows of an expert: of codes and scales, where these can be taken apart, so that they may be stored as they are."""
    inner = untransposed(node) if is_transposed else node
    if is_transposed and inner is node:
        return transpose(_pick(node, expert, slice(None), rows))
    if isinstance(inner, Node) and isinstance(inner.op, Dequantize | DequantizeFloats) and len(inner.inputs) == 2:
        op, (codes, scales), high = inner.op, inner.inputs, inner.op.block[0]
        if high == 1 or (rows.start % high == 0 and rows.step == 1):
            blocks = slice(rows.start // high, -(-rows.stop // high), rows.step)
            shape = len(range(rows.start, rows.stop, rows.step)), op.shape[-1]
            return apply(replace(op, shape=shape), _pick(codes, expert, rows), _pick(scales, expert, blocks))
    return _pick(inner, expert, rows)


def _pick(node: AnyNode, *index: Any) -> AnyNode:
    view, _, _ = select(node.spec.shape, index, "experts")
    return apply(view, node)
