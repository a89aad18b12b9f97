"""float8_e4m3fn as float8_e4m3fnuz, the type of AMD's cards before MI350, in which the same bits stand for half as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops.blocks import SCALES
from streamconv.graph.ops.cast import Rounding
from streamconv.graph.ops.op import Elementwise, Values


@dataclass(frozen=True)
class FnuzCodes(Elementwise):
    """Codes of float8_e4m3fn as those of float8_e4m3fnuz that stand for half as much: the same bits, but -0 is 0, and NaN its only one."""

    kind: ClassVar[str] = "fnuz_codes"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name != "float8_e4m3fn":
            raise CoverageError(f"{self.kind}: expected float8_e4m3fn, found {inputs[0]}")
        return TensorSpec(DTYPES["float8_e4m3fnuz"], inputs[0].shape)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        from streamconv.graph.casts import pieces
        from streamconv.graph.encoders import to_fnuz

        for codes, result in pieces(parts[0].items, out.items):
            result[...] = to_fnuz(codes)
        return 0

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        from streamconv.graph.casts import PIECE

        return 16 * PIECE  # of a piece its codes as indices, and what they become


@dataclass(frozen=True)
class FnuzScales(Rounding, Elementwise):
    """Scales of float8_e4m3fn as those of `FnuzCodes`: twice as large, in float32."""

    kind: ClassVar[str] = "fnuz_scales"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in SCALES:
            raise CoverageError(f"{self.kind}: expected scales, found {inputs[0]}")
        return TensorSpec(DTYPES["float32"], inputs[0].shape)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        import numpy as np

        from streamconv.graph.casts import narrow, pieces
        from streamconv.graph.codes import factors

        overflowed = 0
        for scales, result in pieces(parts[0].items, out.items):
            numbers = factors(scales, parts[0].dtype.name)
            overflowed += narrow(numbers * np.float32(2), result, "float32", numbers)
        return overflowed
