"""Object stores, and whatever else fsspec reaches, as the place of an output: a file's parts go several at a time, or front to back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from streamconv.errors import StreamconvError
from streamconv.storage import Version, is_url
from streamconv.storage.addresses import scheme_of, unwritable
from streamconv.storage.filesystems import asked, entry_of, open_filesystem
from streamconv.storage.retries import OVER, Refused, again, fault
from streamconv.storage.uploads import Upload

PART = 5 << 20  # bytes of a part, of which S3 takes no smaller ones, unless there would be too many, or there is room for larger ones ...
LARGEST = 64 << 20  # ... up to this: one that fails is sent again
PARTS = 9_000  # parts of a file at most: S3 takes 10,000
BUFFERED = 4  # parts that a stream holds at most: the one that fills, the one on its way, and what the libraries make of it
HELD = 6  # the same of larger parts, as one that failed may be held for a while
COPIED = 1 << 20  # bytes that are handed on at a time
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def takes_streams(url: str) -> bool:
    """Whether files are written front to back there as they come; else they are made on this machine first."""
    return is_url(url) and not url.startswith("hf://")


def part_size(size: int, room: int = 0) -> int:
    """Bytes of a part of a file of ``size`` bytes. Where they go one by one and there are ``room`` bytes, larger ones go faster."""
    fewest = -(-size // PARTS >> 20) + 1 << 20 if size > PART * PARTS else 0
    return max(PART, fewest, min(room // HELD >> 20 << 20, LARGEST))


def stream_bytes(size: int) -> int:
    """Bytes of memory that writing a file of ``size`` bytes takes at most, beside what is written from."""
    return BUFFERED * min(part_size(size), max(size, 1 << 20))


class ObjectSink:
    """Files below a URL of any scheme that fsspec knows, those that were registered with it included."""

    pull_request = ""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = open_filesystem(self.url)
        self._open: dict[str, Any] = {}  # streams, and uploads
        self._lock = threading.Lock()
        self._written: dict[str, Version] = {}
        self._states: dict[str, bytes] = {}

    def list(self) -> Mapping[str, Version]:
        """What is there; what this process has put there where the store tells nothing."""
        self._fs.invalidate_cache()
        listing: dict[str, Any] = self._do(partial(self._fs.find, self._root, detail=True), {})
        names = {path.removeprefix(self._root).lstrip("/"): row for path, row in listing.items()}
        return {name: entry_of(row, every=True) for name, row in names.items() if name and not name.endswith("/")} or self._written

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
        for name, data in files.items():
            if isinstance(data, bytes):
                self._do(partial(self._fs.pipe_file, f"{self._root}/{name}", data))
                self._written[name] = Version(len(data))
            else:
                again(partial(self._send, name, data), self.address(name), OVER)

    def _send(self, name: str, path: Path) -> None:
        with path.open("rb") as file, self.stream(name, path.stat().st_size) as write:
            while data := file.read(COPIED):
                write(memoryview(data))

    @contextmanager
    def stream(self, name: str, size: int, room: int = 0) -> Iterator[Callable[[memoryview], None]]:
        """What takes a file of ``size`` bytes piece by piece; the file is there when the block is left without an error.

        It holds `stream_bytes` of memory, or up to ``room`` bytes if that is more.

        Raises:
            DestinationError: access is refused, or there is no such bucket.
            Failed: the store did not take it, another attempt may do better; nothing of it is left.
        """
        path = f"{self._root}/{name}"
        with self._asked():
            file = self._fs.open(path, "wb", block_size=part_size(size, room))
        with self._lock:
            self._open[path] = file

        def write(view: memoryview) -> None:
            with self._asked():
                for start in range(0, len(view), COPIED):  # a larger piece would make a larger part
                    file.write(bytes(view[start : start + COPIED]))

        try:
            yield write
            with self._asked():
                file.close()
            self._written[name] = Version(size)
        except BaseException:
            self._discard(file, path)
            raise
        finally:
            with self._lock:
                self._open.pop(path, None)

    @property
    def takes_parts(self) -> bool:
        """Whether parts of a file can be sent at the same time, by `upload`: S3 can, unless all are to be of one size."""
        return hasattr(self._fs, "call_s3") and not self._fs.fixed_upload_size

    def upload(self, name: str, size: int) -> Upload:
        """What takes parts of a file of ``size`` bytes; nothing is asked yet."""
        path = f"{self._root}/{name}"
        with self._lock:
            self._open[path] = upload = Upload(self._fs, path, size)
        return upload

    def send(self, upload: Upload, number: int, data: bytes) -> bool:
        """See `Upload.send`.

        Raises:
            DestinationError: access is refused, or there is no such bucket.
            Failed: the store did not take it, another attempt may do better.
        """
        with self._asked():
            return upload.send(number, data)

    def complete(self, upload: Upload, name: str, size: int) -> None:
        """See `Upload.complete`; raises what `send` does."""
        with self._asked():
            upload.complete()
        with self._lock:
            self._open.pop(f"{self._root}/{name}", None)
        self._written[name] = Version(size)

    def discard(self, patience: float = 0.0) -> None:
        """Takes back what is not complete, after ``patience`` seconds for threads that are still sending, such as over a slow network."""
        deadline = time.monotonic() + patience
        while any(getattr(file, "is_busy", True) for file in list(self._open.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        with self._lock:
            uploads = list(self._open.items())
        for path, file in uploads:
            self._discard(file, path)

    def _discard(self, file: Any, path: str) -> None:
        """Has nothing remain of a file that is not complete."""
        from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

        with suppress(Exception):  # the error that led here matters more, and `abandon` comes back to it
            if isinstance(file, Upload):
                file.discard()
                return
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
            self._do(partial(self._fs.rm_file, f"{self._root}/{name}"), None)

    def abandon(self, names: Collection[str], *, others: bool) -> None:
        """Aborts the multipart uploads that are open, of these files and of ``others`` directly in the directory, where there are such."""
        if not hasattr(self._fs, "list_multipart_uploads"):
            return
        bucket, key, _ = self._fs.split_path(f"{self._root}/")
        markers: dict[str, str] = {}
        try:
            while True:
                answer = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key, **markers)
                for upload in answer.get("Uploads") or []:
                    name = upload["Key"].removeprefix(key)
                    if name in names or (others and "/" not in name):
                        with suppress(FileNotFoundError):  # another was quicker
                            self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                if not answer.get("IsTruncated"):
                    return
                markers = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
        except Exception as error:  # noqa: BLE001 - some servers do not list them, some do not allow it
            _log.info("%s: unfinished uploads of earlier runs cannot be listed (%s)", self.url, fault(error))

    def load_state(self, name: str) -> bytes | None:
        if (there := self.list()) is self._written or name not in there:
            return self._states.get(name) if there is self._written else None
        return self._do(partial(self._fs.cat_file, f"{self._root}/{name}"), b"") or None  # another may have dropped it since

    def save_state(self, name: str, data: bytes) -> None:
        self.put({name: data})
        self._states[name] = data

    def drop_state(self, name: str) -> None:
        self.remove([name])
        self._states.pop(name, None)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Has the store's errors be those that `again` takes, or lines."""
        try:
            with asked(scheme_of(self.url)):
                yield
        except Refused as refused:
            raise self._refuse(refused) from None

    def _do(self, call: Callable[[], _Result], *absent: _Result) -> _Result:
        """What a call gives; ``absent``: what it is where there is nothing, or no such call.

        Raises:
            DestinationError: another attempt would not change it.
            RunError: it failed several times.
        """
        try:
            return again(asked(scheme_of(self.url))(call), self.url, OVER, small=True)
        except Refused as refused:
            if absent and refused.status in (404, 501):
                return absent[0]
            raise self._refuse(refused) from None

    def _refuse(self, refused: Refused) -> StreamconvError:
        return unwritable(self.url, refused, begun=bool(self._written))
