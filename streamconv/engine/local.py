"""The local engine: a plan's segments, ordered by source offset across all output files, run by a pool of threads.

Files are created at their final size under ``NAME.partial`` and filled in any order. A file that is complete is synced and
renamed; the plan's last file, the commit, only after all others.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.digests import read_patches
from streamconv.engine.direct import CHUNK, DirectWriter, blocks, shares_extents
from streamconv.engine.io import (
    FALLBACK_CHUNK,
    Files,
    PositionedReader,
    copy_range,
    data_ranges,
    describe_os_error,
    is_sparse,
    share_descriptors,
    sync_directory,
    write,
    write_data,
)
from streamconv.engine.journal import Journal
from streamconv.engine.order import Task, tasks_in_order, tile_pieces
from streamconv.engine.readers import BACKENDS, Reader
from streamconv.engine.threads import run_threads
from streamconv.errors import Interrupted, RunError, SourceChanged, StreamconvError
from streamconv.plan import Compute, Copy, Plan, Segment
from streamconv.runs import Move, region

if TYPE_CHECKING:
    from streamconv.evaluate import Arena

Progress = Callable[[int], None]
"""Told how many bytes of output have come since the last call."""


def partial(path: Path) -> Path:
    """The name of an output file until it is complete."""
    return path.with_name(f"{path.name}.partial")


def check_sources(plan: Plan) -> None:
    """Refuses sources that are not what was planned with.

    Raises:
        SourceChanged: size or modification time differ.
    """
    for source in plan.sources:
        try:
            found = Path(source.path).stat()
        except OSError as error:
            raise SourceChanged(f"{source.path}: planned with {source.size} bytes, now: {error.strerror}; plan again") from error
        if (found.st_size, found.st_mtime_ns) != (source.size, source.mtime_ns):
            raise SourceChanged(f"{source.path}: planned with {source.size} bytes, now {found.st_size} or newer: it changed; plan again")


class LocalEngine:
    """One run of a plan on this machine."""

    def __init__(self, plan: Plan, journal: Journal, progress: Progress = lambda _: None) -> None:
        self._plan, self._journal, self._progress = plan, journal, progress
        self._root = Path(plan.root)
        self._workers, self._descriptors = share_descriptors(plan.workers)
        self._targets = Files(os.O_RDWR, min(16, self._workers))
        self._is_direct = plan.read_backend == "auto" and not shares_extents(self._root)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._remaining: dict[int, int] = {}
        self._sparse: dict[int, bool] = {}
        self._local = threading.local()

    def run(self) -> None:
        """Runs the plan to its commit.

        Raises:
            RunError: an I/O error; what is done is kept.
            SourceChanged: a source is not what was planned with.
            Interrupted: Ctrl-C.
        """
        check_sources(self._plan)
        try:
            waiting = self._create()
            self._work(tasks_in_order(self._plan, waiting))
            check_sources(self._plan)
            self._commit()
        except OSError as error:
            raise describe_os_error(error, str(self._root)) from error
        finally:
            self._targets.close()

    # Files -----------------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self._root / self._plan.files[number].path

    def _create(self) -> list[int]:
        """Creates the files that are not finished, at their final size and with their literals; returns their numbers."""
        waiting = []
        for number, file in enumerate(self._plan.files):
            if file.path in self._journal.finished:
                self._progress(file.size)
                continue
            path = partial(self._path(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.truncate(fd, file.size)
                for offset, data in file.literals:
                    write(fd, memoryview(data), offset)
            finally:
                os.close(fd)
            self._progress(sum(len(data) for _, data in file.literals))
            waiting.append(number)
            self._remaining[number] = sum(_nbytes(self._plan, segment) for segment in file.segments)
        for number in waiting:
            if not self._remaining[number] and not self._is_commit(number):
                self._finish(number)
        return waiting

    def _is_commit(self, number: int) -> bool:
        return number == len(self._plan.files) - 1

    def _finish(self, number: int) -> None:
        """Makes a complete file durable and gives it its name."""
        path = self._path(number)
        temporary = partial(path)
        with self._targets.use(str(temporary)) as fd:
            self._seal(number, str(temporary), fd)
            os.fsync(fd)
        self._targets.close(str(temporary))
        temporary.replace(path)
        sync_directory(str(path.parent))
        with self._lock:
            self._journal.finish(self._plan.files[number].path)

    def _seal(self, number: int, path: str, fd: int) -> None:
        """Reads a file back where it has checksums, and writes them."""
        if not (checksums := self._plan.files[number].checksums):
            return
        reader = PositionedReader()

        def read(offset: int, view: memoryview) -> None:
            if self._stop.is_set():
                raise Interrupted(f"interrupted: {self._root} is incomplete; rerun the same command with --resume")
            reader.read(path, offset, view)

        try:
            for offset, data in read_patches(checksums, read, self._writer().buffer() if self._is_direct else self._buffer()):
                write(fd, memoryview(data), offset)
                self._progress(len(data))
        finally:
            reader.close()

    def _commit(self) -> None:
        last = len(self._plan.files) - 1
        if last in self._remaining:
            self._finish(last)
        self._journal.end()
        sync_directory(str(self._root))

    # Work ------------------------------------------------------------------------------------------------------

    def _work(self, tasks: Iterator[Task]) -> None:
        try:
            run_threads(self._workers, lambda: self._worker(tasks), self._stop)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {self._root} is incomplete; rerun the same command with --resume") from None
        except (OSError, StreamconvError):
            raise
        except Exception as error:
            raise RunError(f"{self._root}: {type(error).__name__}: {error}") from error

    def _worker(self, tasks: Iterator[Task]) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    task = next(tasks, None)
                if task is None:
                    return
                number, segment, tile = task
                done = self._copy(number, segment) if isinstance(segment, Copy) else self._compute(number, segment, tile)
                with self._lock:
                    self._remaining[number] -= done
                    complete = not self._remaining[number]
                    self._progress(done)
                if complete and not self._is_commit(number):
                    self._finish(number)
        finally:
            self._reader().close()
            self._writer().close()

    def _reader(self) -> Reader:
        """This thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = BACKENDS[self._plan.read_backend](self._descriptors)
        reader: Reader = self._local.reader
        return reader

    def _writer(self) -> DirectWriter:
        """This thread's direct writer."""
        if not hasattr(self._local, "writer"):
            self._local.writer = DirectWriter(self._descriptors)
        writer: DirectWriter = self._local.writer
        return writer

    def _is_sparse(self, number: int) -> bool:
        if number not in self._sparse:
            self._sparse[number] = is_sparse(self._reader().fd(self._plan.sources[number].path))
        return self._sparse[number]

    def _buffer(self) -> memoryview:
        """This thread's buffer for copies that the kernel cannot do."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, FALLBACK_CHUNK))
        buffer: memoryview = self._local.buffer
        return buffer

    def _copy(self, number: int, segment: Copy) -> int:
        source = self._plan.sources[segment.source].path
        fd = self._reader().fd(source)
        start, stop = segment.offset, segment.offset + segment.nbytes
        sparse = self._is_sparse(segment.source)
        path = str(partial(self._path(number)))
        with self._targets.use(path) as target:
            for begin, end in data_ranges(fd, start, stop) if sparse else [(start, stop)]:
                dst, nbytes = segment.dst + begin - start, end - begin
                if self._is_direct and self._writer().takes(path, nbytes):
                    self._copy_directly(source, begin, path, target, dst, nbytes)
                else:
                    copy_range(fd, target, begin, dst, nbytes, self._buffer, source)
        return segment.nbytes

    def _copy_directly(self, source: str, src: int, path: str, target: int, dst: int, nbytes: int) -> None:
        """Copies whole blocks of the target past the page cache, and the edges through it."""
        reader, writer = self._reader(), self._writer()
        first, last = blocks(dst, nbytes)
        shift = src - dst
        for begin, end in ((dst, first), (last, dst + nbytes)):
            if begin < end:
                copy_range(reader.fd(source), target, begin + shift, begin, end - begin, self._buffer, source)
        for start in range(first, last, CHUNK):
            size = min(CHUNK, last - start)
            reader.read(source, start + shift, writer.buffer()[:size])
            writer.write_buffer(path, target, start, size)

    def _arena(self) -> Arena:
        from streamconv.evaluate import Arena

        if not hasattr(self._local, "arena"):
            self._local.arena = Arena(self._plan.arena)
        arena: Arena = self._local.arena
        return arena

    def _compute(self, number: int, segment: Compute, tile: Move | None) -> int:
        from streamconv.evaluate import evaluate

        assert tile is not None
        node = self._plan.nodes[segment.node]
        itemsize = node.spec.dtype.itemsize
        arena = self._arena()
        mark = arena.mark
        out = arena.take(tile.numel, itemsize)
        evaluate(node, region(tile), out, arena, self._reader().read)
        packed, sparse = out.data.cast("B"), self._is_sparse(segment.source)
        path = str(partial(self._path(number)))
        with self._targets.use(path) as target:
            for at, offset, nbytes in tile_pieces(tile, itemsize):
                if sparse:
                    write_data(target, packed[at : at + nbytes], segment.dst + offset)
                elif self._is_direct:
                    self._writer().write(path, target, packed[at : at + nbytes], segment.dst + offset)
                else:
                    write(target, packed[at : at + nbytes], segment.dst + offset)
        arena.release(mark)
        return tile.numel * itemsize


def _nbytes(plan: Plan, segment: Segment) -> int:
    if isinstance(segment, Copy):
        return segment.nbytes
    return segment.move.numel * plan.nodes[segment.node].spec.dtype.itemsize
