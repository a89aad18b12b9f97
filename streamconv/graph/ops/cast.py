"""Casts to another floating type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops.op import Compute, Elementwise, Values

if TYPE_CHECKING:
    from streamconv.graph.losses import Loss


class Rounding(Compute):
    """An op whose values are rounded by `casts`."""

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        from streamconv.graph.casts import SCRATCH

        return SCRATCH

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:  # noqa: ARG002
        import ml_dtypes  # noqa: F401 - loaded before the process is measured


@dataclass(frozen=True)
class Cast(Rounding, Elementwise):
    """Conversion to another floating type as torch does it, rounding to nearest even; NaNs come out as the one quiet NaN.

    What bits torch itself gives a NaN differs between its vector and its scalar loops. One that has the type already keeps its bits.
    """

    kind: ClassVar[str] = "cast"

    dtype: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE or self.dtype not in CASTABLE:
            raise CoverageError(f"cannot cast {inputs[0].dtype} to {self.dtype}; casts go between {', '.join(CASTABLE)}")
        return TensorSpec(DTYPES[self.dtype], inputs[0].shape)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        from streamconv.graph.casts import cast

        if parts[0].dtype == out.dtype:
            out.items[...] = parts[0].items
            return 0
        return cast(parts[0].items, parts[0].dtype.name, out.items, out.dtype.name)

    def loss(self, region: Move, parts: Sequence[Values], out: Values) -> Loss | None:  # noqa: ARG002
        """See `Compute.loss`: of a type that the other one holds nothing is lost."""
        from streamconv.graph.casts import measure_cast

        source, target = parts[0].dtype.name, out.dtype.name
        return None if (source, target) in _HELD or source == target else measure_cast(parts[0].items, source, out.items, target)


_HELD = {(narrow, wide) for narrow in ("float16", "bfloat16", "float32") for wide in ("float32", "float64")}
