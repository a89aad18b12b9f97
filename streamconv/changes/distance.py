"""How far the numbers of a tensor are from those of another one, and whether they are the same but for a rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from streamconv.dtypes import CASTABLE, DTYPES
from streamconv.graph.node import AnyNode

if TYPE_CHECKING:
    from streamconv.engine.side_by_side import Begin
    from streamconv.graph.arena import Array

SCRATCH = 16 << 20  # bytes that measuring takes in each thread


@dataclass(frozen=True)
class Distance:
    """Of tensors of one shape, A and B. What is not finite on either side is in ``nonfinite``, if it is not the same, and nowhere else.

    Attributes:
        numel: how many numbers there are, of which ``changed`` are others.
        max_abs: the largest difference.
        squares: of the differences, added up.
        squares_a: of A's numbers, added up.
        squares_b: of B's.
        rounding: what is to be rounded to which dtype for one side to become the other, or nothing.
        is_measured: whether they are numbers at all; else nothing is known but that bytes differ.
    """

    numel: int = 0
    changed: int = 0
    max_abs: float = 0.0
    squares: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    nonfinite: int = 0
    rounding: str = ""
    is_measured: bool = True

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.numel + other.numel,
            self.changed + other.changed,
            max(self.max_abs, other.max_abs),
            self.squares + other.squares,
            self.squares_a + other.squares_a,
            self.squares_b + other.squares_b,
            self.nonfinite + other.nonfinite,
            is_measured=self.is_measured and other.is_measured,
        )

    @property
    def share(self) -> float:
        """The part of the numbers that changed."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def relative_l2(self) -> float | None:
        """The L2 norm of the differences, as a part of that of A; None where A is all zeros, or squares are too large for float64."""
        return math.sqrt(self.squares / self.squares_a) if self.squares_a and self._is_finite else None

    @property
    def _is_finite(self) -> bool:
        return math.isfinite(self.squares + self.squares_a + self.squares_b)

    @property
    def cosine(self) -> float | None:
        """Of the angle between A and B; None where one is all zeros, or squares are too large for float64."""
        a, b = math.sqrt(self.squares_a), math.sqrt(self.squares_b)
        if not (a and b and self._is_finite):
            return None
        longer = (self.squares_a - self.squares_b) / (a + b)
        return max(-1.0, 1.0 - (self.squares - longer**2) / (2 * a * b))


def measure_distance(left: AnyNode, right: AnyNode, begin: Begin) -> Distance | None:
    """How far two tensors of one shape are apart, read by `side_by_side`; None: they have the same dtype and bytes."""
    import numpy as np

    a, b = left.spec.dtype, right.spec.dtype
    if a.is_packed or b.is_packed:
        same = a == b and all(np.array_equal(ours, theirs) for ours, theirs in begin())
        return None if same else Distance(left.spec.numel, is_measured=False)
    meter, skipped, is_equal = _Meter(a.name, b.name), 0, a == b
    for ours, theirs in begin():
        if is_equal and np.array_equal(ours, theirs):
            skipped += 1
            continue
        is_equal = False
        meter.add(ours, theirs)
    if is_equal:
        return None
    for ours, theirs in islice(begin(), skipped):
        meter.add(ours, theirs)
    return meter.distance


class _Meter:
    """Adds up, piece by piece, how far numbers are from others, and knows by which roundings they may still have become these."""

    def __init__(self, left: str, right: str) -> None:
        self._left, self._right = left, right
        self._roundings = list(_roundings(left, right))
        self._distance = Distance()

    @property
    def distance(self) -> Distance:
        """Of all that was added."""
        distance = self._distance
        if self._left != self._right and not (distance.changed or distance.nonfinite):
            return replace(distance, rounding=f"the same numbers in {self._right}")
        return replace(distance, rounding=self._roundings[0].text if self._roundings else "")

    def add(self, ours: Array, theirs: Array) -> None:
        """Takes in what both sides have in the same places, as unsigned integers."""
        import numpy as np

        from streamconv.graph.casts import PIECE

        for start in range(0, len(ours), PIECE):
            left, right = ours[start : start + PIECE], theirs[start : start + PIECE]
            with np.errstate(all="ignore"):  # infinities and NaN are counted
                self._distance += self._measure(left, right)
                self._roundings = [rounding for rounding in self._roundings if rounding.explains(left, right)]

    def _measure(self, ours: Array, theirs: Array) -> Distance:
        import numpy as np

        from streamconv.graph.losses import measure, sum_of_squares

        a = np.array(_numbers(ours, self._left))  # which lies where the others will
        b = _numbers(theirs, self._right)
        nonfinite = 0
        if not math.isfinite(float(a.sum()) + float(b.sum())):
            a, b = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(a) & np.isfinite(b)
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            nonfinite = int(np.count_nonzero(~finite & ~same))
            a, b = a[finite], b[finite]
        loss = measure(a, b, self._left, self._right)
        changed = loss.rounded
        if self._left == self._right and not DTYPES[self._left].floating:  # float64 may not tell them apart
            changed = int(np.count_nonzero(ours != theirs))
        return Distance(len(ours), changed, loss.most, loss.squares, loss.norm, sum_of_squares(b), nonfinite)


def _numbers(items: Array, dtype: str) -> Array:
    """A piece as floats, those of types that are cast in scratch memory; of complex numbers both parts."""
    import numpy as np

    from streamconv.graph.arrays import as_values
    from streamconv.graph.casts import widen

    if dtype in CASTABLE:
        return widen(items, dtype)
    values = as_values(items, dtype)
    return values.view(np.float32) if values.dtype.kind == "c" else values.astype(np.float64)


@dataclass(frozen=True)
class _Rounding:
    """One side is the other one, rounded to a dtype, and then, if that is not its own, cast to its own.

    Attributes:
        text: what is said of it.
        dtypes: of what is rounded, which it is rounded to, and of what it becomes.
        is_of_left: whether it is A that is rounded.
    """

    text: str
    dtypes: tuple[str, str, str]
    is_of_left: bool = True

    def explains(self, ours: Array, theirs: Array) -> bool:
        """Whether it makes all of a piece of one side of the other."""
        import numpy as np

        from streamconv.graph.casts import cast

        before, after = (ours, theirs) if self.is_of_left else (theirs, ours)
        source, through, target = self.dtypes
        rounded = np.empty(len(before), f"u{DTYPES[through].itemsize}")
        cast(before, source, rounded, through)
        if through != target:
            rounded, narrow = np.empty(len(before), after.dtype), rounded
            cast(narrow, through, rounded, target)
        return np.array_equal(rounded, after)


def _roundings(left: str, right: str) -> Iterator[_Rounding]:
    """Those by which numbers of one dtype may have become such of another, or of the same."""
    if left not in CASTABLE or right not in CASTABLE:
        return
    if left != right:
        yield _Rounding(f"rounded to {right}", (left, right, right))
        yield _Rounding(f"A is B, rounded to {left}", (right, left, left), is_of_left=False)
        return
    for through in CASTABLE[1:]:
        if DTYPES[through].itemsize < DTYPES[left].itemsize:
            yield _Rounding(f"rounded to {through}, kept in {left}", (left, through, left))
