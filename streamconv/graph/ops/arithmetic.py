"""A number added to every value, or multiplied with it, in the tensor's own dtype, as torch does that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops.cast import Rounding
from streamconv.graph.ops.op import Elementwise, Values

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]


@dataclass(frozen=True)
class Add(Rounding, Elementwise):
    """Every value plus a number, both in the dtype of the tensor: as torch adds them, in float32 for narrower ones, and rounded once."""

    kind: ClassVar[str] = "add"

    value: float

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE:
            raise CoverageError(f"{self.kind} is for tensors of {', '.join(CASTABLE)}, not for {inputs[0]}")
        return inputs[0]

    def _change(self, values: Array, dtype: str, out: Array) -> None:
        """Makes ``out`` of values that are, or stand for, numbers of a dtype."""
        import numpy as np

        from streamconv.graph.arrays import numpy_dtype

        number = values.dtype.type(self.value).astype(numpy_dtype(dtype))
        np.add(values, number.astype(values.dtype), out=out)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        from streamconv.graph.arrays import numpy_dtype
        from streamconv.graph.casts import narrow, pieces, widen

        dtype, overflowed = out.dtype.name, 0
        for operand, result in pieces(parts[0].items, out.items):
            values = widen(operand, dtype)
            wide = result.view(values.dtype) if values.itemsize == result.itemsize else values
            self._change(values, dtype, wide)
            overflowed += narrow(wide, result, dtype, operand.view(numpy_dtype(dtype)))
        return overflowed


@dataclass(frozen=True)
class Scale(Add):
    """Every value times a number, or divided by it, as torch does that: in float32 for narrower dtypes, and rounded once."""

    kind: ClassVar[str] = "scale"

    divide: bool = False

    def _change(self, values: Array, dtype: str, out: Array) -> None:  # noqa: ARG002
        import numpy as np

        change = np.divide if self.divide else np.multiply
        change(values, values.dtype.type(self.value), out=out)
