"""What merging takes of whole tensors: lengths and angles, the size from which on deltas count, what those that count add up to.

Each is a `Reduce` over pieces of one size, in their order, or in counts, so that neither tiles nor threads change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import identity
from streamconv.graph.ops.merging import WORKING
from streamconv.graph.ops.op import Fetch, Reduce
from streamconv.graph.ops.picks import LARGEST, Pick

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_LEVEL = 16  # bits of a size that a pass counts


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

        from streamconv.graph import deltas
        from streamconv.graph.casts import widen

        *raw, cutoff, _, share = buffers
        half = len(self.picks)
        if len(inputs) > 2 * half:
            fetch(2 * half, 0, cutoff)
        before = after = 0.0
        for number, start, (first, second) in _pairs(inputs, half, fetch, raw):
            dtype = inputs[number].dtype.name
            delta, bits = deltas.delta_of(second, np.array(widen(first, dtype)), dtype)
            mask = self.picks[number].mask(bits, identity(len(bits), start), cutoff.view(np.int64))
            np.abs(delta, out=delta)
            before += float(delta.sum(dtype=np.float64))
            after += float(np.multiply(delta, mask, out=delta).sum(dtype=np.float64))
        dtype = "bfloat16" if inputs[0].dtype.name == "bfloat16" else "float32"
        sums = [float(deltas.rounded(total, dtype)) for total in (before, after)]
        share.view(np.float32)[0] = 1.0 if min(sums) < _FEW else deltas.rounded(np.float32(sums[0]) / np.float32(sums[1]), dtype)


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
    return [*[(most, max(spec.dtype.itemsize for spec in inputs))] * count, (SCRATCH + WORKING * PIECE, 1)]


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

    from streamconv.graph import deltas
    from streamconv.graph.casts import widen

    place = 0
    for number, _, (first, second) in _pairs(inputs, len(inputs) // 2, fetch, raw):
        dtype = inputs[number].dtype.name
        _, bits = deltas.delta_of(second, np.array(widen(first, dtype)), dtype)
        yield place, bits
        place += len(bits)
