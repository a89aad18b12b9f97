"""mxfp4 as gpt-oss has it: stacked experts in blocks of 32 values of four bits with an exponent each, their last axes exchanged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import DequantizeFloats
from streamconv.schemes.beside import Companions, transpose
from streamconv.schemes.scheme import Group, Match, Scheme

_OWN = re.compile(r"_scales$")
_BLOCK, _BYTES = 32, 16  # values of a block, and bytes of their codes


@dataclass(frozen=True)
class Experts(Group):
    """A stack of matrices, outputs by inputs as they are stored, inputs by outputs as the model has them."""

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        blocks, scales = (nodes[name] for name in self.tensors)
        *outer, count, nbytes = blocks.spec.shape
        if nbytes != _BYTES or len(outer) < 2 or scales.spec.shape != (*outer, count):
            raise CoverageError(f"expected blocks of {_BYTES} bytes with a scale each, found {blocks.spec} and {scales.spec}")
        op = DequantizeFloats((*outer, count * _BLOCK), dtype, "float4_e2m1fn", (1, _BLOCK), powers=True)
        return transpose(apply(op, blocks, scales))


class Mxfp4(Scheme):
    """What transformers calls mxfp4."""

    methods = ("mxfp4",)

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:  # noqa: ARG002
        """See `Scheme.match`."""
        companions = Companions(specs, title)
        groups: list[Group] = []
        for name, spec in specs.items():
            if name.endswith("_blocks") and spec.dtype.name == "uint8":
                target = name.removesuffix("_blocks")
                companions.take(name, [name])
                groups.append(Experts(target, (name, companions.need(name, [f"{target}_scales"]))))
        return companions.conclude(groups, _OWN)


SCHEME = Mxfp4()
