"""One tensor of those of several models: weighted sums, and what models add to a base, all of it or the part that is picked.

The numbers are mergekit's: every step is rounded to the dtype of the tensors where it rounds, products are added by one rounding where
the processor's fused multiply-add has one. What takes all of a tensor is a `Reduce`, in sums of pieces of one size or in counts, so that
neither tiles nor threads change it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move, identity
from streamconv.graph.ops.cast import Rounding
from streamconv.graph.ops.op import Elementwise, Fetch, Reduce, Values

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

ALL, NONE, LARGEST, RANDOM = "all", "none", "largest", "random"
"""Which of a model's deltas count."""
CHANCES = 1 << 53
"""A delta that is picked with probability p is with ``p * CHANCES`` of so many equal chances."""
_WORKING = 48  # bytes for each element of a piece that merging takes beside `casts.SCRATCH`
_LEVEL = 16  # bits of a size that a pass counts


@dataclass(frozen=True)
class Pick:
    """Which of a model's deltas count, the differences of its tensor and the base's.

    Attributes:
        rule: one of `ALL`, `NONE`, `LARGEST` (by a cutoff, an input of its own), `RANDOM`.
        chances: of `CHANCES`, how many pick a random one.
        key: decides with an element's place whether it is picked: below 2^63, and no two tensors' the same.
        rescaled: those that are picked are multiplied with what an input of its own says.
        offset: elements of other tensors of the same unit before this one.
    """

    rule: str = ALL
    chances: int = 0
    key: int = 0
    rescaled: bool = False
    offset: int = 0

    @property
    def values(self) -> int:
        """How many small inputs it takes: the cutoff, the factor."""
        return (self.rule == LARGEST) + self.rescaled

    def mask(self, bits: Array, region: Move, cutoff: Array | None) -> Array:
        """Which deltas of a region count, by their magnitudes' ``bits``."""
        import numpy as np

        if self.rule == RANDOM:
            picked: Array = _chances_of(_places(region), self.key) < np.uint64(self.chances)
            return picked.reshape(bits.shape)
        assert cutoff is not None
        size, last = (int(number) for number in cutoff)
        mask: Array = bits > bits.dtype.type(size)
        alike = bits == bits.dtype.type(size)
        if alike.any():
            mask |= alike & (_places(region) + self.offset <= last).reshape(bits.shape)
        return mask


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

        return super().scratch(inputs) + _WORKING * PIECE


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

        from streamconv.graph.casts import narrow

        dtype, overflowed = out.dtype.name, 0
        for _, (*operands, result) in _pieces(region, *(part.items for part in parts), out.items):
            total = _weighted_sum(operands, self.weights, dtype)
            if self.normalize:
                np.divide(total, sum(map(total.dtype.type, self.weights), start=total.dtype.type(0)), out=total)
            overflowed += narrow(total, result, dtype)
        return overflowed


@dataclass(frozen=True)
class MergeSlerp(_Merge):
    """Two tensors on the arc between them, ``t`` of the way from the first: of both, and what `Alignment` says of them."""

    kind: ClassVar[str] = "merge_slerp"

    t: float

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        return self._check(inputs, 2, (3,))

    def _count(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        return 2

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        import numpy as np

        from streamconv.graph.casts import narrow, widen

        dtype, overflowed = out.dtype.name, 0
        factors = self._factors(*parts[2].items.view(np.float64).reshape(-1).tolist(), single=dtype != "float64")
        for _, (first, second, result) in _pieces(region, parts[0].items, parts[1].items, out.items):
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
class Alignment(Reduce):
    """Sums over tensors and as many others: of the squares of those, of the squares of these, of the products; float64."""

    kind: ClassVar[str] = "alignment"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        half = len(inputs) // 2
        if not half or len(inputs) % 2 or [spec.shape for spec in inputs[:half]] != [spec.shape for spec in inputs[half:]]:
            raise CoverageError(f"{self.kind}: tensors and as many others of their shapes, found {', '.join(map(str, inputs))}")
        return TensorSpec(DTYPES["float64"], (3,))

    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """A piece of one and of the other, room for numbers, and what is to be written."""
        return [*_piece_buffers(inputs, 2), (3, 8)]

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        import numpy as np

        from streamconv.graph.casts import widen

        *raw, _, sums = buffers
        half, totals = len(inputs) // 2, [0.0, 0.0, 0.0]
        for number, _, (first, second) in _pairs(inputs, half, fetch, raw):
            dtype = inputs[number].dtype.name
            ours = widen(first, dtype).astype(np.float64)
            theirs = widen(second, dtype).astype(np.float64)
            for k, (one, other) in enumerate(((ours, ours), (theirs, theirs), (ours, theirs))):
                totals[k] += float(np.multiply(one, other).sum())
        sums.view(np.float64)[:] = totals


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

        from streamconv.graph.casts import narrow, widen

        dtype, overflowed, count = out.dtype.name, 0, 1 + len(self.weights)
        small = iter([part.items.reshape(-1) for part in parts[count:]])
        beside = [_beside(pick, small) for pick in self.picks]
        for piece, (first, *tensors, result) in _pieces(region, *(part.items for part in parts[:count]), out.items):
            base = np.array(widen(first, dtype))
            products = (self._product(k, tensor, base, dtype, piece, *beside[k]) for k, tensor in enumerate(tensors))
            total = self._elected(list(products), dtype) if self.elects else self._sum(products, base, dtype)
            if self.factor != 1:
                np.multiply(total, total.dtype.type(self.factor), out=total)
                _round(total, dtype)
            np.add(base, total, out=total)
            overflowed += narrow(total, result, dtype)
        return overflowed

    def _product(self, k: int, tensor: Array, base: Array, dtype: str, piece: Move, cutoff: Array | None, ratio: float | None) -> Array:
        """A model's deltas of a piece times its weight; those that are not picked are 0."""
        import numpy as np

        pick = self.picks[k]
        delta, bits = _delta(tensor, base, dtype)
        if pick.rule == NONE:
            np.multiply(delta, delta.dtype.type(0), out=delta)
        elif pick.rule != ALL:
            np.multiply(delta, pick.mask(bits, piece, cutoff), out=delta)
        if ratio is not None:
            np.multiply(delta, delta.dtype.type(ratio), out=delta)
            _round(delta, dtype)
        np.multiply(delta, self._weights(dtype)[k], out=delta)
        _round(delta, dtype)
        return delta

    def _weights(self, dtype: str) -> list[Any]:
        return [_rounded(weight, dtype) for weight in self.weights]

    def _sum(self, products: Iterator[Array], base: Array, dtype: str) -> Array:
        import numpy as np

        total = np.zeros_like(base)
        for product in products:
            np.add(total, product, out=total)
        _round(total, dtype)
        divisor = _rounded(sum(self._weights(dtype), start=total.dtype.type(0)), dtype)
        if self.normalize and abs(divisor) >= _NOTHING and divisor != 1:
            np.divide(total, divisor, out=total)
            _round(total, dtype)
        return total

    def _elected(self, products: list[Array], dtype: str) -> Array:
        """The sum of those products that have the sign of the sum of all, divided by that of their weights."""
        import numpy as np

        total = np.zeros_like(products[0])
        for product in products:
            np.add(total, product, out=total)
        _round(total, dtype)
        is_positive = total >= 0
        total.fill(0)
        divisor = np.zeros_like(total) if self.normalize else None
        for product, weight in zip(products, self._weights(dtype), strict=True):
            counts = np.where(is_positive, product > 0, product < 0)
            if divisor is not None:
                np.add(divisor, np.multiply(counts, weight), out=divisor)
            np.multiply(product, counts, out=product)
            np.add(total, product, out=total)
        _round(total, dtype)
        if divisor is not None:
            _round(divisor, dtype)
            np.copyto(divisor, divisor.dtype.type(1), where=divisor == 0)
            np.divide(total, divisor, out=total)
            _round(total, dtype)
        return total


_NOTHING = 1e-8


@dataclass(frozen=True)
class Cutoff(Reduce):
    """Of the deltas of tensors and as many bases the size of the ``count``-th largest, and the last place where one of that size counts.

    The inputs are the bases, then the tensors; places count all elements of the one before those of the next. Of deltas of that size those
    come first that lie first.
    """

    kind: ClassVar[str] = "cutoff"

    count: int

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        _check_pairs(self.kind, inputs)
        if not 1 <= self.count <= sum(spec.numel for spec in inputs) // 2:
            raise CoverageError(f"{self.kind}: there are no {self.count} largest deltas of {', '.join(map(str, inputs))}")
        return TensorSpec(DTYPES["int64"], (2,))

    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """A piece of a base and of a tensor, room for numbers and counts, and what is to be written."""
        return [*_piece_buffers(inputs, 2), (2, 8)]

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        import numpy as np

        *raw, _, cutoff = buffers
        size, rank, alike, width = 0, self.count, 0, 8 * inputs[0].dtype.itemsize
        for shift in range(width - _LEVEL, -1, -_LEVEL):
            counts = np.zeros(1 << _LEVEL, np.int64)
            for _, bits in _sizes_of(inputs, fetch, raw):
                some = bits if shift == width - _LEVEL else bits[bits >> (shift + _LEVEL) == size]
                counts += np.bincount(some >> shift & ((1 << _LEVEL) - 1), minlength=1 << _LEVEL)
            at_least = np.cumsum(counts[::-1])[::-1]
            bucket = int(np.flatnonzero(at_least >= rank)[-1])
            alike = int(counts[bucket])
            rank -= int(at_least[bucket]) - alike
            size = size << _LEVEL | bucket
        last = sum(spec.numel for spec in inputs) // 2
        if rank < alike:
            for start, bits in _sizes_of(inputs, fetch, raw):
                places = np.flatnonzero(bits == size)
                if len(places) >= rank:
                    last = start + int(places[rank - 1])
                    break
                rank -= len(places)
        cutoff.view(np.int64)[:] = size, last


@dataclass(frozen=True)
class KeptShare(Reduce):
    """What deltas that are picked are multiplied with, so that their magnitudes add up to those of all deltas; float32.

    The inputs are bases, as many tensors, and what `Pick.mask` takes: one model's of a unit.

    Attributes:
        picks: which deltas of each tensor count.
    """

    kind: ClassVar[str] = "kept_share"

    picks: tuple[Pick, ...]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        _check_pairs(self.kind, inputs[: 2 * len(self.picks)])
        if len(inputs) != 2 * len(self.picks) + any(pick.rule == LARGEST for pick in self.picks):
            raise CoverageError(f"{self.kind}: a pick for each tensor, found {self}")
        return TensorSpec(DTYPES["float32"], (1,))

    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """A piece of a base and of a tensor, a cutoff, room for numbers, and what is to be written."""
        first, second, room = _piece_buffers(inputs[: 2 * len(self.picks)], 2)
        return [first, second, (2, 8), room, (1, 4)]

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        import numpy as np

        from streamconv.graph.casts import widen

        *raw, cutoff, _, share = buffers
        half = len(self.picks)
        if len(inputs) > 2 * half:
            fetch(2 * half, 0, cutoff)
        before = after = 0.0
        for number, start, (first, second) in _pairs(inputs, half, fetch, raw):
            dtype = inputs[number].dtype.name
            delta, bits = _delta(second, np.array(widen(first, dtype)), dtype)
            mask = self.picks[number].mask(bits, identity(len(bits), start), cutoff.view(np.int64))
            np.abs(delta, out=delta)
            before += float(delta.sum(dtype=np.float64))
            after += float(np.multiply(delta, mask, out=delta).sum(dtype=np.float64))
        dtype = "bfloat16" if inputs[0].dtype.name == "bfloat16" else "float32"
        sums = [float(_rounded(total, dtype)) for total in (before, after)]
        share.view(np.float32)[0] = 1.0 if min(sums) < _FEW else _rounded(np.float32(sums[0]) / np.float32(sums[1]), dtype)


_FEW = 1e-7


def _check_pairs(kind: str, inputs: Sequence[TensorSpec]) -> None:
    """Raises CoverageError unless these are tensors and as many others of their shapes, all of one floating dtype."""
    half = len(inputs) // 2
    shapes = [spec.shape for spec in inputs]
    names = {spec.dtype.name for spec in inputs}
    if not half or shapes[:half] != shapes[half:] or len(names) != 1 or not names <= {*CASTABLE}:
        raise CoverageError(f"{kind}: tensors and as many others of their shapes, found {', '.join(map(str, inputs))}")


def _piece_buffers(inputs: Sequence[TensorSpec], count: int) -> list[tuple[int, int]]:
    """Memory for so many pieces of an input, and for numbers on their way."""
    from streamconv.graph.casts import PIECE, SCRATCH

    most = min(PIECE, max(1, *(spec.numel for spec in inputs)))
    return [*[(most, max(spec.dtype.itemsize for spec in inputs))] * count, (SCRATCH + _WORKING * PIECE, 1)]


def _pairs(inputs: Sequence[TensorSpec], half: int, fetch: Fetch, raw: Sequence[Array]) -> Iterator[tuple[int, int, tuple[Array, Array]]]:
    """The same piece of a tensor and of its other, and where it begins: of all tensors one after the other, which are ``half``."""
    for number in range(half):
        numel = inputs[number].numel
        for start in range(0, numel, len(raw[0])):
            first, second = (buffer[: min(len(buffer), numel - start)] for buffer in raw)
            fetch(number, start, first)
            fetch(half + number, start, second)
            yield number, start, (first, second)


def _sizes_of(inputs: Sequence[TensorSpec], fetch: Fetch, raw: Sequence[Array]) -> Iterator[tuple[int, Array]]:
    """The bits of deltas' magnitudes, piece by piece, and the place of the first of them."""
    import numpy as np

    from streamconv.graph.casts import widen

    place = 0
    for number, _, (first, second) in _pairs(inputs, len(inputs) // 2, fetch, raw):
        dtype = inputs[number].dtype.name
        _, bits = _delta(second, np.array(widen(first, dtype)), dtype)
        yield place, bits
        place += len(bits)


def _pieces(region: Move, *arrays: Array) -> Iterator[tuple[Move, tuple[Array, ...]]]:
    """A region, and arrays in its shape, in the same pieces of at most `casts.PIECE` elements."""
    from streamconv.graph.casts import PIECE

    if region.numel <= PIECE:
        yield region, arrays
        return
    spans = [(n - 1) * stride for n, stride in zip(region.sizes, region.src_strides, strict=True)]
    axis = spans.index(max(spans))
    size = region.sizes[axis]
    for start, stop in ((0, size // 2), (size // 2, size)):
        sizes = (*region.sizes[:axis], stop - start, *region.sizes[axis + 1 :])
        part = replace(region, sizes=sizes, src=region.src + start * region.src_strides[axis])
        yield from _pieces(part, *(array[(slice(None),) * axis + (slice(start, stop),)] for array in arrays))


def _places(region: Move) -> Array:
    """The place of each element of a region in its tensor."""
    import numpy as np

    places = np.full((1,) * len(region.sizes), region.src, np.int64)
    for axis, (size, stride) in enumerate(zip(region.sizes, region.src_strides, strict=True)):
        steps = np.arange(size, dtype=np.int64) * stride
        places = places + steps.reshape((size,) + (1,) * (len(region.sizes) - 1 - axis))
    return places


def _chances_of(places: Array, key: int) -> Array:
    """A number below `CHANCES` for each place, by a key: the first bits of SplitMix64's."""
    import numpy as np

    state = places.astype(np.uint64)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(key)
    other = np.empty_like(state)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0)):
        np.right_shift(state, np.uint64(shift), out=other)
        np.bitwise_xor(state, other, out=state)
        if factor:
            state *= np.uint64(factor)
    state >>= np.uint64(11)
    return state


def _weighted_sum(operands: Sequence[Array], weights: Sequence[float], dtype: str) -> Array:
    """A piece of each operand times its weight, added up as a fused multiply-add does: products are not rounded."""
    import numpy as np

    from streamconv.graph.casts import widen

    total: Array | None = None
    for operand, weight in zip(operands, weights, strict=True):
        values = widen(operand, dtype)
        factor = values.dtype.type(weight)
        if total is None:
            total = np.multiply(values, factor)
            np.add(total, total.dtype.type(0), out=total)  # of -0
        elif values.dtype == np.float64 or _bits(float(factor)) + _BITS[dtype] <= _BITS["float32"]:
            np.add(total, np.multiply(values, factor), out=total)
        else:  # exact in float64, and added there
            product = np.multiply(values, np.float64(factor))
            np.add(product, total, out=product)
            np.copyto(total, product, casting="unsafe")
    assert total is not None
    return total


_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
"""Bits of a number, less sign and exponent."""


def _bits(number: float) -> int:
    """How many bits of a number, less sign and exponent, there are from the first to the last that is not 0."""
    whole = int(math.ldexp(abs(math.frexp(number)[0]), 53))
    return (whole // (whole & -whole)).bit_length() if whole else 0


def _delta(tensor: Array, base: Array, dtype: str) -> tuple[Array, Array]:
    """A tensor's numbers less those of a base, rounded to its dtype; and the bits of their magnitudes."""
    import numpy as np

    from streamconv.graph.casts import widen

    delta = np.subtract(widen(tensor, dtype), base)
    items = _round(delta, dtype)
    sign = items.dtype.type(1 << 8 * items.itemsize - 1)
    bits: Array = items & ~sign
    return delta, bits


def _round(values: Array, dtype: str) -> Array:
    """Rounds numbers to a dtype where they are; gives them as items of it, too."""
    import numpy as np

    from streamconv.graph.casts import narrow, widen

    if values.dtype == np.dtype(np.float64) or dtype == "float32":
        return values.view(f"u{values.itemsize}")
    items = np.empty(values.shape, np.uint16)
    narrow(values, items, dtype)
    np.copyto(values, widen(items, dtype))
    return items


def _rounded(number: Any, dtype: str) -> Any:
    """A number rounded to a dtype."""
    import numpy as np

    wide = np.array([number], np.float64 if dtype == "float64" else np.float32)
    _round(wide, dtype)
    return wide[0]


def _beside(pick: Pick, small: Iterator[Array]) -> tuple[Array | None, float | None]:
    """The cutoff and the factor of a pick, of the values that are next."""
    import numpy as np

    cutoff = next(small).view(np.int64) if pick.rule == LARGEST else None
    ratio = float(next(small).view(np.float32)[0]) if pick.rescaled else None
    return cutoff, ratio
