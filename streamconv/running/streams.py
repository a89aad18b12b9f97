"""Makes a plan's files behind a URL: parts of them at the same time, or each a stream; what cannot be streamed is made here and uploaded.

A file can be streamed where its segments come in the order of the file and no checksum has to be written into it later, and the sink takes
streams. Where a store takes parts of a file in any order, as S3 does, each thread makes a stretch of it and sends that, so that as many
connections as there are threads read and write one file. Elsewhere a thread makes a file, front to back. Else `LocalEngine` makes it in a
temporary directory, one such file at a time, so that the room of the largest is enough.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from streamconv.engine.io import describe_os_error
from streamconv.engine.worker import Worker, Workers
from streamconv.engine.writers import Stream
from streamconv.errors import unforeseen
from streamconv.graph.losses import Losses
from streamconv.planning.plan import Copy, FilePlan, Plan
from streamconv.running.filling import LocalEngine, Progress, check_files
from streamconv.running.log import Log
from streamconv.running.reclaim import find_reads
from streamconv.running.stretches import Stretch, cut, pieces_in_order, place_of_segment, send
from streamconv.storage.objects import ObjectSink, part_size, stream_bytes, takes_streams
from streamconv.storage.retries import OVER, Failed, again
from streamconv.storage.sinks import Sink
from streamconv.storage.staging import staging
from streamconv.storage.uploads import Upload
from streamconv.units import format_size

_log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds after Ctrl-C in which threads may take back what they have begun to send


def send_files(plan: Plan, numbers: Iterable[int], tell: Progress, check: Callable[[], object], sink: Sink) -> Losses:
    """Makes these files of a plan in a sink, as `making.make_files` says."""
    wanted = list(numbers)
    streamed = [number for number in wanted if isinstance(sink, ObjectSink) and in_order(plan, plan.files[number])]
    losses = Losses()
    if isinstance(sink, ObjectSink) and streamed:
        losses += _Streams(plan, sink, tell, check).run(streamed)
    losses += _make_staged(plan, [number for number in wanted if number not in streamed], tell, check, sink)
    return losses


def staged_bytes(plan: Plan) -> int:
    """Bytes of disk that making a plan's files behind a URL takes on this machine."""
    staged = [k for k, file in enumerate(plan.files) if not (takes_streams(plan.root) and in_order(plan, file))]
    return max((sum(plan.files[k].size for k in group) for group in _group(plan, staged)), default=0)


def in_order(plan: Plan, file: FilePlan) -> bool:
    """Whether a file can be made front to back."""
    places = [place_of_segment(plan, segment) for segment in file.segments]
    flat = all(isinstance(segment, Copy) or segment.move.dst_strides in ((), (1,)) for segment in file.segments)
    return flat and not file.checksums and places == sorted(places)


# Streams -----------------------------------------------------------------------------------------------------------


class _Streams:
    """Threads that make files: stretches of them each, where the sink takes parts, else a file each at a time."""

    def __init__(self, plan: Plan, sink: ObjectSink, tell: Progress, check: Callable[[], object]) -> None:
        self._plan, self._sink, self._tell, self._check = plan, sink, tell, check
        self._workers, self._lock = Workers(plan), threading.Lock()
        self._uploads: dict[int, Upload] = {}

    def run(self, numbers: list[int]) -> Losses:
        """Makes these files; what their values have lost."""
        where = str(self._plan.destination)
        try:
            with unforeseen(where):
                if self._sink.takes_parts:
                    self._workers.run(self._send_stretches, self._stretches(numbers))
                else:
                    count = min(self._workers.count, len(numbers))
                    room = self._plan.workers * stream_bytes(max(file.size for file in self._plan.files)) // count
                    self._workers.run(partial(self._send_files, room=room), numbers, count)
        except OSError as error:
            raise describe_os_error(error, where) from error
        finally:
            self._workers.stop.set()
            self._sink.discard(PATIENCE)
        return self._workers.losses

    # Parts

    def _stretches(self, numbers: Iterable[int]) -> Iterator[Stretch]:
        """What the threads take, file by file, so that few files are begun and not complete."""
        for number in numbers:
            file = self._plan.files[number]
            self._check()
            self._uploads[number] = self._sink.upload(file.path, file.size)
            yield from cut(self._plan, number, 2 * part_size(file.size))

    def _send_stretches(self, stretches: Iterator[Stretch]) -> None:
        filling = io.BytesIO()
        for stretch in stretches:
            self._send_stretch(stretch, self._workers.own, filling)

    def _send_stretch(self, stretch: Stretch, worker: Worker, filling: io.BytesIO) -> None:
        """Makes a stretch, part by part, each in the same memory; a part that fails is sent again, by itself."""
        number, rest = stretch.first, stretch.stop - stretch.start
        _set_size(filling, min(stretch.part, rest))

        def fill(view: memoryview) -> None:
            nonlocal number, rest
            worker.raise_if_stopped()
            while view:
                size = min(stretch.part, rest)
                done = min(len(view), size - filling.tell())
                filling.write(view[:done])
                view = view[done:]
                if filling.tell() == size:
                    self._send_part(stretch.file, number, filling.getvalue())
                    number, rest = number + 1, rest - size
                    _set_size(filling, min(stretch.part, rest))

        stream = Stream(fill, stretch.start)
        send(stretch.pieces, worker, stream)
        stream.fill(stretch.stop)
        if not stretch.part:
            self._send_part(stretch.file, number, b"")

    def _send_part(self, number: int, part: int, data: bytes) -> None:
        """Sends a part of a file, and completes the file if it is the last that was missing."""
        file, upload = self._plan.files[number], self._uploads[number]
        address, stop = self._sink.address(file.path), self._workers.stop
        is_last = again(partial(self._sink.send, upload, part, data), address, OVER, stop=stop)
        if is_last:
            self._check_sources(file)
            again(partial(self._sink.complete, upload, file.path, file.size), address, OVER, stop=stop)
            del self._uploads[number]
            _log.info("%s: %s done", file.path, format_size(file.size))
        self._report(len(data))

    # Whole files

    def _send_files(self, numbers: Iterator[int], room: int) -> None:
        for number in numbers:
            self._check()
            self._send_file(number, self._workers.own, room)

    def _send_file(self, number: int, worker: Worker, room: int) -> None:
        """Makes a file, by a stream that may take ``room`` bytes of memory; from its beginning again where the sink fails."""
        file, losses = self._plan.files[number], worker.losses.copy()

        def attempt() -> None:
            told = 0

            def hand_on(piece: memoryview) -> None:
                nonlocal told
                worker.raise_if_stopped()
                write(piece)
                told += len(piece)
                self._report(len(piece))

            worker.losses = losses.copy()
            try:
                with self._sink.stream(file.path, file.size, room) as write:
                    stream = Stream(hand_on)
                    send(pieces_in_order(self._plan, file), worker, stream)
                    stream.fill(file.size)
                    self._check_sources(file)
            except Failed:
                self._report(-told)
                raise

        again(attempt, self._sink.address(file.path), OVER, stop=self._workers.stop)
        _log.info("%s: %s done", file.path, format_size(file.size))

    def _check_sources(self, file: FilePlan) -> None:
        """Refuses to end a file whose sources are not what they were."""
        reads = find_reads(self._plan, file)
        check_files(source for source in self._plan.sources if source.path in reads)

    def _report(self, nbytes: int) -> None:
        with self._lock:
            self._tell(nbytes)


def _set_size(filling: io.BytesIO, nbytes: int) -> None:
    """Has a buffer be filled from its beginning to so many bytes; growing as it is filled, it would be copied and take more."""
    filling.truncate(nbytes)
    if nbytes:
        filling.seek(nbytes - 1)
        filling.write(b"\0")
    filling.seek(0)


# Staging -----------------------------------------------------------------------------------------------------------


def _make_staged(plan: Plan, numbers: list[int], tell: Progress, check: Callable[[], object], sink: Sink) -> Losses:
    """Makes files on this machine, uploads each and deletes it; what their values have lost."""
    losses = Losses()
    for group in _group(plan, numbers):
        check()
        with staging() as folder:
            mine = replace(plan.for_files(group), root=str(folder), single=None)
            engine = LocalEngine(mine, Log(), tell)
            engine.run()
            sink.put({file.path: folder / file.path for file in mine.files})
            losses += engine.losses
    return losses


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
