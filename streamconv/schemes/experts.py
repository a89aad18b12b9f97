"""Experts that are stored in one tensor, a stack, as modules of their own, which llm-compressor makes before it quantizes; and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, Node, apply
from streamconv.graph.ops import Dequantize, DequantizeFloats, Rearrange
from streamconv.graph.views import select
from streamconv.schemes.beside import transpose, untransposed
from streamconv.schemes.orientation import TRANSPOSED, WOVEN, check_stack, is_of

STACK = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)")
"""Names of stacks of weights; those of their biases end in ``_bias``."""
_MODULE = re.compile(r"(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")


def take_apart(name: str, node: AnyNode, config: Mapping[str, Any]) -> Iterator[tuple[str, AnyNode]]:
    """The weight of each expert of a stack, or its bias, gate and up apart, outputs before inputs.

    Args:
        name: of the stack.
        node: weights, of three axes, or biases, of two.
        config: of the model.

    Raises:
        CoverageError: it has no gate and up of one height, or which of its axes is which is not known.
    """
    stack = STACK.fullmatch(name.removesuffix("_bias"))
    assert stack is not None
    is_matrices = len(node.spec.shape) == 3
    if is_matrices:
        check_stack(name, node.spec.shape, config)
    is_transposed = is_of(TRANSPOSED, config) and is_matrices
    names = ("gate_proj", "up_proj") if stack[2] == "gate_up_proj" else (stack[2],)
    count, rows = node.spec.shape[0], node.spec.shape[2 if is_transposed else 1]
    height, rest = divmod(rows, len(names))
    if rest:
        raise CoverageError(f"{name} {node.spec} has {rows} rows, which are no gate and up of one height: mend the source")
    end = "bias" if name.endswith("_bias") else "weight"
    for expert in range(count):
        for number, part in enumerate(names):
            chosen = slice(number, rows, len(names)) if is_of(WOVEN, config) else slice(number * height, (number + 1) * height, 1)
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


def put_together(nodes: Mapping[str, AnyNode], config: Mapping[str, Any]) -> tuple[dict[str, AnyNode], dict[str, list[str]]]:
    """Tensors of which the experts of models that `take_apart` turns are stacks again, as transformers reads them; what each is made of.

    Raises:
        CoverageError: an expert is missing among the others.
    """
    members: dict[str, dict[int, str]] = {}
    for name in nodes if is_of(TRANSPOSED, config) else ():
        module = _MODULE.fullmatch(name)
        if module is None:
            continue
        base, expert, part, end = module.groups()
        parts = ("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj")
        stack = f"{base}.{'gate_up_proj' if len(parts) == 2 else part}{'_bias' if end == 'bias' else ''}"
        members.setdefault(stack, {})[int(expert) * len(parts) + parts.index(part)] = name
    stack_of: dict[str, str] = {}
    for stack, names in members.items():
        missing = sorted({*range(max(names) + 1 + (max(names) + 1) % _parts_of(stack))} - set(names))
        if missing:
            raise CoverageError(
                f"{stack}: expert {missing[0] // _parts_of(stack)} is not whole, and others are: fetch the checkpoint again"
            )
        stack_of |= dict.fromkeys(names.values(), stack)
    together: dict[str, AnyNode] = {}
    made_of = {stack: [names[number] for number in sorted(names)] for stack, names in members.items()}
    for name, node in nodes.items():
        stack = stack_of.get(name, name)
        if stack not in together:
            together[stack] = node if stack == name else _stack([nodes[one] for one in made_of[stack]], stack, config)
    return together, made_of


def _parts_of(stack: str) -> int:
    return 2 if "gate_up_proj" in stack else 1


def _stack(modules: Sequence[AnyNode], name: str, config: Mapping[str, Any]) -> AnyNode:
    """Weights of experts, or their biases, in one tensor, inputs before outputs, and gate and up as one."""
    parts = _parts_of(name)
    height, *columns = modules[0].spec.shape
    outputs = "(h p)" if is_of(WOVEN, config) else "(p h)"
    layout = f"(e p) h i -> e i {outputs}" if columns else f"(e p) h -> e {outputs}"
    sizes = {"1": 1, "e": len(modules) // parts, "p": parts, "h": height, **({"i": columns[0]} if columns else {})}
    return apply(Rearrange(layout, sizes, (len(modules),)), *modules)
