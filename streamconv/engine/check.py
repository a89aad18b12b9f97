"""Reads finished files back and compares them with what the plan makes of the sources, byte for byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from streamconv.digests import read_patches
from streamconv.engine.io import CHUNK, data_ranges, is_sparse
from streamconv.engine.order import Task, tasks_in_order, tile_pieces
from streamconv.engine.readers import Reader, known_urls, make_reader
from streamconv.engine.worker import Worker, Workers
from streamconv.errors import CoverageError, Interrupted
from streamconv.memory import BLOCK
from streamconv.planning.plan import Copy, Plan
from streamconv.storage import Version, is_url

STEP = CHUNK // 2  # bytes of each side at a time
HALF = STEP + BLOCK  # bytes of a reader's buffer for each side


def check_replicas(plan: Plan) -> None:
    """Compares the tensors that stand for one another, before anything is written.

    Raises:
        CoverageError: they differ.
    """
    if not plan.checks:
        return
    from streamconv.graph.arena import Arena
    from streamconv.graph.evaluate import same_bytes

    arena, reader = Arena(plan.arena), make_reader(plan.read_backend, 8, known_urls(plan))
    try:
        for left, right, names in plan.checks:
            if not same_bytes(plan.nodes[left], plan.nodes[right], arena, reader.read, reader.expect):
                raise CoverageError(
                    f"{names[0]} should hold the same bytes as {names[1]}, which stands for both, and does not: "
                    "one of them would be lost; keep both (--set tied=false, where the recipe has it), or mend the source"
                )
    finally:
        reader.close()


class OutputCheck:
    """A comparison of a plan's output files with its sources. Takes as many threads and as much memory as the run did.

    ``path_of`` gives the path under which a file, by its number, is to be found: its own, unless it is not finished.
    """

    def __init__(
        self, plan: Plan, progress: Callable[[int], None] = lambda _: None, path_of: Callable[[int], Path | str] | None = None
    ) -> None:
        self._plan, self._progress = plan, progress
        self._path_of = path_of or (lambda number: Path(plan.root) / plan.files[number].path)
        remote = enumerate(plan.files) if is_url(plan.root) else ()
        self._workers = Workers(plan, {str(self._path_of(number)): Version(file.size) for number, file in remote})
        self._lock = threading.Lock()
        self._different: set[int] = set()

    def run(self) -> str | None:
        """The path of a file that differs, or None."""
        numbers = range(len(self._plan.files))
        wrong = self.find_wrong_literals(numbers) or self.compare(tasks_in_order(self._plan, numbers), to_first=True)
        return self._plan.files[min(wrong)].path if wrong else None

    def find_wrong_literals(self, numbers: Iterable[int]) -> set[int]:
        """Those files whose literals are not what is planned or whose checksums are not those of its bytes."""
        reader, buffer = self._workers.own.reader, memoryview(bytearray(STEP))
        wrong = set()
        try:
            for number in numbers:
                file, path = self._plan.files[number], str(self._path_of(number))
                checksums = read_patches(file.checksums, partial(reader.read, path), buffer)
                if not all(self._same(path, offset, memoryview(data), reader) for offset, data in chain(file.literals, checksums)):
                    wrong.add(number)
        finally:
            self._workers.close()
        return wrong

    def compare(self, tasks: Iterator[Task], *, to_first: bool = False) -> set[int]:
        """The files that do not hold what one of the ``tasks`` has written, or the first of them that is found."""
        self._workers.run(partial(self._work, to_first=to_first), tasks)
        return self._different

    def _work(self, tasks: Iterator[Task], *, to_first: bool) -> None:
        try:
            for task in tasks:
                if task[0] not in self._different and not self._compare(task, self._workers.own):
                    self._different.add(task[0])
                    if to_first:
                        self._workers.stop.set()
        except Interrupted:
            if not (to_first and self._different):
                raise

    def _compare(self, task: Task, worker: Worker) -> bool:
        """Whether the bytes that a task wrote are in the file."""
        (number, segment, tile), reader = task, worker.reader
        path = str(self._path_of(number))
        equal = True
        if isinstance(segment, Copy):
            source = self._plan.sources[segment.source].path
            reader.expect([(source, segment.offset, segment.nbytes)])
            for start, stop in self._filled(segment, reader, source, path):
                for at in range(start, stop, STEP):
                    size = min(STEP, stop - at)
                    first = reader.load(source, segment.offset + at, size, reader.buffer()[:HALF])
                    equal = equal and self._same(path, segment.dst + at, reader.buffer()[first : first + size], reader)
            self._tell(segment.nbytes)
            return equal
        assert tile is not None
        itemsize = self._plan.nodes[segment.node].spec.dtype.itemsize
        items = worker.evaluate(segment, tile)
        for at, offset, nbytes in tile_pieces(tile, itemsize):
            equal = equal and self._same(path, segment.dst + offset, items[at : at + nbytes], reader)
        self._tell(tile.numel * itemsize)
        return equal

    @staticmethod
    def _filled(segment: Copy, reader: Reader, source: str, target: str) -> Iterator[tuple[int, int]]:
        """The ranges of a copy, from its start, that are not holes on both sides."""
        if is_url(source) or is_url(target) or not (is_sparse(reader.fd(source)) and is_sparse(reader.fd(target))):
            yield 0, segment.nbytes
            return
        for fd, offset in ((reader.fd(source), segment.offset), (reader.fd(target), segment.dst)):
            for begin, end in data_ranges(fd, offset, offset + segment.nbytes):
                yield begin - offset, end - offset

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            self._progress(nbytes)

    def _same(self, path: str, offset: int, data: memoryview, reader: Reader) -> bool:
        """Whether a file holds ``data``, which may lie in the first half of the reader's buffer, at ``offset``."""
        buffer = reader.buffer()[HALF:]
        for start in range(0, len(data), STEP):
            piece = data[start : start + STEP]
            first = reader.load(path, offset + start, len(piece), buffer)
            if not _equal(piece, buffer[first : first + len(piece)]):
                return False
        return True


def _equal(one: memoryview, other: memoryview) -> bool:
    """Whether two ranges of memory of the same length are equal; they are compared item by item, so the larger the items the better."""
    whole = len(one) // 8 * 8
    return one[:whole].cast("Q") == other[:whole].cast("Q") and one[whole:] == other[whole:]
