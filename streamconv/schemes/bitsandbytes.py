"""bitsandbytes: four bits that number the values of a table, in blocks over the ends of rows; eight bits with scales of rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, Source, apply
from streamconv.graph.ops import DequantizeFloats, DequantizeQuantiles, Reshape
from streamconv.schemes.beside import Companions, read
from streamconv.schemes.scheme import Group, Match, Scheme

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution: what the library's codes of NF4 stand for."""
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = (*_FP4, 0.0, *(-value for value in _FP4[1:]))
"""Floats of three bits over 12, with a sign: what its codes of FP4 stand for."""
_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
_OWN = re.compile(r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+|SCB|weight_format)$")
_INVERSE = 0.007874015718698502  # 1 / 127 as the library has it


@dataclass(frozen=True)
class Quantiles(Group):
    """A weight of four bits, and what its state in JSON says."""

    table: tuple[float, ...]
    state: str

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        try:
            state = json.loads(bytes(read(self.state, nodes)))
            shape = tuple(int(size) for size in state["shape"])
            block, through = int(state["blocksize"]), str(state["dtype"]).removeprefix("torch.")
            inner, offset = int(state.get("nested_blocksize") or 0), float(state.get("nested_offset") or 0.0)
        except (ValueError, KeyError, TypeError) as error:
            raise CoverageError(f"{self.state} says nothing of shape, blocks and dtype ({error!r})") from None
        if through not in CASTABLE or block < 1 or inner < 0 or min(shape, default=1) < 1:
            raise CoverageError(f"{self.state} says blocks of {block} in {through}: expected one of {', '.join(CASTABLE)}")
        if bool(inner) != (len(self.tensors) > 3):
            raise CoverageError(f"{self.state} and the tensors beside it disagree on scales of scales")
        codes, largest, *nested = (nodes[name] for name in self.tensors if name != self.state)
        if isinstance(codes, Source):  # of whatever dtype `bnb_4bit_quant_storage` says
            codes = Source(TensorSpec(DTYPES["uint8"], (codes.spec.nbytes,)), codes.extents)
        op = DequantizeQuantiles((1, math.prod(shape)), dtype, self.table, block, through, inner, offset if inner else 0.0)
        return apply(Reshape(shape), apply(op, codes, largest, *nested))


@dataclass(frozen=True)
class Rows(Group):
    """A weight of eight bits with the largest value of each row.

    Attributes:
        layout: the tensor that numbers how codes lie; empty: row by row.
    """

    layout: str

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        codes, scales = (nodes[name] for name in self.tensors)
        if len(codes.spec.shape) != 2:
            raise CoverageError(f"expected a matrix, found {codes.spec}")
        if self.layout and read(self.layout, nodes).any():
            raise CoverageError(f"{self.layout} is not 0: its codes lie as kernels of a GPU want them, and not row by row")
        op = DequantizeFloats(codes.spec.shape, dtype, "int8", (1, codes.spec.shape[1]), "float32", "", _INVERSE)
        return apply(op, codes, scales)


class Bitsandbytes(Scheme):
    """Both of what bitsandbytes quantizes to."""

    methods = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
    turns_conv1d = True

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:  # noqa: ARG002
        """See `Scheme.match`."""
        companions = Companions(specs, title)
        matches = [match for match in map(_STATE.search, specs) if match]
        states = {match.string[: match.start()]: (match.string, match[1]) for match in matches}
        groups: list[Group] = []
        spare = {}
        for name, spec in specs.items():
            if name in states:
                groups.append(_of_four_bits(name, *states[name], companions))
                table = companions.take(name, [f"{name}.quant_map"])
                if table:
                    spare[table] = "the table of a quantization"
            elif spec.dtype.name == "int8" and name.endswith("weight"):
                companions.take(name, [name])
                scales = companions.need(name, [f"{name.removesuffix('weight')}SCB"])
                layout = companions.take(name, [f"{name.removesuffix('weight')}weight_format"])
                groups.append(Rows(name, (name, scales), layout or ""))
                if layout:
                    spare[layout] = "says how the codes of a quantization lie"
            elif spec.dtype.name == "uint8" and name.endswith(".weight"):
                companions.need(name, [f"{name}.quant_state.bitsandbytes__nf4", f"{name}.quant_state.bitsandbytes__fp4"])
        return companions.conclude(groups, _OWN, spare)


SCHEME = Bitsandbytes()


def _of_four_bits(name: str, state: str, kind: str, companions: Companions) -> Group:
    companions.take(name, [name])
    companions.take(name, [state])
    tensors = [name, companions.need(name, [f"{name}.absmax"])]
    nested = companions.take(name, [f"{name}.nested_absmax"])
    if nested:
        tensors += [nested, companions.need(name, [f"{name}.nested_quant_map"])]
    return Quantiles(name, (*tensors, state), NF4 if kind == "nf4" else FP4, state)
