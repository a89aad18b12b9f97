"""Object stores, and whatever else fsspec reaches, as the place of an output: each file is a stream of parts, written front to back."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from streamconv.errors import DestinationError, RunError, StreamconvError, UsageError
from streamconv.storage import Entry, is_url

PART = 5 << 20  # bytes of a part, unless there would be too many
PARTS = 9_000  # parts of a file at most: S3 takes 10,000
BUFFERED = 4  # parts that a stream holds at most: the one that fills, the one on its way, and what the libraries make of it
COPIED = 1 << 20  # bytes that are handed on at a time
ATTEMPTS = 3  # to write a file or to remove one; the stores' own libraries make several of each request
_VERSIONS = ("ETag", "etag", "e_tag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created")
_REFUSED = re.compile("Credential|Token|Auth|Validation|NoRegion")  # in the names of errors of botocore, google.auth and the like
_log = logging.getLogger(__name__)


def takes_streams(url: str) -> bool:
    """Whether files are written front to back there as they come; else they are made on this machine first."""
    return is_url(url) and not url.startswith("hf://")


def part_size(size: int) -> int:
    """Bytes of a part of a file of ``size`` bytes."""
    return max(PART, -(-size // PARTS >> 20) + 1 << 20 if size > PART * PARTS else 0)


def stream_bytes(size: int) -> int:
    """Bytes of memory that writing a file of ``size`` bytes takes at most, beside what is written from."""
    return BUFFERED * min(part_size(size), max(size, 1 << 20))


class WriteFailed(Exception):
    """A store did not take what was written; another attempt may do better."""


class ObjectSink:
    """Files below a URL of any scheme that fsspec knows, those that were registered with it included."""

    pull_request = ""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = filesystem(self.url)
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._written: dict[str, Entry] = {}
        self._states: dict[str, bytes] = {}

    def list(self) -> Mapping[str, Entry]:
        """What is there; what this process has put there where the store tells nothing."""
        self._fs.invalidate_cache()
        try:
            found = self._again(lambda: self._fs.find(self._root, detail=True))
        except (FileNotFoundError, NotADirectoryError, NotImplementedError):
            found = {}
        names = {path.removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        return {name: _read_info(info) for name, info in names.items() if name and not name.endswith("/")} or self._written

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def holds(self, url: str) -> bool:
        return url.rstrip("/") == self.url

    def put(self, files: Mapping[str, Path | bytes]) -> None:
        """Puts complete files there, one after the other.

        Raises:
            DestinationError: access is refused, or there is no such bucket.
            RunError: the store failed several times.
        """
        for name, given in files.items():
            try:
                if isinstance(given, bytes):
                    self._again(lambda name=name, given=given: self._fs.pipe_file(f"{self._root}/{name}", given))  # type: ignore[misc]
                    self._written[name] = Entry(len(given))
                else:
                    self._send(name, given)
            except (FileNotFoundError, NotImplementedError) as error:
                raise self._refuse(error) from None

    def _send(self, name: str, path: Path) -> None:
        for attempt in range(ATTEMPTS):
            try:
                with path.open("rb") as file, self.stream(name, path.stat().st_size) as write:
                    while data := file.read(COPIED):
                        write(memoryview(data))
            except WriteFailed as failure:
                if attempt + 1 == ATTEMPTS:
                    raise failed(self.address(name), failure) from None
            else:
                return
            wait(attempt)

    @contextmanager
    def stream(self, name: str, size: int) -> Iterator[Callable[[memoryview], None]]:
        """What takes a file of ``size`` bytes piece by piece; the file is there when the block is left without an error.

        Raises:
            DestinationError: access is refused, or there is no such bucket.
            WriteFailed: the store did not take it; nothing of it is left.
        """
        path = f"{self._root}/{name}"
        with self._failing():
            file = self._fs.open(path, "wb", block_size=part_size(size))
        with self._lock:
            self._open[path] = file

        def write(view: memoryview) -> None:
            with self._failing():
                for start in range(0, len(view), COPIED):  # a larger piece would make a larger part
                    file.write(bytes(view[start : start + COPIED]))

        try:
            yield write
            with self._failing():
                file.close()
            self._written[name] = Entry(size)
        except BaseException:
            self._discard(file, path)
            raise
        finally:
            with self._lock:
                self._open.pop(path, None)

    def discard(self, patience: float = 0.0) -> None:
        """Takes back the streams that their threads have not closed after ``patience`` seconds, such as those of a slow network."""
        deadline = time.monotonic() + patience
        while self._open and time.monotonic() < deadline:
            time.sleep(0.05)
        with self._lock:
            left = list(self._open.items())
        for path, file in left:
            self._discard(file, path)

    def _discard(self, file: Any, path: str) -> None:
        """Has nothing remain of a file that is not complete."""
        from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

        with suppress(Exception):  # the error that led here matters more, and `abandon` comes back to it
            if isinstance(file, AbstractBufferedFile):
                file.discard()
                file.closed = True  # else its end would commit it
                return
            (file.discard if hasattr(file, "discard") else file.close)()
        with suppress(Exception):
            self._fs.rm_file(path)

    def remove(self, names: Collection[str]) -> None:
        for name in names:
            self._written.pop(name, None)
            with suppress(FileNotFoundError, NotImplementedError):
                self._again(lambda name=name: self._fs.rm_file(f"{self._root}/{name}"))  # type: ignore[misc]

    def abandon(self, names: Collection[str], *, others: bool) -> None:
        """Aborts the multipart uploads that are open, of these files and of ``others`` directly in the directory, where there are such."""
        if not hasattr(self._fs, "list_multipart_uploads"):
            return
        bucket, key, _ = self._fs.split_path(f"{self._root}/")
        markers: dict[str, str] = {}
        try:
            while True:
                found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key, **markers)
                for upload in found.get("Uploads") or []:
                    name = upload["Key"].removeprefix(key)
                    if name in names or (others and "/" not in name):
                        self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                if not found.get("IsTruncated"):
                    return
                markers = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}
        except Exception as error:  # noqa: BLE001 - some servers do not list them, some do not allow it
            _log.info("%s: unfinished uploads of earlier runs cannot be listed (%s)", self.url, describe(error))

    def load_state(self, name: str) -> bytes | None:
        if (there := self.list()) is self._written or name not in there:
            return self._states.get(name) if there is self._written else None
        found: bytes = self._again(lambda: self._fs.cat_file(f"{self._root}/{name}"))
        return found

    def save_state(self, name: str, data: bytes) -> None:
        self.put({name: data})
        self._states[name] = data

    def drop_state(self, name: str) -> None:
        self.remove([name])
        self._states.pop(name, None)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Has a store's error be one of ours."""
        try:
            yield
        except StreamconvError:
            raise
        except Exception as error:  # noqa: BLE001 - every store has its own
            if _is_final(error):
                raise self._refuse(error) from None
            raise WriteFailed(describe(error)) from None

    def _again(self, call: Callable[[], Any]) -> Any:
        """What a call gives that may fail for some time; FileNotFoundError and NotImplementedError are its own business.

        Raises:
            DestinationError: another attempt would not change it.
            RunError: it failed `ATTEMPTS` times.
        """
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except (FileNotFoundError, NotADirectoryError, NotImplementedError):
                raise
            except Exception as error:  # noqa: BLE001 - every store has its own
                if _is_final(error):
                    raise self._refuse(error) from None
                reason = describe(error)
            wait(attempt)
        raise failed(self.url, reason)

    def _refuse(self, error: BaseException) -> StreamconvError:
        """The error for what the store will not take, however often it is asked."""
        scheme = self.url.partition("://")[0]
        remedy = {
            "s3": "check the bucket's name, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and AWS_ENDPOINT_URL",
            "gs": "check the bucket's name and GOOGLE_APPLICATION_CREDENTIALS",
        }.get(scheme, f"check the address and the credentials that fsspec's {scheme} file system looks for")
        said = f"{self.url}: cannot be written ({describe(error)}): {remedy}"
        return RunError(f"{said}, then rerun with --resume") if self._written else DestinationError(f"{said}, or give another DST")


def failed(url: str, reason: object) -> RunError:
    """The error for a store that has failed too often."""
    return RunError(f"{url}: {reason}, {ATTEMPTS} times in a row: mend that and rerun the same command with --resume")


def wait(attempt: int, stop: threading.Event | None = None) -> None:
    """Waits before another attempt, longer each time; ``stop`` ends it."""
    seconds = min(20.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
    (stop or threading.Event()).wait(seconds)


def describe(error: BaseException) -> str:
    """What went wrong, in one line without addresses and headers, which may hold secrets."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.strerror:
            return bare(at.strerror)
        at = at.__cause__ or at.__context__
    return bare(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def bare(text: str) -> str:
    """The first line of what a server says, without what may be secret."""
    return re.sub(r"(\w+://)[^\s'\"]*|\bhf_\w+", r"\1...", text.strip().split("\n")[0])[:300]


def _read_info(info: Mapping[str, Any]) -> Entry:
    return Entry(int(info.get("size") or 0), " ".join(str(info[key]) for key in _VERSIONS if info.get(key)))


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would not change it."""
    final = (PermissionError, FileNotFoundError, NotImplementedError, ValueError, TypeError, StreamconvError)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return isinstance(error, final) or str(status) in ("401", "403", "404") or bool(_REFUSED.search(type(error).__name__))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL's path in it.

    Raises:
        UsageError: there is none, or a package for it is missing.
    """
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        found: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url}: {error}: 'pip install streamconv[remote]' has what s3 and gs take") from None
    except ValueError:
        raise UsageError(f"{url}: nothing knows {scheme}://: give a path, or a URL of a store that fsspec knows") from None
    return found[0], found[1].rstrip("/")
