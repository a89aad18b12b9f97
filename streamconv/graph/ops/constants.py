"""Tensors that are made of nothing: zeros, and the frequencies of rotary embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.extras import require
from streamconv.graph.moves import Move
from streamconv.graph.ops.op import Compute, Values

_MAKING = "making the frequencies of a rotary embedding"


class Made(Compute):
    """An op without inputs."""

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:  # noqa: ARG002
        """Nothing."""
        return []


@dataclass(frozen=True)
class Zeros(Made):
    """A tensor of zeros."""

    kind: ClassVar[str] = "zeros"

    dtype: str
    shape: tuple[int, ...]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:  # noqa: ARG002
        DTYPES[self.dtype].itemsize  # noqa: B018 - refuses packed types
        return TensorSpec(DTYPES[self.dtype], self.shape)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        out.items.fill(0)
        return 0


@dataclass(frozen=True)
class Constant(Made):
    """A tensor of a few whole numbers that are known."""

    kind: ClassVar[str] = "constant"

    dtype: str
    shape: tuple[int, ...]
    numbers: tuple[int, ...]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:  # noqa: ARG002
        spec = TensorSpec(DTYPES[self.dtype], self.shape)
        if not self.dtype.startswith("int") or spec.numel != len(self.numbers):
            raise CoverageError(f"{self.kind}: {len(self.numbers)} whole numbers are no {spec}")
        return spec

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        import numpy as np

        from streamconv.graph.arrays import view

        items = np.array(self.numbers, f"i{out.items.itemsize}").view(out.items.dtype)
        out.items[...] = view(items, region.sizes, region.src_strides, region.src)
        return 0


@dataclass(frozen=True)
class InvFreq(Made):
    """The frequencies of a rotary embedding: float32 base^(-2j/dim) for j < dim / 2, with torch's last bits."""

    kind: ClassVar[str] = "inv_freq"

    dim: int
    base: int

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:  # noqa: ARG002
        return TensorSpec(DTYPES["float32"], (self.dim // 2,))

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:  # noqa: ARG002
        require("torch", _MAKING)  # loaded before the process is measured

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        torch = require("torch", _MAKING)
        values = 1.0 / (float(self.base) ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))
        out.torch().copy_(values.as_strided(region.sizes, region.src_strides, region.src))
        return 0
