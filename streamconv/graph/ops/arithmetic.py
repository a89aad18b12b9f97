"""A number added to every value, or multiplied with it, in the tensor's own dtype, as torch does that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from streamconv.dtypes import CASTABLE, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops.op import Elementwise, Values
from streamconv.graph.ops.rounding import count_overflows, settle_nans


@dataclass(frozen=True)
class Add(Elementwise):
    """Every value plus a number, in the dtype of the tensor: as torch adds one, in float32 for narrower ones, and rounded once."""

    kind: ClassVar[str] = "add"

    value: float

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE:
            raise CoverageError(f"{self.kind} is for tensors of {', '.join(CASTABLE)}, not for {inputs[0]}")
        return inputs[0]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)
        values = torch.full((64,), math.nan, dtype=getattr(torch, inputs[0].dtype.name))
        self._change(values)
        settle_nans(values)

    def _change(self, values: Any) -> None:
        values.add_(self.value)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        operand = parts[0].torch()
        result = out.torch().copy_(operand)
        self._change(result)
        low, high = result.aminmax()
        if low.isnan():
            settle_nans(result)
        return 0 if low.isfinite() and high.isfinite() else count_overflows(operand, result)


@dataclass(frozen=True)
class Scale(Add):
    """Every value times a number, or divided by it, in the dtype of the tensor, as torch does that; see `Add`."""

    kind: ClassVar[str] = "scale"

    divide: bool = False

    def _change(self, values: Any) -> None:
        if self.divide:
            values.div_(self.value)
        else:
            values.mul_(self.value)
