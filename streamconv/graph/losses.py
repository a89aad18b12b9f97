"""What a change of values costs: how many were rounded, became infinite or zero, and how far they are from what they were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

TOO_LARGE = "are too large for their new dtype"
UNSCALED = "have no scale, for NaN or infinity in their block, or numbers too small for one"
"""What is said of values that are counted."""
_PIECE, _LINE = 1 << 17, 1 << 8  # values that are measured at once, and that are added up in float32
_LEAST, _MOST = 2.0**-60, 2.0**60  # sums of squares of which the single ones fit into float32


@dataclass(frozen=True)
class Loss:
    """Of some values, finite ones but for ``overflowed``.

    Attributes:
        overflowed: how many were finite and are infinite.
        source: the dtype that they had, if they were measured.
        target: what they became: a dtype, or a preset's rule.
        rounded: how many are others than they were.
        underflowed: how many of these are zero now.
        most: the largest difference.
        squares: of all differences, added up.
        norm: the squares of what they were, added up.
        unscaled: how many were quantized without a scale of their block, which NaN or infinity are in, or numbers too small for one.
        compared: of weights that were to change, how many there are ...
        changed: ... and how many did; changes may be too small for their dtype.
    """

    overflowed: int = 0
    source: str = ""
    target: str = ""
    rounded: int = 0
    underflowed: int = 0
    most: float = 0.0
    squares: float = 0.0
    norm: float = 0.0
    unscaled: int = 0
    compared: int = 0
    changed: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.overflowed + other.overflowed,
            self.source or other.source,
            other.target or self.target,
            self.rounded + other.rounded,
            self.underflowed + other.underflowed,
            max(self.most, other.most),
            self.squares + other.squares,
            self.norm + other.norm,
            self.unscaled + other.unscaled,
            self.compared + other.compared,
            self.changed + other.changed,
        )

    @property
    def relative(self) -> float:
        """The L2 norm of all differences, as a part of that of what the values were."""
        return math.sqrt(self.squares / self.norm) if self.norm else 0.0

    def summary(self, name: str) -> dict[str, Any]:
        """What ``convert --json`` says of a tensor."""
        return {
            "target": name,
            "from": self.source,
            "to": self.target,
            "rounded": self.rounded,
            "overflowed": self.overflowed,
            "underflowed": self.underflowed,
            "unscaled": self.unscaled,
            "max_abs": self.most,
            "relative_l2": self.relative,
        }


class Losses(dict[str, Loss]):
    """Losses by the names of targets; those of one target add up."""

    def add(self, name: str, loss: Loss) -> None:
        self[name] = self.get(name, Loss()) + loss

    def __iadd__(self, other: Mapping[str, Loss]) -> Losses:
        for name, loss in other.items():
            self.add(name, loss)
        return self

    def copy(self) -> Losses:
        return Losses(self)

    @property
    def overflowed(self) -> dict[str, int]:
        """How many values overflowed, of the targets of which any did."""
        return {name: loss.overflowed for name, loss in self.items() if loss.overflowed}

    @property
    def unscaled(self) -> dict[str, int]:
        """How many values have no scale, of the targets of which any have none."""
        return {name: loss.unscaled for name, loss in self.items() if loss.unscaled}

    def plain(self) -> dict[str, tuple[Any, ...]]:
        """As values that any process can read; `from_plain` reads them back."""
        return {name: astuple(loss) for name, loss in self.items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, tuple[Any, ...]]) -> Losses:
        return cls({name: Loss(*fields) for name, fields in values.items()})


def measure(before: Array, after: Array, source: str, target: str) -> Loss:
    """The loss of floats, as numpy has them, that became others, ``after``, of the same shape.

    A value and what it was rounded to are so near that their difference is exact in the wider of the two types; sums are of float64, or of
    a few float32 at a time, where these can hold their squares.
    """
    import numpy as np

    if before.dtype == after.dtype == np.float32 and before.flags.c_contiguous and after.flags.c_contiguous:
        return _measure_singles(before.reshape(-1), after.reshape(-1), source, target)
    return _measure(before, after, source, target)


def _measure_singles(before: Array, after: Array, source: str, target: str) -> Loss:
    """`measure` of rows of float32, piece by piece: each stays in the cache for all that is asked of it."""
    import numpy as np

    others, difference = Loss(), np.empty(min(_PIECE, before.size), np.float32)
    rounded, zeros, most, squares, norm = 0, 0, 0.0, 0.0, 0.0
    for start in range(0, before.size, _PIECE):
        old, new = before[start : start + _PIECE], after[start : start + _PIECE]
        gap = np.subtract(old, new, out=difference[: old.size])
        own_norm, own_squares = _sum_of_squares(old), _sum_of_squares(gap)
        has_zeros = not new.all()
        count = int(np.count_nonzero(gap if has_zeros else gap.view(np.int32)))  # of other equal numbers the gap is a positive zero
        if not (_LEAST < own_norm < _MOST and (not count or _LEAST < own_squares < _MOST)):
            others += _measure(old, new, source, target)
            continue
        if count and has_zeros:
            zeros += int(np.count_nonzero(old)) - int(np.count_nonzero(new))
        most = max(most, float(gap.max()), -float(gap.min()))
        rounded, squares, norm = rounded + count, squares + own_squares, norm + own_norm
    return others + Loss(0, source, target, rounded, zeros, most, squares, norm)


def sum_of_squares(values: Array) -> float:
    """Of finite floats, whatever their size."""
    import numpy as np

    total = _sum_of_squares(values) if values.dtype == np.float32 and values.flags.c_contiguous else 0.0
    return total if _LEAST < total < _MOST else float(np.square(values, dtype=np.float64).sum())


def _sum_of_squares(values: Array) -> float:
    """Of float32: added up in that type a line at a time, lines in float64."""
    import numpy as np

    whole = values.size // _LINE * _LINE
    lines, rest = values[:whole].reshape(-1, _LINE), values[whole:]
    products = np.vecdot(lines, lines) if hasattr(np, "vecdot") else np.matmul(lines[:, None], lines[:, :, None])  # of numpy 2, 1
    total = float(products.sum(dtype=np.float64))
    return total + float(np.square(rest, dtype=np.float64).sum()) if rest.size else total


def _measure(before: Array, after: Array, source: str, target: str) -> Loss:
    """`measure` of any floats."""
    import numpy as np

    difference = np.subtract(before, after)
    finite = np.isfinite(difference)
    if not finite.all():  # of what is infinite or NaN no distance is told
        before, after, difference = before[finite], after[finite], difference[finite]
    rounded = int(np.count_nonzero(difference))
    zeros = int(np.count_nonzero(before)) - int(np.count_nonzero(after)) if rounded else 0
    magnitude = max(float(difference.max()), -float(difference.min())) if difference.size else 0.0
    norm = float(np.square(before, dtype=np.float64).sum())
    squares = float(np.square(difference, dtype=np.float64).sum()) if rounded else 0.0
    return Loss(0, source, target, rounded, zeros, magnitude, squares, norm)
