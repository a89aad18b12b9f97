"""Servers of plain files, and ranges of files over HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache
from html import unescape
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urljoin

from streamconv.errors import UsageError
from streamconv.storage import Entry
from streamconv.storage.addresses import WEB, private, refusal
from streamconv.storage.retries import READING, TRANSIENT, Failed, Refused, again, fault
from streamconv.storage.sources import CONCURRENT, HEAD, Probed, Store, Target, in_parallel

if TYPE_CHECKING:
    import requests

CONNECTING, SILENCE = 20.0, 60.0  # seconds until a connection is there, and between two of its packets
RECEIVED = 256 << 10  # bytes taken from a connection at a time, at most

_MAX_PAGE = 4 << 20  # bytes of a server's listing of a directory
_MAX_TEXT = 100_000_000  # bytes of an index
_DEPTH = 2  # folders below a checkpoint's that are looked into, where each takes a request ...
_FOLDERS = 256  # ... at most
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_KNOWN = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin", "model.ckpt", "latest",
    "consolidated.safetensors", "consolidated.00.pth", "consolidated.pth", "param_name_map.json", "config.json", "generation_config.json",
    "params.json", "model_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "README.md", "LICENSE",
)  # fmt: skip
_TELLING = ("latest", "param_name_map.json", "config.json")  # which other files there are, beside the indexes
_LINK = re.compile(r"""<a\s[^>]*?\bhref\s*=\s*("[^"]*"|'[^']*'|[^\s>]+)""", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


# Requests ------------------------------------------------------------------------------------------------------------


@cache
def _session() -> requests.Session:
    """The connections, of all threads."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in WEB:
        session.mount(f"{scheme}://", HTTPAdapter(pool_maxsize=256))
    return session


def _ask(url: str, target: Target, **more: str) -> requests.Response:
    """The answer to a GET, for ``url`` as it may be shown.

    Raises:
        Failed: the server is not there, or says that it may do better.
        UsageError: it cannot be asked.
    """
    address, headers = target[0], {"Accept-Encoding": "identity", **target[1], **more}
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


class Part:
    """Bytes [position, stop) of a file as a server sends them, by one request.

    Args:
        url: as it may be shown.
        target: what is asked.
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

    def __init__(self, url: str, target: Target, start: int, stop: int, size: int = -1) -> None:
        self.url, self.position, self.stop = url, start, stop
        self._answer = _ask(url, target, Range=f"bytes={start}-{stop - 1}")
        self.address = self._answer.url
        try:
            self.entry = self._check(size)
        except BaseException:
            self.close()
            raise

    def _check(self, size: int) -> Entry:
        status, headers = self._answer.status_code, self._answer.headers
        tag, given = headers.get("ETag") or headers.get("Last-Modified") or "", headers.get("Content-Range", "")
        if (status == 416 and given.endswith("*/0")) or (status == 200 and headers.get("Content-Length") == "0"):
            self.stop = self.position
            return Entry(0, tag)
        if status == 200 and not self.position and headers.get("Content-Length") == str(self.stop) == str(size):
            return Entry(size, tag)  # small, and asked for as a whole
        if status != 206:
            raise Refused(status, moved=bool(self._answer.history))
        if headers.get("Content-Encoding", "identity") != "identity":
            raise UsageError(f"{self.url}: the server sends its files compressed: switch that off there, or download the file")
        found = _CONTENT_RANGE.fullmatch(given.strip())
        if found is None or int(found[1]) != self.position or not self.position <= int(found[2]) < self.stop:
            raise Failed(f"other bytes than asked for ({given or 'no Content-Range'})")
        self.stop = int(found[2]) + 1
        return Entry(-1 if found[3] == "*" else int(found[3]), tag)

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


def _first(url: str, nbytes: int) -> tuple[Entry, bytes]:
    """A file's size, tag and first bytes."""

    def read() -> tuple[Entry, bytes]:
        with closing(Part(url, (private(url), {}), 0, nbytes)) as part:
            if part.entry.size < 0:
                raise Refused(200)
            data = memoryview(bytearray(part.stop))
            while part.position < part.stop:
                part.readinto(data[part.position :])
            return part.entry, bytes(data)

    return again(read, url, told=READING, small=True)


def _links(page: str, address: str) -> dict[str, None]:
    """The names directly below an address that the page there links to, folders' with a slash at the end."""
    above = address.partition("?")[0].rpartition("/")[0] + "/"
    names: dict[str, None] = {}
    for link in _LINK.findall(page):
        found = urljoin(above, unescape(link.strip("\"'")))
        name = unquote(found.removeprefix(above))
        if found.startswith(above) and not {"?", "#"} & {*found} and name.strip("/") and "/" not in name.rstrip("/"):
            names[name] = None
    return names


class Web(Store):
    """Servers of plain files."""

    def __init__(self) -> None:
        _session()  # so that a package that is missing is told of here

    def entry(self, url: str) -> Entry:
        return self.head(url, 1)[0]

    def head(self, url: str, nbytes: int = HEAD) -> tuple[Entry, bytes]:
        try:
            return _first(url, nbytes)
        except Refused as refused:
            raise refusal(url, refused.status) from None

    def target(self, url: str) -> Target:
        return private(url), {}

    def list(self, url: str) -> Mapping[str, Entry]:
        folder = url.rstrip("/") + "/"
        names = self._page(folder)
        if names is None:
            with suppress(Refused):
                return {"": _first(url, 1)[0]}
            return self._probe(url, folder)
        found: dict[str, Entry] = {}
        waiting: Sequence[tuple[str, Sequence[str]]] = [("", names)]
        for depth in range(_DEPTH + 1):
            folders = []
            for above, inside in waiting:
                found |= {above + name: Entry(-1) for name in inside if not name.endswith("/")}
                folders += [above + name for name in inside if name.endswith("/") and not name.startswith((".", "__pycache__"))]
            if len(folders) > _FOLDERS:
                raise UsageError(f"{url}: there are {len(folders)} folders below it: give the URL of one checkpoint")
            if depth < _DEPTH:
                listed = in_parallel(lambda name: self._page(folder + quote(name)) or (), folders)
                waiting = tuple(zip(folders, listed, strict=True))
        if "latest" in found or any(name.endswith(_WEIGHTS) for name in found):
            return found
        with suppress(UsageError):  # the page was about something else
            return self._probe(url, folder)
        return found

    def _page(self, folder: str) -> Sequence[str] | None:
        """The names on a server's page about a folder; None where it gives no such page."""

        def read() -> Sequence[str] | None:
            with _ask(folder, (private(folder), {})) as answer:
                if answer.status_code != 200 or "html" not in answer.headers.get("Content-Type", ""):
                    return None
                with _received():
                    page = answer.raw.read(_MAX_PAGE, decode_content=True).decode("utf-8", "replace")
                return tuple(_links(page, answer.url)) or None

        return again(read, folder, told=READING, small=True)

    def _probe(self, url: str, folder: str) -> Probed:
        """The files there that are called as those of checkpoints are; what an index names is taken to be there."""
        refused: set[int] = set()

        def look(name: str) -> Entry | None:
            try:
                return _first(folder + quote(name), 1)[0]
            except Refused as error:
                refused.add(error.status)
                return None

        def look_for(*names: str) -> dict[str, Entry]:
            return {name: entry for name, entry in zip(names, in_parallel(look, names), strict=True) if entry is not None}

        found = Probed()
        found.update(look_for(*_KNOWN))
        if not found:
            raise refusal(url, next((status for status in (401, 403, 200) if status in refused), 404))
        for name, entry in found.items():
            if name in _TELLING or name.endswith(".index.json"):
                found.read[name] = _first(folder + name, max(1, min(entry.size, _MAX_TEXT)))[1]
        series = {f"consolidated.00{suffix}": f"consolidated.{{:02}}{suffix}" for suffix in (".pth", ".pt")}
        for name, raw in found.read.items():
            if name == "latest":
                said = raw.decode("utf-8", "replace").strip()
                number = str(int(said)) if said.isdigit() else said
                series[f"{number}/mp_rank_00_model_states.pt"] = number + "/mp_rank_{:02}_model_states.pt"
                continue
            with suppress(ValueError, AttributeError, TypeError):  # reading it says what is wrong
                said = json.loads(raw)
                if name != "config.json":
                    found.update(dict.fromkeys(map(str, said.get("weight_map", said).values()), Entry(-1)) | found)
                else:
                    code = (str(value) for value in said.get("auto_map", {}).values())
                    found.update(look_for(*(f"{value.partition('.')[0]}.py" for value in code if "--" not in value)))
        for first, pattern in series.items():
            ranks = look_for(first)
            while ranks:
                more = look_for(*(pattern.format(len(ranks) + k) for k in range(CONCURRENT)))
                ranks |= more
                if len(more) < CONCURRENT:
                    break
            found.update(ranks)
        return found
