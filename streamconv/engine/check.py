"""Reads finished files back and compares them with what the plan makes of the sources, byte for byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.digests import read_patches
from streamconv.engine.io import FALLBACK_CHUNK, data_ranges, is_sparse, share_descriptors
from streamconv.engine.order import Task, tasks_in_order, tile_pieces
from streamconv.engine.readers import BACKENDS, Reader
from streamconv.engine.threads import run_threads
from streamconv.errors import CoverageError
from streamconv.plan import Copy, FilePlan, Plan
from streamconv.runs import region

if TYPE_CHECKING:
    from streamconv.evaluate import Arena

STEP = FALLBACK_CHUNK // 2  # bytes of each side at a time


def check_replicas(plan: Plan) -> None:
    """Compares the tensors that stand for one another, before anything is written.

    Raises:
        CoverageError: they differ.
    """
    if not plan.checks:
        return
    from streamconv.evaluate import Arena, same_bytes

    arena, reader = Arena(plan.arena), BACKENDS[plan.read_backend](8)
    try:
        for left, right, names in plan.checks:
            if not same_bytes(plan.nodes[left], plan.nodes[right], arena, reader.read):
                raise CoverageError(
                    f"{names[0]} should hold the same bytes as {names[1]}, which stands for both, and does not: "
                    "one of them would be lost; keep both (--set tied=false, where the recipe has it), or mend the source"
                )
    finally:
        reader.close()


class OutputCheck:
    """A comparison of a plan's output files with its sources. Takes as many threads and as much memory as the run did."""

    def __init__(self, plan: Plan, progress: Callable[[int], None] = lambda _: None) -> None:
        self._plan, self._progress = plan, progress
        self._root = Path(plan.root)
        self._workers, self._descriptors = share_descriptors(plan.workers)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._different: str | None = None

    def run(self) -> str | None:
        """The path of a file that differs, or None."""
        buffer, reader = memoryview(bytearray(STEP)), self._make_reader()
        for file in self._plan.files:
            for offset, data in file.literals:
                if not self._same(str(self._root / file.path), offset, memoryview(data), buffer, reader):
                    reader.close()
                    return file.path
            if not self._checksums_are_right(file, buffer, reader):
                reader.close()
                return file.path
        reader.close()
        tasks = tasks_in_order(self._plan, range(len(self._plan.files)))
        run_threads(self._workers, lambda: self._work(tasks), self._stop)
        return self._different

    def _checksums_are_right(self, file: FilePlan, buffer: memoryview, reader: Reader) -> bool:
        """Whether a file's checksums are those of its bytes."""
        path = str(self._root / file.path)
        found = read_patches(file.checksums, lambda offset, view: reader.read(path, offset, view), buffer)
        return all(self._same(path, offset, memoryview(data), buffer, reader) for offset, data in found)

    def _work(self, tasks: Iterator[Task]) -> None:
        reader = self._make_reader()
        try:
            buffers = memoryview(bytearray(STEP)), memoryview(bytearray(STEP))
            arena = self._make_arena()
            while not self._stop.is_set():
                with self._lock:
                    task = next(tasks, None)
                if task is None:
                    return
                if not self._compare(task, buffers, arena, reader):
                    self._different = self._plan.files[task[0]].path
                    self._stop.set()
        finally:
            reader.close()

    def _make_reader(self) -> Reader:
        return BACKENDS[self._plan.read_backend](self._descriptors)

    def _make_arena(self) -> Arena | None:
        if not self._plan.arena:
            return None
        from streamconv.evaluate import Arena

        return Arena(self._plan.arena)

    def _compare(self, task: Task, buffers: tuple[memoryview, memoryview], arena: Arena | None, reader: Reader) -> bool:
        """Whether the bytes that a task wrote are in the file."""
        number, segment, tile = task
        path = str(self._root / self._plan.files[number].path)
        equal = True
        if isinstance(segment, Copy):
            source = self._plan.sources[segment.source].path
            for start, stop in self._filled(segment, reader.fd(source), reader.fd(path)):
                for at in range(start, stop, STEP):
                    given = buffers[0][: min(STEP, stop - at)]
                    reader.read(source, segment.offset + at, given)
                    equal = equal and self._same(path, segment.dst + at, given, buffers[1], reader)
            self._tell(segment.nbytes)
            return equal
        from streamconv.evaluate import evaluate

        assert tile is not None
        assert arena is not None
        node = self._plan.nodes[segment.node]
        itemsize, mark = node.spec.dtype.itemsize, arena.mark
        out = arena.take(tile.numel, itemsize)
        evaluate(node, region(tile), out, arena, reader.read)
        for at, offset, nbytes in tile_pieces(tile, itemsize):
            equal = equal and self._same(path, segment.dst + offset, out.data.cast("B")[at : at + nbytes], buffers[1], reader)
        arena.release(mark)
        self._tell(tile.numel * itemsize)
        return equal

    @staticmethod
    def _filled(segment: Copy, source: int, target: int) -> Iterator[tuple[int, int]]:
        """The ranges of a copy, from its start, that are not holes on both sides."""
        if not (is_sparse(source) and is_sparse(target)):
            yield 0, segment.nbytes
            return
        for fd, offset in ((source, segment.offset), (target, segment.dst)):
            for begin, end in data_ranges(fd, offset, offset + segment.nbytes):
                yield begin - offset, end - offset

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            self._progress(nbytes)

    def _same(self, path: str, offset: int, wanted: memoryview, buffer: memoryview, reader: Reader) -> bool:
        """Whether a file holds ``wanted`` at ``offset``."""
        for start in range(0, len(wanted), STEP):
            piece = wanted[start : start + STEP]
            reader.read(path, offset + start, buffer[: len(piece)])
            if piece != buffer[: len(piece)]:
                return False
        return True
