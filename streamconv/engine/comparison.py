"""Streamed comparison of what should be with what is, at any size in bounded memory."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from streamconv.engine.io import share_descriptors
from streamconv.engine.readers import Reader, make_reader
from streamconv.errors import BudgetError, RunError, unforeseen
from streamconv.graph.moves import Move, identity, region
from streamconv.graph.node import AnyNode, Node, Source, items_of, trace
from streamconv.graph.tiles import boxes
from streamconv.notebook import table
from streamconv.planning.plan import source_files
from streamconv.storage import Version, is_url
from streamconv.storage.ranges import MEMORY
from streamconv.text import join_lines
from streamconv.threads import run_threads
from streamconv.units import format_size

if TYPE_CHECKING:
    from streamconv.graph.arena import Arena, Array

REMOTE_STEP = 8 << 20  # bytes of a side that are compared at a time where something is computed from what is remote
SHORT = 4 << 10  # bytes: pieces below which a tensor is not read front to back
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
    ``nonfinite`` and kept out of ``l2`` and ``max_abs``. ``equal``: same names, dtypes, shapes and bytes.
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
        return join_lines(lines)


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
    comparer = _Comparer(expected, found, workers=workers, max_memory=max_memory, read_backend=read_backend, norms=norms, progress=progress)
    for difference in comparer.run(work):
        result.tensors.append(difference)
        result.nonfinite += difference.nonfinite
        result.l2 += difference.l2 or 0.0
        result.max_abs = max(result.max_abs, difference.max_abs or 0.0)
    return result


class _Comparer:
    """The threads of a comparison; each has an arena for evaluating both sides of one step."""

    def __init__(
        self,
        expected: Mapping[str, AnyNode],
        found: Mapping[str, AnyNode],
        *,
        workers: int,
        max_memory: int | None,
        read_backend: str,
        norms: bool,
        progress: Callable[[int], None],
    ) -> None:
        self._expected, self._found = expected, found
        self._norms, self._progress = norms, progress
        self._backend = read_backend
        paths = source_files([*expected.values(), *found.values()])
        self._urls = {path: Version(-1) for path in paths if is_url(path)}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._workers, self._max_memory = workers, max_memory
        self._descriptors = 1
        self._results: dict[str, TensorDifference] = {}

    def run(self, names: list[str]) -> Iterator[TensorDifference]:
        """Compares these tensors; yields those that differ, in order."""
        from streamconv import memory
        from streamconv.graph.arena import Arena
        from streamconv.graph.evaluate import COMPARE, arena_bytes, prepare

        pairs = [(self._expected[name], self._found[name]) for name in names]
        nodes = [items_of(node) for pair in pairs for node in pair if isinstance(node, Node)]
        scattered = any(isinstance(found, Node) for _, found in pairs)
        prepare(nodes)
        self._step = REMOTE_STEP if self._urls and nodes else COMPARE
        free = sys.maxsize if self._max_memory is None else self._max_memory - memory.resident() - (8 << 20) - HELD * len(names)
        while True:
            arena = max((arena_bytes(node, self._step, scattered=scattered) for node in nodes), default=COMPARE) + 2 * self._step
            each = 2 * arena + (MEMORY if self._urls else 0)
            if self._step == COMPARE or free >= 4 * each:
                break
            self._step //= 2
        if self._max_memory is not None and free < each:
            needed = -(-(self._max_memory - free + each) // 10**6) * 10**6
            raise BudgetError(f"--max-memory {format_size(self._max_memory)} is too small to compare; use {needed // 10**6}MB", needed)
        self._workers = max(1, min(self._workers, free // each))
        self._workers, self._descriptors = share_descriptors(self._workers)
        try:
            with unforeseen("while comparing"):
                run_threads(self._workers, lambda names: self._work(names, Arena(arena)), names, self._stop)
        except OSError as error:
            raise RunError(f"while comparing: {type(error).__name__}: {error}") from error
        yield from (self._results[name] for name in names if name in self._results)

    def _work(self, names: Iterator[str], arena: Arena) -> None:
        reader = make_reader(self._backend, self._descriptors, self._urls, self._stop)
        try:
            for name in names:
                difference = self._compare(name, arena, reader)
                with self._lock:
                    self._progress(self._found[name].spec.nbytes)
                    if difference:
                        self._results[name] = difference
        finally:
            reader.close()

    def _compare(self, name: str, arena: Arena, reader: Reader) -> TensorDifference | None:
        left, right = self._expected[name], self._found[name]
        same_dtype = left.spec.dtype == right.spec.dtype
        packed = left.spec.dtype.is_packed or right.spec.dtype.is_packed
        if packed and not same_dtype:
            return TensorDifference(name, expected=str(left.spec), found=str(right.spec))
        left, right = items_of(left), items_of(right)
        equal, squares, largest, nonfinite = same_dtype, 0.0, 0.0, 0
        for ours, theirs in self._steps(left, right, arena, reader):
            if same_dtype and (ours == theirs).all():
                continue
            equal = False
            if packed:  # bytes, not numbers
                return TensorDifference(name)
            if self._norms:
                figures = _measure(ours, theirs, left.spec.dtype.name, right.spec.dtype.name)
                squares, largest, nonfinite = squares + figures[0], max(largest, figures[1]), nonfinite + figures[2]
        if equal:
            return None
        want, have = ("", "") if same_dtype else (str(left.spec), str(right.spec))
        return TensorDifference(name, l2=math.sqrt(squares), max_abs=largest, nonfinite=nonfinite, expected=want, found=have)

    def _steps(self, left: AnyNode, right: AnyNode, arena: Arena, reader: Reader) -> Iterator[tuple[Array, Array]]:
        """Both sides, a step at a time, as unsigned integers."""
        from streamconv.graph.evaluate import evaluate, reads

        for move, ahead in self._moves(left, right):
            mark, parts = arena.mark, []
            reader.expect(chain.from_iterable(reads(node, ahead if isinstance(node, Source) else move) for node in (left, right)))
            for node in (left, right):
                part = arena.take(move.numel, node.spec.dtype.itemsize)
                evaluate(node, move, part, arena, reader.read)
                parts.append(part)
            yield parts[0], parts[1]
            arena.release(mark)

    def _moves(self, left: AnyNode, right: AnyNode) -> Iterator[tuple[Move, Move]]:
        """The steps of a tensor, and what of a stored one will be read from each on: front to back, or as short pieces are best read."""
        itemsize, total = max(left.spec.dtype.itemsize, right.spec.dtype.itemsize), left.spec.numel
        step = self._step // itemsize
        scattered = next(filter(self._is_scattered, (left, right)), None)
        if scattered is not None:
            yield from ((region(box), region(box)) for box in boxes(scattered, step))
            return
        for start in range(0, total, step):
            yield identity(min(step, total - start), start), identity(total - start, start)

    def _is_scattered(self, node: AnyNode) -> bool:
        """Whether a tensor is rather read in boxes than front to back: it lies in stored ones, in short pieces or behind URLs."""
        if not isinstance(node, Node):
            return False
        pieces = list(trace(node, identity(node.spec.numel)))
        if not all(isinstance(piece.leaf, Source) for piece in pieces):
            return False
        moves = [piece.move.simplify() for piece in pieces]
        return bool(self._urls) or any(move.run < move.numel and move.run * node.spec.dtype.itemsize < SHORT for move in moves)


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
