"""The ops of the graph: plain data with a JSON form that know their output's spec statically, and what they take of their inputs.

`op` says what an op is; each other module holds one or a few. Whoever subclasses `Layout`, `Compute` or `Reduce` adds one of its own.
"""

from streamconv.graph.ops.arithmetic import Add, Scale
from streamconv.graph.ops.blocks import Blocks, Dequantize
from streamconv.graph.ops.cast import Cast
from streamconv.graph.ops.constants import InvFreq, Zeros
from streamconv.graph.ops.layouts import Rearrange, Reshape, Rows, Strided
from streamconv.graph.ops.lora import MergeLora
from streamconv.graph.ops.op import Compute, Elementwise, Layout, Op, Reduce, Values, as_torch, from_json
from streamconv.graph.ops.quantized import DequantizeBlocks, DequantizeFloats, DequantizeIntegers, DequantizeQuantiles
from streamconv.graph.ops.sampled import SampleRows

__all__ = [
    "Add", "Blocks", "Cast", "Compute", "Dequantize", "DequantizeBlocks", "DequantizeFloats", "DequantizeIntegers", "DequantizeQuantiles",
    "Elementwise", "InvFreq", "Layout", "MergeLora", "Op", "Rearrange", "Reduce", "Reshape", "Rows", "SampleRows", "Scale",
    "Strided", "Values", "Zeros", "as_torch", "from_json",
]  # fmt: skip
