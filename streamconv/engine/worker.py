"""What one thread of an engine holds and does: it reads sources, computes tiles in memory of its own, writes to files of this machine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from streamconv.engine.direct import DirectWriter, blocks
from streamconv.engine.io import CHUNK, Files, copy_range, data_ranges, located, write, write_data
from streamconv.engine.order import tile_pieces
from streamconv.engine.readers import make_reader
from streamconv.errors import Interrupted
from streamconv.graph.moves import Move, region
from streamconv.planning.plan import Compute, Copy, Plan
from streamconv.storage import Entry, is_url

if TYPE_CHECKING:
    from streamconv.graph.evaluate import Arena


class Worker:
    """A thread's reader, and the arena in which it computes.

    Args:
        plan: that its tasks are of.
        descriptors: files of a kind that it keeps open.
        urls: that it reads, too, with size and version.
        stop: has it end, with Interrupted, within a task.
    """

    def __init__(self, plan: Plan, descriptors: int, urls: Mapping[str, Entry], stop: threading.Event) -> None:
        self._plan, self._stop = plan, stop
        self.reader = make_reader(plan.read_backend, descriptors, urls, stop)
        self._arena: Arena | None = None
        self.overflowed: Counter[str] = Counter()
        """The target whose values were too large for their dtype -> how many of those that this worker has evaluated."""

    def close(self) -> None:
        self.reader.close()

    def raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Interrupted(f"interrupted: {self._plan.destination} is incomplete; rerun the same command with --resume")

    def evaluate(self, segment: Compute, tile: Move) -> memoryview:
        """The bytes of a tile, packed; good until the next is asked for."""
        from streamconv.graph.evaluate import Arena, evaluate, reads

        node = self._plan.nodes[segment.node]
        arena = self._arena = self._arena or Arena(self._plan.arena)
        arena.release(0)
        out = arena.take(tile.numel, node.spec.dtype.itemsize)
        self.reader.expect(reads(node, region(tile)))
        evaluate(node, region(tile), out, arena, self._read)
        if arena.overflowed:
            self.overflowed[self._plan.target_of(segment)] += arena.overflowed
            arena.overflowed = 0
        return out.data.cast("B")

    def _read(self, path: str, offset: int, view: memoryview) -> None:
        self.raise_if_stopped()
        self.reader.read(path, offset, view)


class FileWorker(Worker):
    """A worker that writes to files of this machine.

    Args:
        targets: that it writes to, shared by all threads.
        is_direct: it goes past the page cache where that pays.
        is_sparse: whether a source, by its number, has holes, which are to stay holes.
    """

    def __init__(
        self,
        plan: Plan,
        descriptors: int,
        urls: Mapping[str, Entry],
        stop: threading.Event,
        *,
        targets: Files,
        is_direct: bool,
        is_sparse: Callable[[int], bool],
    ) -> None:
        super().__init__(plan, descriptors, urls, stop)
        self._targets, self._is_direct, self._is_sparse = targets, is_direct, is_sparse
        self._writer = DirectWriter(descriptors, self.reader.buffer)

    def close(self) -> None:
        super().close()
        self._writer.close()

    def copy(self, segment: Copy, path: str) -> int:
        """Does a task that takes bytes as they are; how many."""
        source = self._plan.sources[segment.source].path
        with self._targets.use(path) as target:
            if is_url(source):
                self._receive(source, segment, path, target)
                return segment.nbytes
            fd = self.reader.fd(source)
            start, stop = segment.offset, segment.offset + segment.nbytes
            for begin, end in data_ranges(fd, start, stop) if self._is_sparse(segment.source) else [(start, stop)]:
                dst, nbytes = segment.dst + begin - start, end - begin
                if self._is_direct and self._writer.takes(path, nbytes):
                    self._copy_directly(source, begin, path, target, dst, nbytes)
                else:
                    with located(source, begin):
                        copy_range(fd, target, begin, dst, nbytes, self.reader.buffer, source)
        return segment.nbytes

    def _copy_directly(self, source: str, src: int, path: str, target: int, dst: int, nbytes: int) -> None:
        """Copies whole blocks of the target past the page cache, and the edges through it."""
        reader, buffer = self.reader, self.reader.buffer()
        first, last = blocks(dst, nbytes)
        shift = src - dst
        for begin, end in ((dst, first), (last, dst + nbytes)):
            if begin < end:
                with located(source, begin + shift):
                    copy_range(reader.fd(source), target, begin + shift, begin, end - begin, reader.buffer, source)
        for start in range(first, last, CHUNK):
            self.raise_if_stopped()
            size = min(CHUNK, last - start)
            if at := reader.load(source, start + shift, size, buffer):
                buffer[:size] = buffer[at : at + size]
            self._writer.write_buffer(path, target, start, size)

    def _receive(self, source: str, segment: Copy, path: str, target: int) -> None:
        """Copies from a URL, by one request, front to back: whole blocks of the target past the page cache where it takes them so."""
        reader, writer, buffer = self.reader, self._writer, self.reader.buffer()
        at, end, shift = segment.dst, segment.dst + segment.nbytes, segment.offset - segment.dst
        reader.expect([(source, segment.offset, segment.nbytes)])
        first, last = blocks(at, segment.nbytes) if self._is_direct and writer.takes(path, segment.nbytes) else (end, end)
        while at < end:
            self.raise_if_stopped()
            size = min(CHUNK, (first if at < first else last if at < last else end) - at)
            reader.read(source, at + shift, buffer[:size])
            if first <= at < last:
                writer.write_buffer(path, target, at, size)
            else:
                write(target, buffer[:size], at)
            at += size

    def compute(self, segment: Compute, tile: Move, path: str) -> int:
        """Does a task that computes a tile; how many bytes."""
        itemsize = self._plan.nodes[segment.node].spec.dtype.itemsize
        packed = self.evaluate(segment, tile)
        with self._targets.use(path) as target:
            for at, offset, nbytes in tile_pieces(tile, itemsize):
                piece, place = packed[at : at + nbytes], segment.dst + offset
                if self._is_sparse(segment.source):
                    write_data(target, piece, place)
                elif self._is_direct:
                    self._writer.write(path, target, piece, place)
                else:
                    write(target, piece, place)
        return tile.numel * itemsize
