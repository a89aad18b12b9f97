"""Makes a plan's files behind a URL: each a stream, front to back, several at once; what cannot be streamed is made here and uploaded.

A file can be streamed where its segments come in the order of the file and no checksum has to be written into it later, and the sink takes
streams. Else `LocalEngine` makes it in a temporary directory, one such file at a time, so that the room of the largest is enough.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from streamconv.engine.io import describe_os_error
from streamconv.engine.order import place_of
from streamconv.engine.worker import Worker, Workers
from streamconv.engine.writers import Stream
from streamconv.errors import unforeseen
from streamconv.planning.plan import Compute, Copy, FilePlan, Plan, Segment
from streamconv.running.filling import LocalEngine, Progress, check_files
from streamconv.running.log import Log
from streamconv.running.reclaim import find_reads
from streamconv.storage.objects import ObjectSink, stream_bytes, takes_streams
from streamconv.storage.retries import OVER, Failed, again
from streamconv.storage.sinks import Sink
from streamconv.storage.staging import staging
from streamconv.units import format_size

_log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds after Ctrl-C in which threads may take back what they have begun to send


def send_files(plan: Plan, numbers: Iterable[int], tell: Progress, check: Callable[[], object], sink: Sink) -> Counter[str]:
    """Makes these files of a plan in a sink, as `making.make_files` says."""
    wanted = list(numbers)
    streamed = [number for number in wanted if isinstance(sink, ObjectSink) and in_order(plan, plan.files[number])]
    overflowed: Counter[str] = Counter()
    if isinstance(sink, ObjectSink) and streamed:
        overflowed += _Streams(plan, sink, tell, check).run(streamed)
    return overflowed + _make_staged(plan, [number for number in wanted if number not in streamed], tell, check, sink)


def staged_bytes(plan: Plan) -> int:
    """Bytes of disk that making a plan's files behind a URL takes on this machine."""
    staged = [k for k, file in enumerate(plan.files) if not (takes_streams(plan.root) and in_order(plan, file))]
    return max((sum(plan.files[k].size for k in group) for group in _group(plan, staged)), default=0)


def in_order(plan: Plan, file: FilePlan) -> bool:
    """Whether a file can be made front to back."""
    places = [_start(plan, segment) for segment in file.segments]
    flat = all(isinstance(segment, Copy) or segment.move.dst_strides in ((), (1,)) for segment in file.segments)
    return flat and not file.checksums and places == sorted(places)


def _start(plan: Plan, segment: Segment) -> int:
    """Where in its file a segment begins, in bytes."""
    return place_of(plan, (0, segment, segment.move if isinstance(segment, Compute) else None))


# Streams -----------------------------------------------------------------------------------------------------------


class _Streams:
    """Threads that make files, a file each at a time."""

    def __init__(self, plan: Plan, sink: ObjectSink, tell: Progress, check: Callable[[], object]) -> None:
        self._plan, self._sink, self._tell, self._check = plan, sink, tell, check
        self._workers, self._lock = Workers(plan), threading.Lock()

    def run(self, numbers: list[int]) -> Counter[str]:
        """Makes these files; what has overflowed in them."""
        count = min(self._workers.count, len(numbers))
        room = self._plan.workers * stream_bytes(max(file.size for file in self._plan.files)) // count
        where = str(self._plan.destination)
        try:
            with unforeseen(where):
                self._workers.run(partial(self._work, room=room), numbers, count)
        except OSError as error:
            raise describe_os_error(error, where) from error
        finally:
            self._workers.stop.set()
            self._sink.discard(PATIENCE)
        return self._workers.overflowed

    def _work(self, numbers: Iterator[int], room: int) -> None:
        for number in numbers:
            self._check()
            self._make(number, self._workers.own, room)

    def _make(self, number: int, worker: Worker, room: int) -> None:
        """Makes a file, by a stream that may take ``room`` bytes of memory; from its beginning again where the sink fails."""
        file, overflowed = self._plan.files[number], worker.overflowed.copy()

        def attempt() -> None:
            counted = 0

            def hand_on(piece: memoryview) -> None:
                nonlocal counted
                worker.raise_if_stopped()
                send(piece)
                counted += len(piece)
                self._report(len(piece))

            worker.overflowed = overflowed.copy()
            try:
                with self._sink.stream(file.path, file.size, room) as send:
                    _send(self._plan, file, worker, Stream(hand_on))
                    reads = find_reads(self._plan, file)
                    check_files(source for source in self._plan.sources if source.path in reads)
            except Failed:
                self._report(-counted)
                raise

        again(attempt, self._sink.address(file.path), OVER, stop=self._workers.stop)
        _log.info("%s: %s done", file.path, format_size(file.size))

    def _report(self, nbytes: int) -> None:
        with self._lock:
            self._tell(nbytes)


def _send(plan: Plan, file: FilePlan, worker: Worker, stream: Stream) -> None:
    """Sends a file's bytes from the first to the last."""
    parts: list[tuple[int, bytes | Segment]] = [*file.literals, *((_start(plan, segment), segment) for segment in file.segments)]
    for start, part in sorted(parts, key=lambda item: item[0]):
        if isinstance(part, bytes):
            stream.write(memoryview(part), start)
        elif isinstance(part, Copy):
            worker.copy(part, stream)
        else:
            for tile in part.move.tiles(part.tile):
                worker.compute(part, tile, stream)
    stream.fill(file.size)


# Staging -----------------------------------------------------------------------------------------------------------


def _make_staged(plan: Plan, numbers: list[int], tell: Progress, check: Callable[[], object], sink: Sink) -> Counter[str]:
    """Makes files on this machine, uploads each and deletes it; what has overflowed in them."""
    overflowed: Counter[str] = Counter()
    for group in _group(plan, numbers):
        check()
        with staging() as folder:
            mine = replace(plan.for_files(group), root=str(folder), single=None)
            engine = LocalEngine(mine, Log(), tell)
            engine.run()
            sink.put({file.path: folder / file.path for file in mine.files})
            overflowed += engine.overflowed
    return overflowed


def _group(plan: Plan, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Files with tensors each by itself, the others together, with the commit if that is among them."""
    small = []
    for number in numbers:
        if plan.files[number].tensors and number != len(plan.files) - 1:
            yield [number]
        else:
            small.append(number)
    if small:
        yield small
