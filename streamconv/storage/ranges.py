"""Ranges of stored files: over HTTP by one streamed request each, from other stores in pieces; gone on with from the byte that came last.

Servers cut connections, stall and ask to wait. What came is kept, so only failures without a single byte between them are counted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from streamconv.errors import RunError, SourceChanged, StreamconvError, UsageError
from streamconv.storage import Version, is_url
from streamconv.storage.addresses import WEB, refusal, scheme_of
from streamconv.storage.pace import SPANS, Pace, waiting_for
from streamconv.storage.retries import READING, RUNNING, Failed, Refused, again, fault
from streamconv.storage.sources import RECEIVED, Answer, Request, Store, in_parallel
from streamconv.storage.stores import store_of

if TYPE_CHECKING:
    from streamconv.storage.web import RangeStream

SKIPPED = 256 << 10  # bytes that are rather received for nothing than asked around
ENOUGH = 64 << 10  # bytes between two failures after which the next attempt need not wait
SMALLEST_PIECE, LARGEST_PIECE = 64 << 10, 2 << 20  # bytes of one request to a store that is not reached over HTTP
STREAMS = 4  # that one thread keeps open, for sources that are read by turns
MEMORY = LARGEST_PIECE * 2 + (2 << 20)  # bytes that a thread's connections take at most: a piece that is joined from parts, TLS contexts
_TOLD = "{0}: {1}, {2} times in a row: rerun the same command with --resume"

_resolved: dict[str, str] = {}
"""Where requests to an address were sent on to another host: asked there directly until that is refused."""


class Fingerprint(NamedTuple):
    """What tells whether a file changed: size in bytes, modification time, bytes on disk; of a URL size and ETag."""

    size: int
    mtime_ns: int
    allocated: int
    tag: str = ""

    @property
    def version(self) -> Version:
        return Version(self.size, self.tag or str(self.mtime_ns))


def fingerprint(path: str) -> Fingerprint:
    """Looks at a file.

    Raises:
        OSError: no such file on this machine.
        StreamconvError: no such file behind a URL, or none that may be read.
    """
    if is_url(path):
        entry = store_of(path).entry(path)
        return Fingerprint(entry.size, 0, 0, entry.tag)
    status = os.stat(path)  # noqa: PTH116 - paths are texts here
    return Fingerprint(status.st_size, status.st_mtime_ns, getattr(status, "st_blocks", -(-status.st_size // 512)) * 512)


def fingerprints(paths: Iterable[str], known: Mapping[str, Version] | None = None) -> dict[str, Fingerprint]:
    """`fingerprint` of each, of several URLs at a time, but for those whose entries are ``known``."""
    distinct = list(dict.fromkeys(paths))
    prints = {path: Fingerprint(known[path].size, 0, 0, known[path].tag) for path in distinct if known and path in known}
    rest = [path for path in distinct if path not in prints]
    if not any(map(is_url, rest)):
        return prints | {path: fingerprint(path) for path in rest}
    return prints | dict(zip(rest, in_parallel(fingerprint, rest), strict=True))


def _ask(url: str, request: Request, version: Version, start: int, stop: int) -> RangeStream:
    """The answer to one range request, for a file that is as it is known."""
    from streamconv.storage.web import RangeStream

    original = request[0]
    address = _resolved.get(original, original)
    try:
        stream = RangeStream(url, request if address == original else (address, {}), start, stop, version.size)
    except Failed:
        _resolved.pop(original, None)
        raise
    except Refused as refused:
        _resolved.pop(original, None)
        if address != original or (refused.moved and refused.status == 403):  # it was signed for some time only
            raise Failed(str(refused), 0.0 if address != original else None) from None
        if refused.status == 416:
            raise SourceChanged(f"{url}: ends before byte {stop}, which was planned: it changed; plan again") from None
        error = refusal(url, refused.status)
        raise error if refused.status == 200 else RunError(f"{error}, then rerun the same command with --resume") from error
    size, tag = stream.entry.size, stream.entry.tag if scheme_of(url) in WEB else ""
    changed = ""
    if version.size != size and (-1 not in (size, version.size) or not size):
        changed = f"with {version.size} bytes, now {size}"
    elif version.tag and tag and _bare(version.tag) != _bare(tag):
        changed = f"as version {version.tag}, now {tag}"
    if changed:
        stream.close()
        raise SourceChanged(f"{url}: planned {changed}: it changed; plan again")
    stream.entry = Version(max(size, version.size), version.tag or tag)
    if urlsplit(stream.address).netloc != urlsplit(address).netloc:
        _resolved[original] = stream.address
    return stream


class _PieceStream:
    """A range of a store without an address for HTTP: one answer of it, where it gives such.

    Else it is fetched piece by piece: smaller ones after a failure, larger ones after none.
    """

    def __init__(self, store: Store, url: str, start: int, stop: int, size: int) -> None:
        self.url, self.position, self.stop, self.size = url, start, stop, size
        self._store, self._data, self._at = store, b"", 0
        self._answer: Answer | None = None

    def readinto(self, view: memoryview) -> int:
        if self._at == len(self._data):
            self._data, self._at = b"", 0
            self._data = self._fetch(self.position, min(self.stop, self.position + self.size))
        done = min(len(view), len(self._data) - self._at)
        view[:done] = memoryview(self._data)[self._at : self._at + done]
        self._at, self.position = self._at + done, self.position + done
        return done

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            data = self._receive(start, stop)
        except StreamconvError:
            raise
        except FileNotFoundError:
            raise SourceChanged(f"{self.url}: is not there any more; plan again") from None
        except PermissionError as error:
            raise RunError(
                f"{self.url}, byte {start}: {fault(error)}: check that the credentials are still valid, then rerun with --resume"
            ) from None
        except Exception as error:  # noqa: BLE001 - every store has its own
            self.size = max(SMALLEST_PIECE, self.size // 2)
            raise fault(error) from None
        if not 0 < len(data) <= stop - start:
            raise Failed(f"{len(data)} bytes came, {stop - start} were asked for")
        if len(data) == self.size:
            self.size = min(LARGEST_PIECE, self.size * 2)
        return data

    def _receive(self, start: int, stop: int) -> bytes:
        if self._answer is None:
            self._answer = self._store.receive(self.url, start, self.stop)
        if self._answer is None:
            return self._store.fetch(self.url, start, stop)
        return self._answer.read(min(stop - start, RECEIVED))

    def close(self) -> None:
        self._data = b""
        if self._answer is not None:
            self._answer.close()


class Ranges:
    """One thread's connections. What is announced by `expect` is asked for in one request and received as it is read.

    Args:
        versions: size and version of files, by URL; those of others are taken from their first answer.
        stop: ends waits, and the reading, when it is set.
        small: what is read is: there is less patience with a server that does not answer.
    """

    def __init__(self, versions: Mapping[str, Version] | None = None, stop: threading.Event | None = None, *, small: bool = False) -> None:
        self._small, self._pace = small, Pace()
        self._versions, self._stop = dict(versions or {}), stop or threading.Event()
        self._expected: list[tuple[str, int, int]] = []
        self._streams: list[RangeStream | _PieceStream] = []
        self._size = LARGEST_PIECE // 2
        self._came = 0  # bytes since the last failure

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Announces what will be read next, front to back each: URL, first byte and the byte after the last."""
        self._expected = list(ranges)
        for stream in list(self._streams):
            if not any(url == stream.url and start <= stream.position < stop for url, start, stop in self._expected):
                self._drop(stream)

    def know(self, url: str, entry: Version) -> None:
        """Has a file be what it is taken for; see ``versions``."""
        self._versions[url] = entry

    def read(self, url: str, offset: int, view: memoryview) -> None:
        """Fills ``view`` from byte ``offset``.

        Raises:
            SourceChanged: the file is another one than the one known, or ends before that.
            UsageError: the server has no range requests.
            RunError: no byte came in several attempts, or too few in a long time, or access is refused.
            Interrupted: it was told to stop.
        """
        message = READING if self._small else _TOLD
        while view:
            what = f"{url}, byte {offset}"
            with waiting_for(what):
                done = again(partial(self._some, url, offset, view), what, message=message, small=self._small, stop=self._stop)
            view, offset = view[done:], offset + done

    def _some(self, url: str, offset: int, view: memoryview) -> int:
        """Fills the beginning of ``view``, at least a byte; what was asked for by the time of a failure is dropped."""
        stream, since = None, time.monotonic()
        try:
            stream = self._at(url, offset, len(view))
            first = stream.position
            while stream.position < offset:
                stream.readinto(memoryview(bytearray(min(offset - stream.position, SMALLEST_PIECE))))
            done = stream.readinto(view)
            self._pace.add(time.monotonic() - since, stream.position - first)
        except Failed as failure:
            if stream is not None:
                self._drop(stream)
            if self._pace.slow >= SPANS:
                raise RunError(RUNNING.format(url, failure, self._pace.slow)) from None
            if failure.wait is None and self._came >= ENOUGH:
                failure.wait = 0.0
            self._came = 0
            raise
        self._came += done
        if stream.position == stream.stop:
            self._drop(stream)
        return done

    def _at(self, url: str, offset: int, nbytes: int) -> RangeStream | _PieceStream:
        """The stream that goes on at ``offset`` or shortly before: one that is there already, or another one."""
        for stream in self._streams:
            if stream.url == url and stream.position <= offset < min(stream.stop, stream.position + SKIPPED + 1):
                return stream
        announced = (stop for name, start, stop in self._expected if name == url and start <= offset < stop)
        stop = max(next(announced, 0), offset + nbytes)
        while len(self._streams) >= STREAMS:
            self._drop(self._streams[0])
        self._streams.append(self._open(url, offset, stop))
        return self._streams[-1]

    def _open(self, url: str, start: int, stop: int) -> RangeStream | _PieceStream:
        store = store_of(url)
        request = store.request(url)
        if request is None:
            return _PieceStream(store, url, start, stop, self._size)
        stream = _ask(url, request, self._versions.get(url, Version(-1)), start, stop)
        self._versions[url] = stream.entry
        return stream

    def _drop(self, stream: RangeStream | _PieceStream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
        if isinstance(stream, _PieceStream):
            self._size = stream.size
        if stream.position < stream.stop:  # else its connection is kept for the next
            stream.close()

    def close(self) -> None:
        """Closes the connections."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()


def join(reads: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Requests for ``reads`` - URL, offset, bytes - as URL, first byte, byte after the last: those that nearly follow one another are one.

    Reads that go by turns through a few files, or parts of one, are as many requests as there are such parts.
    """
    growing: list[tuple[str, int, int]] = []
    for url, offset, nbytes in reads:
        if not is_url(url):
            continue
        start, stop = offset, offset + nbytes
        for k, (name, first, end) in enumerate(growing):
            if name == url and end <= start <= end + SKIPPED:
                start = first
                del growing[k]
                break
        growing.append((url, start, stop))
        if len(growing) > STREAMS:
            yield growing.pop(0)
    yield from growing


def _bare(tag: str) -> str:
    """An ETag without its quotes: stores write them or not."""
    return tag.removeprefix("W/").strip('"')


_own = threading.local()


def _own_ranges() -> Ranges:
    """This thread's connections."""
    if not hasattr(_own, "ranges"):
        _own.ranges = Ranges(small=True)
    ranges: Ranges = _own.ranges
    return ranges


@contextmanager
def announced(reads: Iterable[tuple[str, int, int]]) -> Iterator[None]:
    """Has `read_range` ask at once for what nearly follows one another of these: paths, of which some are URLs, offset and bytes."""
    ranges = _own_ranges()
    ranges.expect(join(reads))
    try:
        yield
    finally:
        ranges.expect(())


def read_range(url: str, offset: int, view: memoryview, tag: str = "") -> None:
    """Fills ``view`` from byte ``offset`` of one file, whose version ``tag`` is, over this thread's connections.

    Raises:
        UsageError: access is refused; else as `Ranges.read`.
    """
    ranges = _own_ranges()
    ranges.know(url, Version(-1, tag))
    try:
        ranges.read(url, offset, view)
    except RunError as error:
        raise (error.__cause__ if isinstance(error.__cause__, UsageError) else error) from None
