"""Streamed comparison of what should be with what is, at any size in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from streamconv.engine.side_by_side import Limits, SideBySide
from streamconv.graph.node import AnyNode
from streamconv.notebook import table
from streamconv.text import join_lines

if TYPE_CHECKING:
    from streamconv.engine.side_by_side import Begin
    from streamconv.graph.arena import Array

HELD = 240  # bytes: what is kept of a tensor that differs
PIECE = 32 << 10  # elements: norms are taken as torch does, in float32, of pieces this small, and added up in float64
LANES, REST = 8, 4  # sums that torch adds up beside each other, and squares that it rounds together behind these


@dataclass(frozen=True)
class TensorDifference:
    """A tensor present on both sides that differs. ``l2`` and ``max_abs`` are None where shapes differ or values are not numbers."""

    name: str
    equal: bool = False
    l2: float | None = None
    max_abs: float | None = None
    nonfinite: int = 0
    expected: str = ""
    found: str = ""


@dataclass
class Comparison:
    """The result of a comparison.

    ``l2`` sums over tensors the L2 norm of the difference in float32; differences that are not finite are counted in
    ``nonfinite`` and kept out of ``l2`` and ``max_abs``. ``equal``: same names, dtypes, shapes and bytes. ``notes``: on
    other sources that went into the first.
    """

    compared: int = 0
    parameters: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shape_mismatch: list[str] = field(default_factory=list)
    dtype_mismatch: list[str] = field(default_factory=list)
    l2: float = 0.0
    max_abs: float = 0.0
    nonfinite: int = 0
    tensors: list[TensorDifference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not (self.missing or self.unexpected or self.tensors)

    @property
    def l2_per_parameter(self) -> float:
        return self.l2 / self.parameters if self.parameters else 0.0

    def __repr__(self) -> str:
        differing = len(self.missing) + len(self.unexpected) + len(self.tensors)
        return f"<Comparison of {self.compared} tensors: {'equal' if self.equal else f'{differing} differ'}>"

    def _repr_html_(self) -> str:
        title, *others = str(self).split("\n")
        return table(title, [], [(row,) for row in others])

    def summary(self) -> dict[str, Any]:
        """What ``verify --json`` prints."""
        rows = [{key: value for key, value in asdict(row).items() if value not in ("", None)} for row in self.tensors]
        return {
            "equal": self.equal,
            "compared": self.compared,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "shape_mismatch": self.shape_mismatch,
            "dtype_mismatch": self.dtype_mismatch,
            "l2": self.l2,
            "l2_per_parameter": self.l2_per_parameter,
            "max_abs": self.max_abs,
            "nonfinite": self.nonfinite,
            "tensors": rows,
            **({"notes": self.notes} if self.notes else {}),
        }

    def __str__(self) -> str:
        lines = [f"{self.compared} tensors compared: {'equal' if self.equal else 'different'}"]
        for title, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("other shape", self.shape_mismatch),
            ("other dtype", self.dtype_mismatch),
        ):
            lines += [f"  {title}: {name}" for name in names[:10]]
            lines += [f"  ... and {len(names) - 10} more {title}"] if len(names) > 10 else []
        differing = [row for row in self.tensors if row.l2 is not None or not row.expected]
        lines += [
            f"  differs: {row.name}" + ("" if row.l2 is None else f"  l2 {row.l2:.6g}  max {row.max_abs:.6g}") for row in differing[:10]
        ]
        lines += [f"  ... and {len(differing) - 10} more that differ"] if len(differing) > 10 else []
        lines.append(f"  L2 distance {self.l2:.6f}, per parameter {self.l2_per_parameter:.8f}, largest difference {self.max_abs:.6g}")
        if self.nonfinite:
            lines.append(f"  {self.nonfinite} differences are not finite and not in these figures")
        return join_lines([*lines, *(f"note: {note}" for note in self.notes)])


def compare(
    expected: Mapping[str, AnyNode],
    found: Mapping[str, AnyNode],
    *,
    workers: int = 2,
    max_memory: int | None = None,
    read_backend: str = "auto",
    norms: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Compares target nodes with tensors as they are stored, tile by tile.

    Args:
        expected: what should be: names and nodes.
        found: what is.
        workers: threads.
        max_memory: bytes the process may take in all.
        read_backend: how bytes are read.
        norms: whether to compute the size of differences.
        progress: told how many bytes were compared.

    Raises:
        BudgetError: ``max_memory`` is too small.
        RunError: an I/O error.
    """
    result = Comparison()
    result.missing = [name for name in expected if name not in found]
    result.unexpected = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    result.compared = len(both)
    work: list[str] = []
    for name in both:
        want, have = expected[name].spec, found[name].spec
        if want.shape != have.shape:
            result.shape_mismatch.append(name)
            result.tensors.append(TensorDifference(name, expected=str(want), found=str(have)))
            continue
        result.parameters += want.numel
        if want.dtype != have.dtype:
            result.dtype_mismatch.append(name)
        work.append(name)
    rows = {name: (expected[name], found[name]) for name in work}
    side_by_side = SideBySide(rows, Limits(workers, max_memory, read_backend), held=HELD)
    differences = side_by_side.run(lambda name, begin: _compare(name, *rows[name], begin, norms=norms), progress)
    for difference in differences.values():
        result.tensors.append(difference)
        result.nonfinite += difference.nonfinite
        result.l2 += difference.l2 or 0.0
        result.max_abs = max(result.max_abs, difference.max_abs or 0.0)
    return result


def _compare(name: str, left: AnyNode, right: AnyNode, begin: Begin, *, norms: bool) -> TensorDifference | None:
    """How two tensors of one shape differ; None: not at all."""
    same_dtype = left.spec.dtype == right.spec.dtype
    packed = left.spec.dtype.is_packed or right.spec.dtype.is_packed
    if packed and not same_dtype:
        return TensorDifference(name, expected=str(left.spec), found=str(right.spec))
    equal, squares, largest, nonfinite = same_dtype, 0.0, 0.0, 0
    for ours, theirs in begin():
        if same_dtype and (ours == theirs).all():
            continue
        equal = False
        if packed:  # bytes, not numbers
            return TensorDifference(name)
        if norms:
            figures = _measure(ours, theirs, left.spec.dtype.name, right.spec.dtype.name)
            squares, largest, nonfinite = squares + figures[0], max(largest, figures[1]), nonfinite + figures[2]
    if equal:
        return None
    want, have = ("", "") if same_dtype else (str(left.spec), str(right.spec))
    return TensorDifference(name, l2=math.sqrt(squares), max_abs=largest, nonfinite=nonfinite, expected=want, found=have)


def _measure(ours: Array, theirs: Array, left: str, right: str) -> tuple[float, float, int]:
    """Sum of squares, largest magnitude and number of non-finite elements of the difference in float32, of arrays of these dtypes."""
    import numpy as np

    from streamconv.graph.arrays import as_values

    squares, largest, nonfinite = 0.0, 0.0, 0
    for start in range(0, len(ours), PIECE):
        a, b = as_values(ours[start : start + PIECE], left), as_values(theirs[start : start + PIECE], right)
        kind = np.complex64 if "c" in (a.dtype.kind, b.dtype.kind) else np.float32
        with np.errstate(all="ignore"):  # infinities and NaN are counted
            difference = np.abs(a.astype(kind) - b.astype(kind))
        finite = np.isfinite(difference)
        if not finite.all():
            nonfinite += int((~finite).sum())
            difference = difference[finite]
        if difference.size:
            largest = max(largest, float(difference.max()))
            squares += _norm(difference) ** 2
    return squares, largest, nonfinite


def _norm(values: Array) -> float:
    """The L2 norm of float32 numbers, added up in float32 in the order in which torch does it: other tools print what torch says."""
    import numpy as np

    whole = len(values) // LANES * LANES
    rounded = len(values) // REST * REST  # further squares are not rounded before they are added
    with np.errstate(all="ignore"):
        squares = values[:rounded] * values[:rounded]
        lanes = np.add.reduce(squares[:whole].reshape(-1, LANES), axis=0)
        total = lanes[0]
        for part in (*lanes[1:], *squares[whole:]):
            total = total + part
        for value in values[rounded:].astype(np.float64):
            total = np.float32(value * value + np.float64(total))
        norm = float(np.sqrt(total))
    if 1e-12 < norm < 1e12:
        return norm
    return float(np.linalg.norm(values.astype(np.float64)))  # the squares have left the range of float32
