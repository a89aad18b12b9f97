"""Tensors of one shape read side by side, a step of each at a time, by as many threads as memory allows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from streamconv.engine.io import share_descriptors
from streamconv.engine.readers import Reader, make_reader
from streamconv.errors import BudgetError, RunError, unforeseen
from streamconv.graph.moves import Move, identity, region
from streamconv.graph.node import AnyNode, Node, Source, items_of, trace
from streamconv.graph.tiles import boxes
from streamconv.planning.plan import source_files
from streamconv.storage import Version, is_url
from streamconv.storage.ranges import MEMORY
from streamconv.threads import run_threads
from streamconv.units import format_size

if TYPE_CHECKING:
    from streamconv.graph.arena import Arena, Array

    Begin = Callable[[], Iterator[tuple[Array, ...]]]
    """Begins with the steps of a row. What it gives is there until the next step."""

REMOTE_STEP = 8 << 20  # bytes of a side that are compared at a time where something is computed from what is remote
SHORT = 4 << 10  # bytes: pieces below which a tensor is not read front to back

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What reading may take.

    Attributes:
        workers: threads.
        max_memory: bytes the process may take in all; None: any.
        read_backend: how bytes are read.
    """

    workers: int = 2
    max_memory: int | None = None
    read_backend: str = "auto"


class SideBySide:
    """Rows of tensors by name, those of a row of one shape.

    Args:
        rows: what is read side by side.
        limits: what that may take.
        held: bytes that are kept of each row meanwhile.
        scratch: bytes that whoever looks at the steps takes in each thread.
        in_order: steps go from a tensor's first element to its last, whatever reads best.
        step: bytes of the widest of a row in a step, of which not all may be asked for; 0: as many as are read well.
    """

    def __init__(
        self,
        rows: Mapping[str, tuple[AnyNode, ...]],
        limits: Limits,
        *,
        held: int = 0,
        scratch: int = 0,
        in_order: bool = False,
        step: int = 0,
    ) -> None:
        self._rows = {name: tuple(map(items_of, row)) for name, row in rows.items()}
        paths = source_files(list(chain.from_iterable(rows.values())))
        self._urls = {path: Version(-1) for path in paths if is_url(path)}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._workers, self._limits = limits.workers, limits
        self._held, self._scratch, self._in_order = held, scratch, in_order
        self._step, self._is_fixed = step, step > 0
        self._descriptors = 1

    def run(self, look: Callable[[str, Begin], T | None], progress: Callable[[int], None] = lambda _: None) -> dict[str, T]:
        """What ``look`` says of each row of which it says anything.

        Args:
            look: gets a row's name, and what begins to read it, from its first step on, as unsigned integers; called in any thread.
            progress: told the bytes of the last tensor of each row that is done.

        Raises:
            BudgetError: the memory is too small.
            RunError: an I/O error.
        """
        from streamconv.graph.arena import Arena

        arena, results = self._plan_memory(), dict[str, T]()

        def work(names: Iterator[str]) -> None:
            own = Arena(arena)
            reader = make_reader(self._limits.read_backend, self._descriptors, self._urls, self._stop)
            try:
                for name in names:
                    row = self._rows[name]
                    result = look(name, partial(self._steps, row, own, reader))
                    with self._lock:
                        progress(row[-1].spec.nbytes)
                        if result is not None:
                            results[name] = result
            finally:
                reader.close()

        try:
            with unforeseen("while comparing"):
                run_threads(self._workers, work, list(self._rows), self._stop)
        except OSError as error:
            raise RunError(f"while comparing: {type(error).__name__}: {error}") from error
        return {name: results[name] for name in self._rows if name in results}

    def _plan_memory(self) -> int:
        """Bytes of each thread's arena; step, threads and files open at once become what goes with it."""
        from streamconv import memory
        from streamconv.graph.evaluate import COMPARE, arena_bytes, prepare

        rows, limit = list(self._rows.values()), self._limits.max_memory
        nodes = [node for row in rows for node in row if isinstance(node, Node)]
        scattered = any(isinstance(row[-1], Node) for row in rows)
        sides = max(map(len, rows), default=2)
        prepare(nodes)
        if not self._is_fixed:
            self._step = REMOTE_STEP if self._urls and nodes else COMPARE
        free = sys.maxsize
        if limit is not None:
            free = limit - memory.resident() - (8 << 20) - self._held * len(rows)
        while True:
            arena = max((arena_bytes(node, self._step, scattered=scattered) for node in nodes), default=self._step) + sides * self._step
            each = 2 * arena + self._scratch + (MEMORY if self._urls else 0)
            if self._step <= COMPARE or free >= 4 * each:
                break
            self._step //= 2
        if limit is not None and free < each:
            needed = -(-(limit - free + each) // 10**6) * 10**6
            raise BudgetError(f"--max-memory {format_size(limit)} is too small to compare; use {needed // 10**6}MB", needed)
        self._workers = max(1, min(self._workers, free // each))
        self._workers, self._descriptors = share_descriptors(self._workers)
        return arena

    def _steps(self, row: tuple[AnyNode, ...], arena: Arena, reader: Reader) -> Iterator[tuple[Array, ...]]:
        """All tensors of a row, a step at a time, as unsigned integers."""
        from streamconv.graph.evaluate import evaluate, reads

        for move, ahead in self._moves(row):
            mark, parts = arena.mark, []
            reader.expect(chain.from_iterable(reads(node, ahead if isinstance(node, Source) else move) for node in row))
            for node in row:
                part = arena.take(move.numel, node.spec.dtype.itemsize)
                evaluate(node, move, part, arena, reader.read)
                parts.append(part)
            try:
                yield tuple(parts)
            finally:  # who looks may have seen enough
                arena.release(mark)

    def _moves(self, row: tuple[AnyNode, ...]) -> Iterator[tuple[Move, Move]]:
        """The steps of a row, and what of a stored tensor will be read from each on: front to back, or as short pieces are best read."""
        itemsize, total = max(node.spec.dtype.itemsize for node in row), row[0].spec.numel
        step = self._step // itemsize
        scattered = None if self._in_order else next(filter(self._is_scattered, row), None)
        if scattered is not None:
            yield from ((region(box), region(box)) for box in boxes(scattered, step))
            return
        for start in range(0, total, step):
            move = identity(min(step, total - start), start)
            yield move, move if self._is_fixed else identity(total - start, start)

    def _is_scattered(self, node: AnyNode) -> bool:
        """Whether a tensor is rather read in boxes than front to back: it lies in stored ones, in short pieces or behind URLs."""
        if not isinstance(node, Node):
            return False
        pieces = list(trace(node, identity(node.spec.numel)))
        if not all(isinstance(piece.leaf, Source) for piece in pieces):
            return False
        moves = [piece.move.simplify() for piece in pieces]
        return bool(self._urls) or any(move.run < move.numel and move.run * node.spec.dtype.itemsize < SHORT for move in moves)
