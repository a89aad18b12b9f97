"""Servers of plain files, and ranges of files over HTTP."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache
from html import unescape
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urljoin

from streamconv.errors import UsageError
from streamconv.storage import Version
from streamconv.storage.addresses import WEB, private, refusal
from streamconv.storage.pace import Pace, waiting_for
from streamconv.storage.probing import probe
from streamconv.storage.retries import PATIENCE, READING, TRANSIENT, Failed, Refused, again, fault
from streamconv.storage.sources import HEAD, RECEIVED, Catalog, Request, Store, in_parallel

if TYPE_CHECKING:
    import requests

CONNECTING, SILENCE = 20.0, 60.0  # seconds until a connection is there, and between two of its packets
ANSWERING = 60.0  # seconds from a request until the last line of its answer's head, however many packets it comes in

_MAX_PAGE = 4 << 20  # bytes of a server's listing of a directory
_DEPTH = 2  # folders below a checkpoint's that are looked into, where each takes a request ...
_FOLDERS = 256  # ... at most
_Result = TypeVar("_Result")
_LINK = re.compile(r"""<a\s[^>]*?\bhref\s*=\s*("[^"]*"|'[^']*'|[^\s>]+)""", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


# Requests ------------------------------------------------------------------------------------------------------------


@cache
def _session() -> requests.Session:
    """The connections, of all threads."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Plain(HTTPConnection):
        def getresponse(self) -> Any:
            with _answered(self.sock):
                return super().getresponse()

    class Encrypted(HTTPSConnection):
        def getresponse(self) -> Any:
            with _answered(self.sock):
                return super().getresponse()

    pools = {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": Plain}),
        "https": type("EncryptedPool", (HTTPSConnectionPool,), {"ConnectionCls": Encrypted}),
    }
    session = requests.Session()
    for scheme in WEB:
        adapter = HTTPAdapter(pool_maxsize=256)
        adapter.poolmanager.pool_classes_by_scheme = pools
        session.mount(f"{scheme}://", adapter)
    return session


@contextmanager
def _answered(connection: socket.socket) -> Iterator[None]:
    """Ends a connection on which an answer's head is not there in time: timeouts only bound the silence between two packets."""

    def end() -> None:
        with suppress(OSError):  # the one of ssl's sockets would also drop what the reading thread holds
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(ANSWERING, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _ask(url: str, request: Request, **more: str) -> requests.Response:
    """The answer to a GET, for ``url`` as it may be shown.

    Raises:
        Failed: the server is not there, or says that it may do better.
        UsageError: it cannot be asked.
    """
    address, headers = request[0], {"Accept-Encoding": "identity", **request[1], **more}
    # What the store gives as credentials must not be replaced by those of ~/.netrc.
    auth = (lambda request: request) if any(key.lower() == "authorization" for key in headers) else None
    try:
        answer = _session().get(address, headers=headers, stream=True, timeout=(CONNECTING, SILENCE), auth=auth)
    except ValueError:
        raise UsageError(f"{url}: not an address that can be asked: check it") from None
    except OSError as error:  # requests' own are OSErrors, whose text may hold the address
        if "CERTIFICATE_VERIFY_FAILED" in repr(error):
            raise UsageError(f"{url}: the server's certificate is not one that is trusted: set REQUESTS_CA_BUNDLE") from None
        raise fault(error) from None
    if answer.status_code in TRANSIENT:
        answer.close()
        raise Failed(f"HTTP {answer.status_code}", _asked_wait(answer.headers.get("Retry-After", "")))
    return answer


@contextmanager
def _received() -> Iterator[None]:
    """Has what a connection fails with be `Failed`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of urllib3, http.client, ssl and the system
        raise fault(error) from None


def _asked_wait(text: str) -> float | None:
    """Seconds, as Retry-After gives them: a number of them, or a date."""
    try:
        return float(text) if text.isdigit() else max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


class RangeStream:
    """Bytes [position, stop) of a file as a server sends them, by one request.

    Args:
        url: as it may be shown.
        request: what is asked.
        start: the first byte.
        stop: the byte after the last; the server may send less.
        size: of the file in bytes, if that is known.

    Attributes:
        entry: the file's size - -1 where the server does not tell it - and version.
        address: where the answer came from.

    Raises:
        Failed: another attempt may do better.
        Refused: it will not; with 200 the server knows no ranges.
        UsageError: it cannot be asked.
    """

    def __init__(self, url: str, request: Request, start: int, stop: int, size: int = -1) -> None:
        self.url, self.position, self.stop = url, start, stop
        self._answer = _ask(url, request, Range=f"bytes={start}-{stop - 1}")
        self.address = self._answer.url
        try:
            self.entry = self._check(size)
        except BaseException:
            self.close()
            raise

    def _check(self, size: int) -> Version:
        status, headers = self._answer.status_code, self._answer.headers
        tag, content_range = headers.get("ETag") or headers.get("Last-Modified") or "", headers.get("Content-Range", "")
        if (status == 416 and content_range.endswith("*/0")) or (status == 200 and headers.get("Content-Length") == "0"):
            self.stop = self.position
            return Version(0, tag)
        if status == 200 and not self.position and headers.get("Content-Length") == str(self.stop) == str(size):
            return Version(size, tag)  # small, and asked for as a whole
        if status != 206:
            raise Refused(status, moved=bool(self._answer.history))
        if headers.get("Content-Encoding", "identity") != "identity":
            raise UsageError(f"{self.url}: the server sends its files compressed: switch that off there, or download the file")
        match = _CONTENT_RANGE.fullmatch(content_range.strip())
        if match is None or int(match[1]) != self.position or not self.position <= int(match[2]) < self.stop:
            raise Failed(f"other bytes than asked for ({content_range or 'no Content-Range'})")
        self.stop = int(match[2]) + 1
        return Version(-1 if match[3] == "*" else int(match[3]), tag)

    def readinto(self, view: memoryview) -> int:
        """Fills the beginning of ``view`` with what comes next; at least a byte, or it is `Failed`."""
        with _received():
            # Not readinto, nor read: they drop what has come when the connection is cut before it is enough.
            data = self._answer.raw.read1(min(len(view), RECEIVED, self.stop - self.position), decode_content=False)
        if not data:
            raise Failed("connection closed early")
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        """Ends it before its end."""
        self._answer.close()


def _first(url: str, nbytes: int) -> tuple[Version, bytes]:
    """A file's size, tag and first bytes."""

    def read() -> tuple[Version, bytes]:
        with closing(RangeStream(url, (private(url), {}), 0, nbytes)) as stream:
            if stream.entry.size < 0:
                raise Refused(200)
            data, pace = memoryview(bytearray(stream.stop)), Pace(PATIENCE)
            while stream.position < stream.stop:
                since = time.monotonic()
                done = stream.readinto(data[stream.position :])
                pace.add(time.monotonic() - since, done)
            return stream.entry, bytes(data)

    return _small(read, url)


def _small(read: Callable[[], _Result], url: str) -> _Result:
    """What a small request gives."""
    with waiting_for(url):
        return again(read, url, message=READING, small=True)


def _links(page: str, address: str) -> dict[str, None]:
    """The names directly below an address that the page there links to, folders' with a slash at the end."""
    above = address.partition("?")[0].rpartition("/")[0] + "/"
    names: dict[str, None] = {}
    for link in _LINK.findall(page):
        linked = urljoin(above, unescape(link.strip("\"'")))
        name = unquote(linked.removeprefix(above))
        if linked.startswith(above) and not {"?", "#"} & {*linked} and name.strip("/") and "/" not in name.rstrip("/"):
            names[name] = None
    return names


def _read_page(answer: requests.Response) -> str:
    """The text of a page, as far as it counts."""
    raw, pace = bytearray(), Pace(PATIENCE)
    while len(raw) < _MAX_PAGE:
        since = time.monotonic()
        with _received():
            some = answer.raw.read1(RECEIVED, decode_content=True)
        if not some:
            break
        raw += some
        pace.add(time.monotonic() - since, len(some))
    return raw[:_MAX_PAGE].decode("utf-8", "replace")


class Web(Store):
    """Servers of plain files."""

    def __init__(self) -> None:
        _session()  # so that a package that is missing is told of here

    def entry(self, url: str) -> Version:
        return self.head(url, 1)[0]

    def head(self, url: str, nbytes: int = HEAD) -> tuple[Version, bytes]:
        try:
            return _first(url, nbytes)
        except Refused as refused:
            raise refusal(url, refused.status) from None

    def request(self, url: str) -> Request:
        return private(url), {}

    def list(self, url: str, catalog: Catalog = Catalog()) -> Mapping[str, Version]:  # noqa: B008 - it is frozen
        folder = url.rstrip("/") + "/"
        names = self._page(folder)
        if names is None:
            with suppress(Refused):
                return {"": _first(url, 1)[0]}
            return probe(url, _first, catalog)
        files: dict[str, Version] = {}
        waiting: Sequence[tuple[str, Sequence[str]]] = [("", names)]
        for depth in range(_DEPTH + 1):
            folders = []
            for above, inside in waiting:
                files |= {above + name: Version(-1) for name in inside if not name.endswith("/")}
                folders += [above + name for name in inside if name.endswith("/") and not name.startswith((".", "__pycache__"))]
            if len(folders) > _FOLDERS:
                raise UsageError(f"{url}: there are {len(folders)} folders below it: give the URL of one checkpoint")
            if depth < _DEPTH:
                pages = in_parallel(lambda name: self._page(folder + quote(name)) or (), folders)
                waiting = tuple(zip(folders, pages, strict=True))
        if catalog.is_listing(files):
            return files
        with suppress(UsageError):  # the page was about something else
            return probe(url, _first, catalog)
        return files

    def _page(self, folder: str) -> Sequence[str] | None:
        """The names on a server's page about a folder; None where it gives no such page."""

        def read() -> Sequence[str] | None:
            with _ask(folder, (private(folder), {})) as answer:
                if answer.status_code != 200 or "html" not in answer.headers.get("Content-Type", ""):
                    return None
                return tuple(_links(_read_page(answer), answer.url)) or None

        return _small(read, folder)
