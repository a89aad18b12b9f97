"""Ranges of stored files: over HTTP by one streamed request each, from other stores in pieces; gone on with from the byte that came last.

Servers cut connections, stall and ask to wait. What came is kept, so only failures without a single byte between them are counted.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

from streamconv.errors import Interrupted, RunError, SourceChanged, StreamconvError, UsageError
from streamconv.storage import is_url
from streamconv.storage.sinks import Entry
from streamconv.storage.stores import CONCURRENT, Store, refusal, store_of

if TYPE_CHECKING:
    import requests

ATTEMPTS = 8  # failures in a row, without a byte between them, that are put up with
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0  # seconds before another attempt: doubled each time
LONGEST_ASKED = 300.0  # seconds that a server may ask to wait
CONNECTING, SILENCE = 20.0, 60.0  # seconds until a connection is there, and between two of its packets
RECEIVED = 256 << 10  # bytes taken from a connection at a time, at most
SKIPPED = 256 << 10  # bytes that are rather received for nothing than asked around
ENOUGH = 64 << 10  # bytes between two failures after which the next attempt need not wait
SMALLEST_PIECE, LARGEST_PIECE = 64 << 10, 2 << 20  # bytes of one request to a store that is not reached over HTTP
STREAMS = 4  # that one thread keeps open, for sources that are read by turns
MEMORY = LARGEST_PIECE * 2 + (2 << 20)  # bytes that a thread's connections take at most: a piece that is joined from parts, TLS contexts
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

_resolved: dict[str, str] = {}
"""Where requests to an address were sent on to another host: asked there directly until that is refused."""


class Fingerprint(NamedTuple):
    """What tells whether a file changed: size in bytes, modification time, bytes on disk; of a URL size and ETag."""

    size: int
    mtime_ns: int
    allocated: int
    tag: str = ""


def fingerprint(path: str) -> Fingerprint:
    """Looks at a file.

    Raises:
        OSError: no such file on this machine.
        StreamconvError: no such file behind a URL, or none that may be read.
    """
    if is_url(path):
        entry = store_of(path).entry(path)
        return Fingerprint(entry.size, 0, 0, entry.tag)
    found = os.stat(path)  # noqa: PTH116 - paths are texts here
    return Fingerprint(found.st_size, found.st_mtime_ns, getattr(found, "st_blocks", -(-found.st_size // 512)) * 512)


def fingerprints(paths: Iterable[str], known: Mapping[str, Entry] | None = None) -> dict[str, Fingerprint]:
    """`fingerprint` of each, of several URLs at a time, but for those whose entries are ``known``."""
    given = list(dict.fromkeys(paths))
    found = {path: Fingerprint(known[path].size, 0, 0, known[path].tag) for path in given if known and path in known}
    rest = [path for path in given if path not in found]
    if not any(map(is_url, rest)):
        return found | {path: fingerprint(path) for path in rest}
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return found | dict(zip(rest, pool.map(fingerprint, rest), strict=True))


def tag_of(headers: Mapping[str, str]) -> str:
    """What an HTTP response says about the version of its content."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


class _Failed(Exception):
    """An attempt failed in a way that the next one may not; ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Denied(RunError):
    """A server gives no range of a file, for the reason ``said``."""

    def __init__(self, said: UsageError) -> None:
        self.said = said
        super().__init__(f"{said}, then rerun the same command with --resume")


class _Stream(Protocol):
    """Bytes [position, stop) of a file, in order."""

    url: str
    position: int
    stop: int

    def readinto(self, view: memoryview) -> int:
        """Fills the beginning of ``view`` with what comes next; at least a byte, or it fails."""
        ...

    def close(self) -> None: ...


class _HttpStream:
    """The answer to one range request."""

    def __init__(
        self, session: requests.Session, url: str, target: tuple[str, dict[str, str]], known: Entry, start: int, stop: int
    ) -> None:
        self.url, self.position, self.stop = url, start, stop
        asked, headers = target
        address = _resolved.get(asked, asked)
        if address != asked:
            headers = {}
        headers = headers | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        # What the store gives as credentials must not be replaced by those of ~/.netrc.
        auth = (lambda request: request) if any(key.lower() == "authorization" for key in headers) else None
        try:
            self._response = session.get(address, headers=headers, stream=True, timeout=(CONNECTING, SILENCE), auth=auth)
        except (OSError, ValueError) as error:  # requests' own are OSErrors
            _resolved.pop(asked, None)
            raise _Failed(_describe(error)) from None
        try:
            self.found = self._check(known, asked if address != asked else "")
        except BaseException:
            self.close()
            raise
        if urlsplit(self._response.url).netloc != urlsplit(address).netloc:
            _resolved[asked] = self._response.url

    def _check(self, known: Entry, moved: str) -> Entry:
        """The file's size and version as the answer tells them; refuses one that is no good. ``moved``: the address that led elsewhere."""
        status, headers = self._response.status_code, self._response.headers
        if status in _TRANSIENT:
            raise _Failed(f"HTTP {status}", _asked_wait(headers.get("Retry-After", "")))
        if moved and status in (400, 401, 403, 404, 410):
            _resolved.pop(moved, None)
            raise _Failed(f"HTTP {status}", 0.0)  # an address that was signed for some time only ...
        if status == 403 and self._response.history:
            raise _Failed("HTTP 403")  # ... a short one
        if status == 416:
            raise SourceChanged(f"{self.url}: ends before byte {self.stop}, which was planned: it changed; plan again")
        if status == 200 and not self.position and headers.get("Content-Length") == str(self.stop) == str(known.size):
            return known  # small, and asked for as a whole
        if status == 200:
            raise UsageError(f"{self.url}: the server has no range requests, it sends whole files only: download it and give its path")
        if status != 206:
            raise _Denied(refusal(self.url, status))
        if headers.get("Content-Encoding", "identity") != "identity":
            raise UsageError(f"{self.url}: the server sends ranges {headers['Content-Encoding']}-encoded: switch that off there")
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != self.position or not self.position <= int(found[2]) < self.stop:
            raise _Failed(f"other bytes than asked for ({headers.get('Content-Range', 'no Content-Range')})")
        self.stop = int(found[2]) + 1
        size = known.size if found[3] == "*" else int(found[3])
        tag = tag_of(headers) if urlsplit(self.url).scheme in ("http", "https") else ""
        if known.size not in (-1, size):
            raise SourceChanged(f"{self.url}: planned with {known.size} bytes, now {size}: it changed; plan again")
        if known.tag and tag and _bare(known.tag) != _bare(tag):
            raise SourceChanged(f"{self.url}: planned as version {known.tag}, now {tag}: it changed; plan again")
        return Entry(size, known.tag or tag)

    def readinto(self, view: memoryview) -> int:
        try:
            # Not readinto, nor read: they drop what has come when the connection is cut before it is enough.
            data = self._response.raw.read1(min(len(view), RECEIVED, self.stop - self.position), decode_content=False)
        except Exception as error:  # noqa: BLE001 - of urllib3, http.client, ssl and the system
            raise _Failed(_describe(error)) from None
        if not data:
            raise _Failed("connection closed early")
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self._response.close()


class _PieceStream:
    """A range of a store without an address for HTTP, fetched piece by piece: smaller ones after a failure, larger ones after none."""

    def __init__(self, store: Store, url: str, start: int, stop: int, size: int) -> None:
        self.url, self.position, self.stop, self.size = url, start, stop, size
        self._store, self._data, self._at = store, b"", 0

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
            data = self._store.fetch(self.url, start, stop)
        except StreamconvError:
            raise
        except FileNotFoundError:
            raise SourceChanged(f"{self.url}: is not there any more; plan again") from None
        except PermissionError as error:
            raise RunError(
                f"{self.url}, byte {start}: {_describe(error)}: check that the credentials are still valid, then rerun with --resume"
            ) from None
        except Exception as error:  # noqa: BLE001 - every store has its own
            self.size = max(SMALLEST_PIECE, self.size // 2)
            raise _Failed(_describe(error)) from None
        if not 0 < len(data) <= stop - start:
            raise _Failed(f"{len(data)} bytes came, {stop - start} were asked for")
        if len(data) == self.size:
            self.size = min(LARGEST_PIECE, self.size * 2)
        return data

    def close(self) -> None:
        self._data = b""


class Ranges:
    """One thread's connections. What is announced by `expect` is asked for in one request and received as it is read.

    Args:
        known: size and version of files, by URL; those of others are taken from their first answer.
        stop: ends waits, and the reading, when it is set.
    """

    def __init__(self, known: Mapping[str, Entry] | None = None, stop: threading.Event | None = None) -> None:
        self._known, self._stop = dict(known or {}), stop or threading.Event()
        self._expected: list[tuple[str, int, int]] = []
        self._streams: list[_Stream] = []
        self._session: requests.Session | None = None
        self._size = LARGEST_PIECE // 2
        self._came = 0  # bytes since the last failure

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Announces what will be read next, front to back each: URL, first byte and the byte after the last."""
        self._expected = list(ranges)
        for stream in list(self._streams):
            if not any(url == stream.url and start <= stream.position < stop for url, start, stop in self._expected):
                self._drop(stream)

    def know(self, url: str, entry: Entry) -> None:
        """Has a file be what it is taken for; see ``known``."""
        self._known[url] = entry

    def read(self, url: str, offset: int, view: memoryview) -> None:
        """Fills ``view`` from byte ``offset``.

        Raises:
            SourceChanged: the file is another one than the one known, or ends before that.
            UsageError: the server has no range requests.
            RunError: no byte came in `ATTEMPTS` attempts, or access is refused.
            Interrupted: it was told to stop.
        """
        failures = 0
        while view:
            if self._stop.is_set():
                raise Interrupted("interrupted: rerun the same command with --resume")
            stream = None
            try:
                stream = self._at(url, offset, len(view))
                done = stream.readinto(view)
            except _Failed as failure:
                if stream is not None:
                    self._drop(stream)
                failures = 1 if self._came else failures + 1
                if failures == ATTEMPTS:
                    raise RunError(
                        f"{url}, byte {offset}: {failure}, {ATTEMPTS} times in a row: rerun the same command with --resume"
                    ) from None
                self._wait(failure, failures)
                continue
            view, offset, self._came = view[done:], offset + done, self._came + done
            if stream.position == stream.stop:
                self._drop(stream)

    def _at(self, url: str, offset: int, nbytes: int) -> _Stream:
        """The stream that goes on at ``offset``: one that is there already, or another one."""
        for stream in self._streams:
            if stream.url == url and stream.position <= offset < min(stream.stop, stream.position + SKIPPED + 1):
                return self._skip(stream, offset)
        announced = (stop for name, start, stop in self._expected if name == url and start <= offset < stop)
        stop = max(next(announced, 0), offset + nbytes)
        while len(self._streams) >= STREAMS:
            self._drop(self._streams[0])
        self._streams.append(self._open(url, offset, stop))
        return self._streams[-1]

    def _skip(self, stream: _Stream, offset: int) -> _Stream:
        try:
            while stream.position < offset:
                stream.readinto(memoryview(bytearray(min(offset - stream.position, SMALLEST_PIECE))))
        except _Failed:
            self._drop(stream)
            raise
        return stream

    def _open(self, url: str, start: int, stop: int) -> _Stream:
        store = store_of(url)
        target = store.target(url)
        if target is None:
            return _PieceStream(store, url, start, stop, self._size)
        if self._session is None:
            import requests

            self._session = requests.Session()
        stream = _HttpStream(self._session, url, target, self._known.get(url, Entry(-1)), start, stop)
        self._known[url] = stream.found
        return stream

    def _drop(self, stream: _Stream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
        if isinstance(stream, _PieceStream):
            self._size = stream.size
        if stream.position < stream.stop:  # else its connection is kept for the next
            stream.close()

    def _wait(self, failure: _Failed, failures: int) -> None:
        enough, self._came = self._came >= ENOUGH, 0
        if failure.wait is not None:
            seconds = min(failure.wait, LONGEST_ASKED)
        else:
            seconds = 0.0 if enough else min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)  # noqa: S311
        self._stop.wait(seconds)

    def close(self) -> None:
        """Closes the connections."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()
        if self._session is not None:
            self._session.close()
            self._session = None


def _bare(tag: str) -> str:
    """An ETag without its quotes: stores write them or not."""
    return tag.removeprefix("W/").strip('"')


def _describe(error: BaseException) -> str:
    """What went wrong, without addresses, which may hold secrets."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        at = at.__cause__ or at.__context__
    return type(error).__name__


def _asked_wait(text: str) -> float | None:
    """Seconds, as Retry-After gives them: a number of them, or a date."""
    if not text:
        return None
    try:
        return float(text) if text.isdigit() else max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


_own = threading.local()


def read_range(url: str, offset: int, view: memoryview, tag: str = "") -> None:
    """Fills ``view`` from byte ``offset`` of one file, whose version ``tag`` is, over this thread's connections.

    Raises:
        UsageError: access is refused; else as `Ranges.read`.
    """
    if not hasattr(_own, "ranges"):
        _own.ranges = Ranges()
    ranges: Ranges = _own.ranges
    ranges.know(url, Entry(-1, tag))
    try:
        ranges.read(url, offset, view)
    except _Denied as denied:
        raise denied.said from None
