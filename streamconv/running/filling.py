"""Fills output files in this process: a plan's segments, by source offset across all files, run by a pool of threads.

Files are created at their final size under ``NAME.partial`` and filled in any order. A file that is complete is synced and
renamed; the plan's last file, the commit, only after all others. Now and then what is done of the others is synced, too, and noted
in the log: a later run compares it, and finished files, with what the plan makes of the sources, and goes on from there.
Comparing costs nothing unless there was a crash; a digest of each file would have every run read all it has written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from streamconv.digests import Crc32, read_patches
from streamconv.engine.check import OutputCheck
from streamconv.engine.direct import allocate, shares_extents
from streamconv.engine.io import (
    NOFOLLOW,
    PositionedReader,
    describe_os_error,
    is_sparse,
    located,
    make_folders,
    sync_directory,
    write,
)
from streamconv.engine.order import Task, place_of, tasks_in_order
from streamconv.engine.worker import Workers
from streamconv.engine.writers import LocalFiles, Writer
from streamconv.errors import DestinationError, RunError, SourceChanged, UsageError, unforeseen, writing
from streamconv.graph.losses import TOO_LARGE, UNSCALED, Losses
from streamconv.graph.moves import Move
from streamconv.planning.plan import Compute, Copy, Plan, Segment, SourceFile
from streamconv.running.directory import PARTIAL, holds, partial
from streamconv.running.log import Log
from streamconv.running.reclaim import Reclaim, find_reads
from streamconv.running.sums import write_sums
from streamconv.storage import is_url
from streamconv.storage.ranges import fingerprint, fingerprints
from streamconv.units import format_size

SAVE_BYTES = 1 << 30  # bytes of output, at most, after which what is done is made durable and noted ...
SAVE_SECONDS = 10.0  # ... or after so long
LOOK_SECONDS = 30.0  # between two looks at a source behind a URL
_log = logging.getLogger(__name__)
Progress = Callable[[int], None]
"""Told how many bytes of output have come since the last call."""


def check_sources(plan: Plan, *, given_back: Container[str] = ()) -> None:
    """Refuses sources that are not what was planned with.

    Args:
        plan: whose sources they are.
        given_back: those that this conversion itself may have punched or removed.

    Raises:
        SourceChanged: size or modification time differ.
    """
    check_files(source for source in plan.sources if source.path not in given_back)


def check_files(planned: Iterable[SourceFile]) -> None:
    """Refuses source files that are not what was planned with. Raises SourceChanged."""
    sources = list(planned)
    remote = fingerprints(source.path for source in sources if is_url(source.path))
    for source in sources:
        try:
            now = remote.get(source.path) or fingerprint(source.path)
        except OSError as error:
            raise SourceChanged(f"{source.path}: planned with {source.size} bytes, now: {error.strerror}; plan again") from error
        if now.version != source.version:
            raise SourceChanged(f"{source.path}: planned with {source.size} bytes, now {now.size} or others: it changed; plan again")


class LocalEngine:
    """One run of a plan on this machine.

    Args:
        plan: what to run.
        log: what of the plan is done, and is noted as it becomes durable.
        progress: told of bytes of output.
        checksum: write `SUMS`, too.
        reclaim: makes the files one after the other, and gives back what each was made of.
        suffix: of an output file's name until it is complete; one of its own where others may be at the same file.
    """

    def __init__(
        self,
        plan: Plan,
        log: Log,
        progress: Progress = lambda _: None,
        *,
        checksum: bool = False,
        reclaim: Reclaim | None = None,
        suffix: str = PARTIAL,
    ) -> None:
        self._plan, self._log, self._progress = plan, log, progress
        self._checksum, self._reclaim, self._suffix = checksum, reclaim, suffix
        self._root = Path(plan.root)
        self._sources = {source.path: source for source in plan.sources}
        self._workers = Workers(plan)
        self._is_direct = plan.read_backend == "auto" and not shares_extents(self._root)
        self._targets = LocalFiles(min(16, self._workers.count), is_direct=self._is_direct)
        self._lock = threading.Lock()
        self._looked_at = dict.fromkeys(self._workers.urls, time.monotonic())
        self._remaining: dict[int, int] = {}
        self._keeps_holes: dict[int, bool] = {}
        self._saving = threading.Lock()
        self._unsaved: dict[int, list[int]] = {}
        self._unsaved_bytes, self._saved_at = 0, time.monotonic()
        self._save_bytes = min(SAVE_BYTES, max((file.size for file in plan.files), default=0) // 2)

    @property
    def losses(self) -> Losses:
        """See `Worker.losses`; of all workers of this run."""
        return self._workers.losses

    def run(self) -> None:
        """Runs the plan to its commit.

        Raises:
            RunError: an I/O error; what is done is kept.
            SourceChanged: a source is not what was planned with.
            KeyboardInterrupt: Ctrl-C.
        """
        self._check_sources()
        try:
            with writing():  # by an earlier run, too
                self._take_up()
                if self._reclaim:
                    self._reclaim.release(self._log.finished, self._log.finished)
                    for number in range(len(self._plan.files)):
                        self._make([number])
                else:
                    self._make(range(len(self._plan.files)))
                self._check_values()
                self._commit()
        except OSError as error:
            raise describe_os_error(error, str(self._root)) from error
        finally:
            self._workers.close()
            self._targets.close()

    def _check_values(self) -> None:
        """Raises RunError where values have overflowed, and none may."""
        for counts, said, advice in (
            (self.losses.overflowed, TOO_LARGE, "give another --dtype, or --keep-dtype"),
            (self.losses.unscaled, UNSCALED, "leave these modules alone with --ignore"),
        ):
            if self._plan.strict and counts:
                name = max(counts, key=lambda name: counts[name])
                raise RunError(
                    f"--strict-values: {sum(counts.values())} values of {len(counts)} tensors {said}, most of {name}: "
                    f"nothing is committed; {advice}, with --overwrite"
                )

    def _make(self, numbers: Iterable[int]) -> None:
        """Makes these files and, unless it is the commit, finishes them."""
        waiting = self._create(numbers)
        durable = {number: self._log.durable.get(self._plan.files[number].path, set()) for number in waiting}
        self._work(task for task in tasks_in_order(self._plan, waiting) if place_of(self._plan, task) not in durable[task[0]])
        self._check_sources()
        if self._reclaim:  # whose comparison takes as much memory as the work itself, which is over now
            for number in waiting:
                if self._plan.files[number].path not in self._log.finished and not self._is_commit(number):
                    self._finish(number)

    def _check_sources(self, paths: Iterable[str] | None = None) -> None:
        """Looks at these sources, or at all; not at those that may have been given back."""
        given_back = self._reclaim.touched(self._log.finished) if self._reclaim else ()
        try:
            check_files(self._sources[path] for path in (self._sources if paths is None else paths) if path not in given_back)
        except UsageError as error:  # access that has expired meanwhile
            raise RunError(f"{error}, then rerun the same command with --resume") from error

    def _look_at(self, path: str) -> None:
        """Checks a source that was just read; one behind a URL, whose answers are checked anyway, now and then."""
        if is_url(path):
            with self._lock:
                if time.monotonic() - self._looked_at[path] < LOOK_SECONDS:
                    return
                self._looked_at[path] = time.monotonic()
        self._check_sources({path})

    # Files -----------------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self._root / self._plan.files[number].path

    def _partial(self, number: int) -> Path:
        return partial(self._path(number), self._suffix)

    def _present_path(self, number: int) -> Path:
        return self._path(number) if self._plan.files[number].path in self._log.finished else self._partial(number)

    def _take_up(self) -> None:
        """Compares what an earlier run has left with what it should be; what differs is made again."""
        names = [file.path for file in self._plan.files]
        noted = [number for number, name in enumerate(names) if name in self._log.finished or name in self._log.durable]
        if not noted:
            return
        wrong = {number for number in noted if not holds(self._present_path(number), self._plan.files[number].size)}
        for number in set(noted) - wrong:
            _drop_cache(self._present_path(number))
        finished = [number for number in noted if names[number] in self._log.finished]
        hashed = [number for number in finished if self._log.finished[names[number]]]
        for number in set(hashed) - wrong:
            recorded = self._log.finished[names[number]]
            kind = Crc32 if recorded.startswith(Crc32.PREFIX) else hashlib.sha256
            if self._workers.own.digest(str(self._present_path(number)), self._plan.files[number].size, kind) != recorded:
                wrong.add(number)
        compared = [number for number in noted if number not in wrong and number not in hashed]
        check = OutputCheck(self._plan, path_of=self._present_path)
        wrong |= check.find_wrong_literals(number for number in compared if number in finished)
        tasks = tasks_in_order(self._plan, [number for number in compared if number not in wrong])
        wrong |= check.compare(filter(self._is_noted, tasks))
        for number in sorted(wrong):
            if self._reclaim and number in finished:
                raise DestinationError(f"{self._path(number)}: is damaged, and its source was given back: restore it from a copy")
            self._log.forget(names[number])
        for number in set(finished) - wrong:
            self._log.kept += self._plan.files[number].size
            self._progress(self._plan.files[number].size)

    def _is_noted(self, task: Task) -> bool:
        """Whether what a task writes is durable by the log: with all of its file, or by itself."""
        places = self._log.durable.get(self._plan.files[task[0]].path)
        return places is None or place_of(self._plan, task) in places

    def _create(self, numbers: Iterable[int]) -> list[int]:
        """Creates those files that are not finished, at their final size and with their literals; returns their numbers.

        Files of which something is durable are there.
        """
        waiting = [number for number in numbers if self._plan.files[number].path not in self._log.finished]
        for number in waiting:
            file, path = self._plan.files[number], self._partial(number)
            durable = self._log.durable.get(file.path, set())
            if not durable:
                make_folders(self._root, file.path)
                path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | NOFOLLOW | (0 if durable else os.O_CREAT | os.O_EXCL) | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.truncate(fd, file.size)
                self._keeps_holes[number] = any(map(self._is_sparse, {segment.source for segment in file.segments}))
                if self._is_direct and not self._keeps_holes[number]:
                    allocate(fd, file.size)
                for offset, data in file.literals:
                    write(fd, memoryview(data), offset)
            finally:
                os.close(fd)
            self._progress(sum(len(data) for _, data in file.literals))
            self._remaining[number] = sum(_nbytes(self._plan, segment) for segment in file.segments)
            if durable:
                done = sum(
                    _task_nbytes(self._plan, task) for task in tasks_in_order(self._plan, [number]) if place_of(self._plan, task) in durable
                )
                self._remaining[number] -= done
                self._log.kept += done
                self._progress(done)
        for folder in {str(self._path(number).parent) for number in waiting}:
            sync_directory(folder)
        for number in waiting:
            if not self._remaining[number] and not self._is_commit(number):
                self._finish(number)
        return waiting

    def _is_commit(self, number: int) -> bool:
        return number == len(self._plan.files) - 1

    def _finish(self, number: int) -> None:
        """Makes a complete file durable and gives it its name."""
        path, name, size = self._path(number), self._plan.files[number].path, self._plan.files[number].size
        temporary = partial(path, self._suffix)
        with self._targets.settled(str(temporary)) as fd:
            self._seal(number, str(temporary), fd)
            os.fsync(fd)
        self._check_sources(set(find_reads(self._plan, self._plan.files[number])))
        digest = ""
        if self._reclaim:
            self._compare(number)
        if self._checksum or self._reclaim:
            digest = self._workers.own.digest(str(temporary), size)
        elif self._is_costly(number):
            digest = self._workers.own.digest(str(temporary), size, Crc32)
        if self._checksum and self._is_commit(number):
            write_sums(self._plan, {**self._log.finished, name: digest}, self._suffix)
        with self._saving:
            self._targets.close(str(temporary))
            temporary.replace(path)
            sync_directory(str(path.parent))
            self._log.finish(name, digest)
            self._unsaved.pop(number, None)
        _log.info("%s: %s done", name, format_size(size))
        if self._reclaim:
            self._reclaim.release(self._log.finished, [name])

    def _is_costly(self, number: int) -> bool:
        """Whether a later run would have to ask servers again to compare a file with its sources, had it no digest."""
        return bool(self._workers.urls) and self._log.is_kept and not self._is_commit(number)

    def _compare(self, number: int) -> None:
        """Compares a file that is about to be finished with its sources, as the disk has it."""
        path = self._partial(number)
        _drop_cache(path)
        check = OutputCheck(self._plan, path_of=lambda _: path)
        if check.find_wrong_literals([number]) or check.compare(tasks_in_order(self._plan, [number])):
            raise RunError(f"{path}: does not hold what was written: check disk and memory, then rerun with --resume")

    def _seal(self, number: int, path: str, fd: int) -> None:
        """Reads a file back where it has checksums, and writes them."""
        if not (checksums := self._plan.files[number].checksums):
            return
        reader = PositionedReader()

        def read(offset: int, view: memoryview) -> None:
            self._workers.own.raise_if_stopped()
            reader.read(path, offset, view)

        try:
            for offset, data in read_patches(checksums, read, self._workers.own.reader.buffer()):
                write(fd, memoryview(data), offset)
                self._progress(len(data))
        finally:
            reader.close()

    def _commit(self) -> None:
        last = len(self._plan.files) - 1
        if self._plan.files[last].path not in self._log.finished:
            self._finish(last)
        elif self._checksum:
            write_sums(self._plan, self._log.finished, self._suffix)
        sync_directory(str(self._root))

    def _note(self, number: int, place: int, nbytes: int) -> None:
        """A task is done; what has gathered of these is made durable and noted when it is enough. Others wait when twice as much has."""
        with self._lock:
            self._unsaved.setdefault(number, []).append(place)
            self._unsaved_bytes += nbytes
            if not self._is_due():
                return
        with self._saving:
            with self._lock:
                if not self._is_due():
                    return
                pending, self._unsaved, self._unsaved_bytes = self._unsaved, {}, 0
            names = {file: self._plan.files[file].path for file in pending}
            done = {file: places for file, places in pending.items() if names[file] not in self._log.finished}
            for file in done:
                with self._targets.settled(str(self._partial(file))) as fd:
                    getattr(os, "fdatasync", os.fsync)(fd)
            if done:
                self._log.record({names[file]: places for file, places in done.items()})
            self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        return self._unsaved_bytes >= self._save_bytes or time.monotonic() - self._saved_at > SAVE_SECONDS

    # Work ------------------------------------------------------------------------------------------------------

    def _work(self, tasks: Iterator[Task]) -> None:
        with unforeseen(str(self._root)):
            self._workers.run(self._do, tasks)

    def _do(self, tasks: Iterator[Task]) -> None:
        for task in tasks:
            number, segment, tile = task
            with located(str(self._partial(number)), place_of(self._plan, task)):
                done = self._copy(number, segment) if isinstance(segment, Copy) else self._compute(number, segment, tile)
            if not self._reclaim and self._plan.sources:  # which changes them itself; a plan of constants has none
                self._look_at(self._plan.sources[segment.source].path)
            with self._lock:
                self._remaining[number] -= done
                complete = not self._remaining[number]
                self._progress(done)
            if not complete:
                self._note(number, place_of(self._plan, task), done)
            elif not self._is_commit(number) and not self._reclaim:
                self._finish(number)

    def _is_sparse(self, number: int) -> bool:
        path = self._plan.sources[number].path if self._plan.sources else ""  # a plan of constants has no sources at all
        return bool(path) and not is_url(path) and is_sparse(path)

    def _open(self, number: int) -> AbstractContextManager[Writer]:
        """A file that is being made, for this thread."""
        buffer, holes = self._workers.own.reader.buffer, self._keeps_holes[number]
        return self._targets.open(str(self._partial(number)), buffer, keeps_holes=holes)

    def _copy(self, number: int, segment: Copy) -> int:
        with self._open(number) as file:
            return self._workers.own.copy(segment, file)

    def _compute(self, number: int, segment: Compute, tile: Move | None) -> int:
        assert tile is not None
        with self._open(number) as file:
            return self._workers.own.compute(segment, tile, file)


def _nbytes(plan: Plan, segment: Segment) -> int:
    if isinstance(segment, Copy):
        return segment.nbytes
    return segment.move.numel * plan.nodes[segment.node].spec.dtype.itemsize


def _task_nbytes(plan: Plan, task: Task) -> int:
    _, segment, tile = task
    return segment.nbytes if isinstance(segment, Copy) else tile.numel * plan.nodes[segment.node].spec.dtype.itemsize if tile else 0


def _drop_cache(path: Path) -> None:
    """Has a file that is synced read from the disk next time."""
    if not hasattr(os, "posix_fadvise"):
        return
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
