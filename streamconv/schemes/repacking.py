"""Codes and scales that a preset stores as they are: what was dequantized on the way is handed on, and nothing is rounded.

The proof is the preset's own scheme: what it decodes of the tensors handed on must be the numbers that the weight is, by the same products
and roundings.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from streamconv.checkpoint.entries import TensorEntry
from streamconv.dtypes import CASTABLE
from streamconv.errors import StreamconvError
from streamconv.graph.node import AnyNode, Node, apply, made_of
from streamconv.graph.ops import (
    Cast,
    Constant,
    Dequantize,
    DequantizeFloats,
    DequantizeIntegers,
    FnuzCodes,
    FnuzScales,
    Op,
    PackIntegers,
    Reshape,
    Strided,
    UnpackIntegers,
)
from streamconv.graph.ops.boxes import Boxed
from streamconv.graph.views import select
from streamconv.schemes.beside import transpose, untransposed
from streamconv.schemes.configs import KEYS
from streamconv.schemes.preset import Preset
from streamconv.schemes.scheme import Scheme

_WORD = 32  # bits
_TILE, _SHARING = (128, 128), 32  # rows and columns of a block; columns that share an exponent
_APART = 14  # exponents: 6 times a power of two, and half of one so much smaller, are both codes of float8_e4m3fn
_LOWEST, _HIGHEST = 24, 240  # exponents whose products are normal numbers
_OF_FNUZ = "float8_e4m3fnuz"
_EXACT = ("float32", "bfloat16", "float16")  # of scales


def repack(preset: Preset, scheme: Scheme, name: str, weight: AnyNode) -> dict[str, AnyNode] | None:
    """The stored tensors that a weight is decoded from, under the names and in the types of a preset, if it decodes them to the same.

    Args:
        preset: what is to be written.
        scheme: the one that reads it.
        name: the weight's.
        weight: what it is made of.
    """
    made = _of_words(preset, name, weight) or _of_nibbles(preset, name, weight) or _of_floats(preset, name, weight)
    if made is not None:
        return made
    if not isinstance(weight, Node) or not isinstance(weight.op, Dequantize | DequantizeFloats | DequantizeIntegers):
        return None
    names = [preset.codes[0], preset.scales[0], *filter(None, (preset.zeros, preset.shared))]
    if len(names) != len(weight.inputs) or weight.inputs[0].spec.dtype.name != preset.codes[1]:
        return None
    scales = _scales(weight.inputs[1], preset.scales[1])
    if scales is None:
        return None
    made = {names[0]: weight.inputs[0], names[1]: scales, **dict(zip(names[2:], weight.inputs[2:], strict=True))}
    if preset.shape:
        rows, columns = weight.spec.shape[-2:]
        made[preset.shape] = apply(Constant("int64", (2,), (rows, columns)))
    tensors = {f"{name}{suffix}": node for suffix, node in made.items()}
    try:
        (group,) = scheme.match({KEYS[0]: preset.config([])}, {key: node.spec for key, node in tensors.items()}, preset.name).groups
        decoded = group.decode(tensors, weight.spec.dtype.name)
    except (StreamconvError, ValueError):
        return None
    return tensors if _numbers(decoded) == _numbers(weight) else None


def is_decoded(node: AnyNode) -> bool:
    """Whether a weight is made of what a source has quantized."""
    if not isinstance(node, Node):
        return False
    return isinstance(node.op, Boxed | Dequantize) or any(map(is_decoded, node.inputs))


def _of_words(preset: Preset, name: str, weight: AnyNode) -> dict[str, AnyNode] | None:
    """The same of GPTQ's and AWQ's words, whose inputs are rows: their integers, in the words of a preset that has them in columns."""
    if not isinstance(weight, Node) or not isinstance(weight.op, Strided) or preset.codes[1] != "int32":
        return None
    (inner,) = weight.inputs
    if not isinstance(inner, Node) or not isinstance(inner.op, DequantizeIntegers) or made_of(transpose(inner)) != made_of(weight):
        return None
    op = inner.op
    if op.along == "columns" or not op.zeros or op.index:
        return None
    codes, scales, zeros = inner.inputs
    inputs, outputs = op.shape
    size = min(preset.block[1], inputs)
    if op.bits != preset.bits or op.block != (size, 1) or op.offset or scales.spec.dtype.name not in _EXACT:
        return None
    points = apply(UnpackIntegers(scales.spec.shape, "uint8", op.bits, op.zeros, (1, 1), plus=op.plus), zeros)
    if not preset.zeros and not bool((TensorEntry(name, points).numpy() == 1 << op.bits - 1).all()):
        return None
    per = _WORD // op.bits
    integers = transpose(apply(UnpackIntegers(op.shape, "uint8", op.bits, op.along, (1, 1)), codes))
    groups = scales.spec.shape[0]
    made = {
        preset.codes[0]: apply(PackIntegers((outputs, -(-inputs // per)), "int32", op.bits, 2, (outputs, inputs)), integers),
        preset.scales[0]: transpose(scales),
        preset.shape: apply(Constant("int64", (2,), (outputs, inputs))),
    }
    if preset.zeros:
        packed = PackIntegers((-(-outputs // per), groups), "int32", op.bits, 1, (outputs, groups))
        made[preset.zeros] = apply(packed, transpose(points))
    return {f"{name}{suffix}": node for suffix, node in made.items()}


def _of_nibbles(preset: Preset, name: str, weight: AnyNode) -> dict[str, AnyNode] | None:
    """mxfp4 as float8 in blocks of 128 x 128, where each block's exponents lie so near that a power of two makes all codes exact."""
    if preset.rule not in ("fp8", "float8") or preset.block != _TILE:
        return None
    stored = untransposed(weight)
    if not isinstance(stored, Node) or not isinstance(stored.op, DequantizeFloats):
        return None
    op, (_, scales, *_) = stored.op, stored.inputs
    is_mxfp4 = op.codes == "float4_e2m1fn" and op.block == (1, _SHARING) and not op.shared and op.factor == 1
    is_exponent = scales.spec.dtype.name in ("uint8", "float8_e8m0fnu")
    if not (is_mxfp4 and is_exponent and weight.spec.dtype.name in ("float32", "bfloat16") and preset.fits(weight.spec.shape)):
        return None
    *stack, rows, columns = scales.spec.shape
    matrices = apply(Reshape((math.prod(stack), rows, columns)), scales)
    for number in range(math.prod(stack)):
        view, _, _ = select(matrices.spec.shape, (number,), name)
        exponents = TensorEntry(name, apply(view, matrices)).numpy().view("uint8").reshape(rows, columns)
        if not _is_near(exponents):
            return None
    return replace(preset, rule=f"{preset.rule}_powers").encode(name, weight, None)


def _of_floats(preset: Preset, name: str, weight: AnyNode) -> dict[str, AnyNode] | None:
    """float8_e4m3fn as float8_e4m3fnuz, in the same blocks."""
    if preset.codes[1] != _OF_FNUZ or not isinstance(weight, Node) or len(weight.inputs) != 2:
        return None
    codes, scales = weight.inputs
    rows, columns = weight.spec.shape[-2:]
    block = min(preset.block[0], rows), min(preset.block[1], columns)
    if _operation(weight) != DequantizeFloats(weight.spec.shape, weight.spec.dtype.name, "float8_e4m3fn", block, "float32"):
        return None
    return {f"{name}{preset.codes[0]}": apply(FnuzCodes(), codes), f"{name}{preset.scales[0]}": apply(FnuzScales(), scales)}


def _is_near(exponents: Any) -> bool:
    """Whether all exponents of each tile of a matrix fit beside each other, and none is NaN or near the ends of what floats have."""
    import numpy as np

    down, across = (np.arange(0, size, step) for size, step in zip(exponents.shape, (_TILE[0], _TILE[1] // _SHARING), strict=True))
    most = np.maximum.reduceat(np.maximum.reduceat(exponents, down, 0), across, 1).astype(int)
    least = np.minimum.reduceat(np.minimum.reduceat(exponents, down, 0), across, 1).astype(int)
    return bool((most - least <= _APART).all() and most.max(initial=0) <= _HIGHEST and least.min(initial=_HIGHEST) >= _LOWEST)


def _scales(node: AnyNode, dtype: str) -> AnyNode | None:
    """Scales in a type that holds them; None: they do not fit into the one that is wanted. Empty: any floating type of the weights."""
    found = node.spec.dtype.name
    if found == dtype or (not dtype and found in _EXACT):
        return node
    return apply(Cast(dtype), node) if dtype == "float32" and found in _EXACT else None


def _numbers(node: AnyNode) -> Hashable:
    """What two decoded weights have in common that are the same numbers."""
    if not isinstance(node, Node):
        return made_of(node)
    codes, scales, *others = node.inputs
    return _operation(node), made_of(codes), made_of(_bare(scales)), tuple(map(made_of, others))


def _operation(node: Node) -> Op:
    """How a weight is decoded, less what changes nothing of products and roundings."""
    op, (codes, scales, *_) = node.op, node.inputs
    if isinstance(op, Dequantize):
        op = DequantizeFloats(op.shape, op.dtype, codes.spec.dtype.name, op.block, "float32")
    if isinstance(op, DequantizeFloats | DequantizeIntegers):
        rows, columns = op.shape[-2:]
        op = replace(op, block=(min(op.block[0], rows), min(op.block[1], columns)))
    if isinstance(op, DequantizeFloats):
        through = op.through or scales.spec.dtype.name
        op = replace(op, through="float32" if through == op.dtype else through)
    return op


def _bare(scales: AnyNode) -> AnyNode:
    """Scales before they were given another shape, or a wider type."""
    while isinstance(scales, Node) and (isinstance(scales.op, Reshape) or _is_widened(scales)):
        (scales,) = scales.inputs
    return scales


def _is_widened(node: Node) -> bool:
    return isinstance(node.op, Cast) and node.op.dtype == "float32" and node.inputs[0].spec.dtype.name in CASTABLE
