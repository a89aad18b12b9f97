"""NVIDIA ModelOpt: one-byte floats with a scale for all, and NVFP4, whose scales have a scale of their own that multiplies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import DequantizeFloats
from streamconv.schemes.beside import Companions
from streamconv.schemes.configs import quantizations
from streamconv.schemes.scheme import Group, Match, Scheme

_OWN = re.compile(r"\.weight_scale(?:_2)?$")
_BLOCK = 16  # columns that share a scale of NVFP4


@dataclass(frozen=True)
class Matrix(Group):
    """A matrix with its scales."""

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        codes, scales, *whole = (nodes[name] for name in self.tensors)
        shape = codes.spec.shape
        if len(shape) < 2:
            raise CoverageError(f"expected a matrix, found {codes.spec}")
        if not whole:
            *_, rows, columns = shape
            return apply(DequantizeFloats(shape, dtype, codes.spec.dtype.name, (rows, columns)), codes, scales)
        shape = (*shape[:-1], 2 * shape[-1])
        return apply(DequantizeFloats(shape, dtype, "float4_e2m1fn", (1, _BLOCK), "float32", "multiplies"), codes, scales, *whole)


class Modelopt(Scheme):
    """What ModelOpt exports for Hugging Face."""

    methods = ("modelopt", "FP8", "NVFP4")

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:
        """See `Scheme.match`."""
        algorithm = next((section.get("quant_algo") for _, section in quantizations(config)), None)
        if algorithm not in (None, "FP8", "NVFP4"):
            raise UsageError(f"{title}: modelopt by {algorithm}: known are FP8 and NVFP4; the library that made it can dequantize it")
        companions = Companions(specs, title)
        groups: list[Group] = []
        for name, spec in specs.items():
            if not name.endswith(".weight") or spec.dtype.name not in ("float8_e4m3fn", "uint8"):
                continue
            companions.take(name, [name])
            tensors = [name, companions.need(name, [f"{name}_scale"])]
            if spec.dtype.name == "uint8":
                tensors.append(companions.need(name, [f"{name}_scale_2"]))
            groups.append(Matrix(name, tuple(tensors)))
        return companions.conclude(groups, _OWN)


SCHEME = Modelopt()
