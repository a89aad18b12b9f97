"""One tensor of those of several models: weighted sums, and what models add to a base, all of it or the part that is picked.

The numbers are mergekit's: every step is rounded to the dtype of the tensors where it rounds, products are added by one rounding where
the processor's fused multiply-add has one. What takes all of a tensor is told by `statistics`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move, identity
from streamconv.graph.ops.cast import Rounding
from streamconv.graph.ops.op import Elementwise, Values
from streamconv.graph.ops.picks import ALL, LARGEST, NONE, RANDOM, Pick

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

WORKING = 48  # bytes for each element of a piece that merging takes beside `casts.SCRATCH`


class _Merge(Rounding, Elementwise):
    """An op of tensors of one shape and floating dtype, and of small values behind them."""

    def _check(self, inputs: Sequence[TensorSpec], count: int, sizes: Sequence[int]) -> TensorSpec:
        """The output's spec: that of each of the first ``count`` inputs; the others have these sizes."""
        alike = inputs[:count]
        fits = count > 0 and len(inputs) == count + len(sizes) and all(spec == alike[0] for spec in alike)
        if not fits or alike[0].dtype.name not in CASTABLE or [spec.numel for spec in inputs[count:]] != [*sizes]:
            raise CoverageError(f"{self.kind}: tensors of one shape and floating dtype, found {', '.join(map(str, inputs))}")
        return alike[0]

    @abstractmethod
    def _count(self, inputs: Sequence[TensorSpec]) -> int:
        """How many inputs are tensors as the output is one."""

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:
        count = self._count(inputs)
        return [region] * count + [identity(spec.numel) for spec in inputs[count:]]

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """See `Compute.reach`."""
        count = self._count(inputs)
        return [numel] * count + [spec.numel for spec in inputs[count:]]

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        from streamconv.graph.casts import PIECE

        return super().scratch(inputs) + WORKING * PIECE


@dataclass(frozen=True)
class MergeLinear(_Merge):
    """The sum of tensors times their weights, in order, perhaps divided by that of these: in float32 (float64 of float64), rounded once."""

    kind: ClassVar[str] = "merge_linear"

    weights: tuple[float, ...]
    normalize: bool = False

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        return self._check(inputs, len(self.weights), ())

    def _count(self, inputs: Sequence[TensorSpec]) -> int:
        return len(inputs)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        import numpy as np

        from streamconv.graph import deltas
        from streamconv.graph.casts import narrow

        dtype, overflowed = out.dtype.name, 0
        for _, (*operands, result) in deltas.pieces_of(region, *(part.items for part in parts), out.items):
            total = deltas.weighted_sum(operands, self.weights, dtype)
            if self.normalize:
                np.divide(total, sum(map(total.dtype.type, self.weights), start=total.dtype.type(0)), out=total)
            overflowed += narrow(total, result, dtype)
        return overflowed


@dataclass(frozen=True)
class MergeSlerp(_Merge):
    """Two tensors on the arc between them, ``t`` of the way from the first: of both, and what `statistics.Alignment` says of them."""

    kind: ClassVar[str] = "merge_slerp"

    t: float

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        return self._check(inputs, 2, (3,))

    def _count(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        return 2

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        import numpy as np

        from streamconv.graph import deltas
        from streamconv.graph.casts import narrow, widen

        dtype, overflowed = out.dtype.name, 0
        factors = self._factors(*parts[2].items.view(np.float64).reshape(-1).tolist(), single=dtype != "float64")
        for _, (first, second, result) in deltas.pieces_of(region, parts[0].items, parts[1].items, out.items):
            values = widen(first, dtype)
            total = np.multiply(values, values.dtype.type(factors[0]))
            values = widen(second, dtype)
            total += np.multiply(values, values.dtype.type(factors[1]))
            overflowed += narrow(total, result, dtype)
        return overflowed

    def _factors(self, first: float, second: float, product: float, *, single: bool) -> tuple[float, float]:
        """What the two are multiplied with, by their sums of squares and that of their products."""
        import numpy as np

        lengths = [length if length > _SHORT else 1.0 for length in (math.sqrt(first), math.sqrt(second))]
        t = float(np.float32(self.t)) if single else self.t
        rest = float(np.float32(1) - np.float32(t)) if single else 1 - t
        cosine = min(1.0, max(-1.0, product / (lengths[0] * lengths[1])))
        if not abs(cosine) <= _ALIGNED:
            return rest, t
        angle = math.acos(cosine)
        return math.sin(rest * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


_SHORT, _ALIGNED = 1e-8, 0.9995


@dataclass(frozen=True)
class MergeDeltas(_Merge):
    """A base and what models add to it: their deltas that are picked, times weights, added up.

    Each step is rounded to the tensors' dtype. The inputs are the base, the models' tensors, and for each model what its pick takes.

    Attributes:
        weights: of the models; rounded to the tensors' dtype, too.
        picks: which of each model's deltas count.
        normalize: the sum is divided by that of the weights, unless it is nothing.
        factor: what it is multiplied with at last.
        elects: only deltas of the sign that their sum has count, and only their weights.
    """

    kind: ClassVar[str] = "merge_deltas"

    weights: tuple[float, ...]
    picks: tuple[Pick, ...]
    normalize: bool = False
    factor: float = 1.0
    elects: bool = False

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(self.picks) != len(self.weights) or any(pick.rule not in (ALL, NONE, LARGEST, RANDOM) for pick in self.picks):
            raise CoverageError(f"{self.kind}: a weight and a pick for each model, found {self}")
        sizes = [size for pick in self.picks for size in ([2] * (pick.rule == LARGEST) + [1] * pick.rescaled)]
        return self._check(inputs, 1 + len(self.weights), sizes)

    def _count(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        return 1 + len(self.weights)

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        from streamconv.graph.casts import PIECE

        kept = len(self.weights) if self.elects else 0  # of a piece, until their sign is known
        return super().scratch(inputs) + (16 + 8 * kept) * PIECE

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        import numpy as np

        from streamconv.graph import deltas
        from streamconv.graph.casts import narrow, widen

        dtype, overflowed, count = out.dtype.name, 0, 1 + len(self.weights)
        small = iter([part.items.reshape(-1) for part in parts[count:]])
        beside = [_beside(pick, small) for pick in self.picks]
        for piece, (first, *tensors, result) in deltas.pieces_of(region, *(part.items for part in parts[:count]), out.items):
            base = np.array(widen(first, dtype))
            products = (self._product(k, tensor, base, dtype, piece, *beside[k]) for k, tensor in enumerate(tensors))
            total = self._elected(list(products), dtype) if self.elects else self._sum(products, base, dtype)
            if self.factor != 1:
                np.multiply(total, total.dtype.type(self.factor), out=total)
                deltas.round_in_place(total, dtype)
            np.add(base, total, out=total)
            overflowed += narrow(total, result, dtype)
        return overflowed

    def _product(self, k: int, tensor: Array, base: Array, dtype: str, piece: Move, cutoff: Array | None, ratio: float | None) -> Array:
        """A model's deltas of a piece times its weight; those that are not picked are 0."""
        import numpy as np

        from streamconv.graph import deltas

        pick = self.picks[k]
        delta, bits = deltas.delta_of(tensor, base, dtype)
        if pick.rule == NONE:
            np.multiply(delta, delta.dtype.type(0), out=delta)
        elif pick.rule != ALL:
            np.multiply(delta, pick.mask(bits, piece, cutoff), out=delta)
        if ratio is not None:
            np.multiply(delta, delta.dtype.type(ratio), out=delta)
            deltas.round_in_place(delta, dtype)
        np.multiply(delta, self._weights(dtype)[k], out=delta)
        deltas.round_in_place(delta, dtype)
        return delta

    def _weights(self, dtype: str) -> list[Any]:
        from streamconv.graph import deltas

        return [deltas.rounded(weight, dtype) for weight in self.weights]

    def _sum(self, products: Iterator[Array], base: Array, dtype: str) -> Array:
        import numpy as np

        from streamconv.graph import deltas

        total = np.zeros_like(base)
        for product in products:
            np.add(total, product, out=total)
        deltas.round_in_place(total, dtype)
        divisor = deltas.rounded(sum(self._weights(dtype), start=total.dtype.type(0)), dtype)
        if self.normalize and abs(divisor) >= _NOTHING and divisor != 1:
            np.divide(total, divisor, out=total)
            deltas.round_in_place(total, dtype)
        return total

    def _elected(self, products: list[Array], dtype: str) -> Array:
        """The sum of those products that have the sign of the sum of all, divided by that of their weights."""
        import numpy as np

        from streamconv.graph import deltas

        total = np.zeros_like(products[0])
        for product in products:
            np.add(total, product, out=total)
        deltas.round_in_place(total, dtype)
        is_positive = total >= 0
        total.fill(0)
        divisor = np.zeros_like(total) if self.normalize else None
        for product, weight in zip(products, self._weights(dtype), strict=True):
            counts = np.where(is_positive, product > 0, product < 0)
            if divisor is not None:
                np.add(divisor, np.multiply(counts, weight), out=divisor)
            np.multiply(product, counts, out=product)
            np.add(total, product, out=total)
        deltas.round_in_place(total, dtype)
        if divisor is not None:
            deltas.round_in_place(divisor, dtype)
            np.copyto(divisor, divisor.dtype.type(1), where=divisor == 0)
            np.divide(total, divisor, out=total)
            deltas.round_in_place(total, dtype)
        return total


_NOTHING = 1e-8


def _beside(pick: Pick, small: Iterator[Array]) -> tuple[Array | None, float | None]:
    """The cutoff and the factor of a pick, of the values that are next."""
    import numpy as np

    cutoff = next(small).view(np.int64) if pick.rule == LARGEST else None
    ratio = float(next(small).view(np.float32)[0]) if pick.rescaled else None
    return cutoff, ratio
