"""The ops of the graph: plain data with a JSON form that know their output's spec statically, and what they take of their inputs.

`op` says what an op is, `layouts` has those that only move bytes; each other module holds one or a few, and is loaded when one of its is
asked for. Whoever subclasses `Layout`, `Compute` or `Reduce` adds one of its own.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from streamconv.graph.ops.layouts import PickRows, Rearrange, Reshape, Rows, Strided
from streamconv.graph.ops.op import Compute, Elementwise, Layout, Op, Reduce, Values, as_torch, from_json

if TYPE_CHECKING:
    from streamconv.graph.ops.arithmetic import Add, Scale
    from streamconv.graph.ops.blocks import Blocks, Dequantize
    from streamconv.graph.ops.cast import Cast
    from streamconv.graph.ops.constants import Constant, InvFreq, Zeros
    from streamconv.graph.ops.fnuz import FnuzCodes, FnuzScales
    from streamconv.graph.ops.integers import PackIntegers, UnpackIntegers
    from streamconv.graph.ops.lora import MergeLora
    from streamconv.graph.ops.merging import MergeDeltas, MergeLinear, MergeSlerp
    from streamconv.graph.ops.picks import Pick
    from streamconv.graph.ops.quantized import DequantizeBlocks, DequantizeFloats, DequantizeIntegers, DequantizeQuantiles
    from streamconv.graph.ops.quantizing import Quantize, SharedScale
    from streamconv.graph.ops.sampled import SampleRows
    from streamconv.graph.ops.statistics import Alignment, Cutoff, KeptShare
    from streamconv.graph.ops.tuned import AddProducts, ColumnNorms, Kronecker, Magnify, ScaleLines

__all__ = [
    "Add", "AddProducts", "Alignment", "Blocks", "Cast", "ColumnNorms", "Compute", "Constant", "Cutoff", "Dequantize", "DequantizeBlocks",
    "DequantizeFloats", "DequantizeIntegers", "DequantizeQuantiles", "Elementwise", "FnuzCodes", "FnuzScales", "InvFreq", "KeptShare",
    "Kronecker", "Layout", "Magnify", "MergeDeltas", "MergeLinear", "MergeLora", "MergeSlerp", "Op", "PackIntegers", "Pick", "PickRows",
    "Quantize", "Rearrange", "Reduce", "Reshape", "Rows", "SampleRows", "Scale", "ScaleLines", "SharedScale", "Strided", "UnpackIntegers",
    "Values", "Zeros", "as_torch", "from_json",
]  # fmt: skip

_HOMES = {
    "Add": "arithmetic", "AddProducts": "tuned", "Alignment": "statistics", "Blocks": "blocks", "Cast": "cast", "ColumnNorms": "tuned",
    "Constant": "constants", "Cutoff": "statistics", "Dequantize": "blocks", "DequantizeBlocks": "quantized",
    "DequantizeFloats": "quantized", "DequantizeIntegers": "quantized", "DequantizeQuantiles": "quantized", "FnuzCodes": "fnuz",
    "FnuzScales": "fnuz", "InvFreq": "constants", "KeptShare": "statistics", "Kronecker": "tuned", "Magnify": "tuned",
    "MergeDeltas": "merging", "MergeLinear": "merging", "MergeLora": "lora", "MergeSlerp": "merging", "PackIntegers": "integers",
    "Pick": "picks", "Quantize": "quantizing", "SampleRows": "sampled", "Scale": "arithmetic", "ScaleLines": "tuned",
    "SharedScale": "quantizing", "UnpackIntegers": "integers", "Zeros": "constants",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
