"""Casts to another floating type, by torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops.op import Elementwise, Values
from streamconv.graph.ops.rounding import settle, settle_nans


@dataclass(frozen=True)
class Cast(Elementwise):
    """Conversion to another floating type by torch, rounding to nearest even; NaNs come out as the one quiet NaN.

    What bits torch itself gives a NaN differs between its vector and its scalar loops, hence with the shape of a tile.
    """

    kind: ClassVar[str] = "cast"

    dtype: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE or self.dtype not in CASTABLE:
            raise CoverageError(f"cannot cast {inputs[0].dtype} to {self.dtype}; casts go between {', '.join(CASTABLE)}")
        return TensorSpec(DTYPES[self.dtype], inputs[0].shape)

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)  # the engine's workers are the threads
        values = torch.full((64,), math.nan, dtype=getattr(torch, inputs[0].dtype.name))
        if values.min().isnan():
            settle_nans(values.to(getattr(torch, self.dtype)))

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        numbers = parts[0].torch()
        cast = out.torch().copy_(numbers)
        return settle(numbers, cast) if cast.dtype != numbers.dtype else 0
