"""The threads of a run: each reads sources, computes tiles in memory of its own, and hands both to writers."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from streamconv.engine.io import CHUNK, data_ranges, is_sparse, share_descriptors
from streamconv.engine.order import tile_pieces
from streamconv.engine.readers import BACKENDS, known_urls, make_reader
from streamconv.engine.times import Times, keep
from streamconv.engine.writers import Writer
from streamconv.errors import Interrupted
from streamconv.graph.losses import Loss, Losses
from streamconv.graph.moves import Move, region
from streamconv.graph.node import Node
from streamconv.memory import BLOCK, keep_freed
from streamconv.planning.plan import Compute, Copy, Plan
from streamconv.storage import Version, is_url
from streamconv.threads import Item, run_threads

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from streamconv.graph.arena import Arena


class Worker:
    """A thread's reader, and the arena in which it computes.

    Args:
        plan: that its tasks are of.
        descriptors: files of a kind that it keeps open.
        urls: that it reads, too, with size and version.
        stop: has it end, with Interrupted, within a task.
    """

    def __init__(self, plan: Plan, descriptors: int, urls: Mapping[str, Version], stop: threading.Event) -> None:
        self._plan, self._stop = plan, stop
        self.reader = make_reader(plan.read_backend, descriptors, urls, stop)
        self._arena: Arena | None = None
        self._ahead: ThreadPoolExecutor | None = None
        self._is_sparse = cache(is_sparse)
        self.losses = Losses()
        """Of the values that this worker has evaluated, by target."""
        self.times = Times()
        self._thread = threading.get_ident()

    def close(self) -> None:
        if self._ahead:
            self._ahead.shutdown()
        self._arena = None  # which knows this worker: neither would go by itself
        self.reader.close()

    def _begin(self, work: Callable[[], None]) -> Callable[[], None]:
        """Has a thread beside this one do something; see `graph.arena.Begin`."""
        from concurrent.futures import ThreadPoolExecutor

        self._ahead = self._ahead or ThreadPoolExecutor(1)
        future = self._ahead.submit(work)

        def wait() -> None:
            with self.times.spent("read"):
                future.result()

        return wait

    def raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Interrupted(f"interrupted: {self._plan.destination} is incomplete; rerun the same command with --resume")

    def evaluate(self, segment: Compute, tile: Move) -> memoryview:
        """The bytes of a tile, packed; good until the next is asked for."""
        from streamconv.graph.arena import Arena
        from streamconv.graph.evaluate import evaluate, reads

        node = self._plan.nodes[segment.node]
        arena = self._arena = self._arena or Arena(self._plan.arena, self._begin, measures=self._plan.measures)
        arena.release(0)
        itemsize = node.spec.dtype.itemsize
        out = arena.take(tile.numel, itemsize, segment.dst + tile.dst * itemsize)
        self.reader.expect(reads(node, region(tile)))
        with self.times.spent("compute"):
            evaluate(node, region(tile), out, arena, self._read)
        if arena.overflowed or arena.loss:
            is_quantized = isinstance(node, Node) and node.op.counts == "unscaled"
            counted = Loss(unscaled=arena.overflowed) if is_quantized else Loss(overflowed=arena.overflowed)
            self.losses.add(self._plan.target_of(segment), counted + (arena.loss or Loss()))
            arena.overflowed, arena.loss = 0, None
        return out.data.cast("B")

    def digest(self, path: str, nbytes: int, kind: Callable[[], Any] = hashlib.sha256) -> str:
        """The digest of a file of this machine."""
        reader, buffer, digest = BACKENDS[self._plan.read_backend](2), self.reader.buffer(), kind()
        try:
            for start in range(0, nbytes, CHUNK):
                self.raise_if_stopped()
                size = min(CHUNK, nbytes - start)
                at = reader.load(path, start, size, buffer)
                digest.update(buffer[at : at + size])
        finally:
            reader.close()
        return str(digest.hexdigest())

    def _read(self, path: str, offset: int, view: memoryview) -> None:
        self.raise_if_stopped()
        with self.times.spent("read") if threading.get_ident() == self._thread else nullcontext():  # else this one waits for it
            self.reader.read(path, offset, view)

    def copy(self, segment: Copy, writer: Writer) -> int:
        """Has the writer take bytes as they are in a source; how many."""
        path, start, stop = self._plan.sources[segment.source].path, segment.offset, segment.offset + segment.nbytes
        self.reader.expect([(path, start, segment.nbytes)])
        if is_url(path):
            self._hand_over(path, start, segment.nbytes, segment.dst, writer)
            return segment.nbytes
        fd = self.reader.fd(path)
        for begin, end in data_ranges(fd, start, stop) if self._is_sparse(path) else [(start, stop)]:
            dst = segment.dst + begin - start
            with self.times.spent("copy"):
                is_copied = writer.copy_from(fd, begin, end - begin, dst, path)
            if not is_copied:
                self._hand_over(path, begin, end - begin, dst, writer)
        return segment.nbytes

    def _hand_over(self, path: str, offset: int, nbytes: int, dst: int, writer: Writer) -> None:
        """Reads a range by chunks, which all but the first begin at a block of the target."""
        buffer, position = self.reader.buffer(), 0
        while position < nbytes:
            self.raise_if_stopped()
            size = min(CHUNK - (dst + position) % BLOCK, nbytes - position)
            with self.times.spent("read"):
                at = self.reader.load(path, offset + position, size, buffer)
            with self.times.spent("write"):
                writer.write(buffer[at : at + size], dst + position)
            position += size

    def compute(self, segment: Compute, tile: Move, writer: Writer) -> int:
        """Has the writer take a tile; how many bytes."""
        itemsize = self._plan.nodes[segment.node].spec.dtype.itemsize
        items = self.evaluate(segment, tile)
        with self.times.spent("write"):
            for at, offset, nbytes in tile_pieces(tile, itemsize):
                writer.write(items[at : at + nbytes], segment.dst + offset)
        return tile.numel * itemsize


class Workers:
    """The workers of a run, one for each of its threads, as many as may have files open.

    Args:
        plan: that their tasks are of.
        urls: that they read beside the plan's sources, with size and version.

    Attributes:
        count: how many there may be.
        urls: all that they read.
        stop: is set to have them end.
        losses: of those that have ended; see `Worker.losses`.
    """

    def __init__(self, plan: Plan, urls: Mapping[str, Version] | None = None) -> None:
        if plan.nodes:
            keep_freed()
        self._plan = plan
        self.count, self._descriptors = share_descriptors(plan.workers)
        self.urls = {**known_urls(plan), **(urls or {})}
        self.stop, self.losses = threading.Event(), Losses()
        self._lock, self._local = threading.Lock(), threading.local()

    @property
    def own(self) -> Worker:
        """The worker of the thread that asks."""
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(self._plan, self._descriptors, self.urls, self.stop)
        worker: Worker = self._local.worker
        return worker

    def run(self, work: Callable[[Iterator[Item]], None], items: Iterable[Item], most: int | None = None) -> None:
        """Has the threads do their ``work``, ``most`` of them; see `run_threads`."""

        def work_and_close(queue: Iterator[Item]) -> None:
            try:
                work(queue)
            finally:
                self.close()

        run_threads(min(self.count, most or self.count), work_and_close, items, self.stop)

    def close(self) -> None:
        """Closes the worker of the thread that asks."""
        if hasattr(self._local, "worker"):
            self.own.close()
            with self._lock:
                self.losses += self.own.losses
            keep(self.own.times)
            del self._local.worker
