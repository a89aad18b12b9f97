"""Any file system of fsspec: object stores, and whatever is registered. fsspec keeps the instances."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from streamconv.errors import StreamconvError, UsageError
from streamconv.storage import Version
from streamconv.storage.addresses import missing, refusal, scheme_of
from streamconv.storage.retries import OVER, READING, Refused, again, fault
from streamconv.storage.sources import Answer, Catalog, Store

_CONNECTIONS = 256  # of one store at most; botocore's own 10 would have threads wait for each other
_VERSIONS = (  # what file systems call what changes with a file
    "ETag", "etag", "e_tag", "md5Hash", "md5", "sha256", "generation", "checksum", "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip
_UNKNOWN = re.compile("Credential|Token|Auth|Validation|NoRegion")  # in the names of errors of botocore, google.auth and the like
_KINDS = {  # which errors are final, by HTTP's statuses
    FileNotFoundError: 404, NotADirectoryError: 404, PermissionError: 403, NotImplementedError: 501,
    ValueError: 400, TypeError: 400, AttributeError: 400, KeyError: 400,
}  # fmt: skip


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's path in it.

    Raises:
        UsageError: there is none, or a package for it is missing.
    """
    scheme = scheme_of(url)
    for name in ("gcsfs", "s3fs"):  # they tell of what they try again, on stderr where nobody listens
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        filesystem, path = url_to_fs(url, **_options(scheme))
    except ImportError as error:
        raise missing(scheme, error) from None
    except ValueError:
        raise UsageError(
            f"{scheme}://: no store of that kind is known: use a path, https, hf, s3, gs, or another scheme that fsspec knows"
        ) from None
    return filesystem, path.rstrip("/")


def _options(scheme: str) -> dict[str, Any]:
    """What a file system is opened with beside what fsspec's own configuration says: room for the connections of all threads."""
    from fsspec.config import conf  # type: ignore[import-untyped]

    if scheme not in ("s3", "s3a"):
        return {}
    configured = conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": _CONNECTIONS, **configured}}


@contextmanager
def asked(scheme: str) -> Iterator[None]:
    """Has a file system's errors be those that `again` takes."""
    try:
        yield
    except (StreamconvError, Refused):
        raise
    except ImportError as error:
        raise missing(scheme, error) from None
    except Exception as error:  # noqa: BLE001 - every file system has its own
        failure = fault(error)
        code = str(getattr(error, "status", None) or getattr(error, "code", None))
        status = next((status for kind, status in _KINDS.items() if isinstance(error, kind)), 0)
        if code in ("401", "403", "404", "410"):
            status = int(code)
        elif _UNKNOWN.search(type(error).__name__):
            status = 401
        elif getattr(error, "errno", None) == errno.EINVAL:
            status = 400
        raise (Refused(status, str(failure)) if status else failure) from None


def entry_of(row: Mapping[str, Any], *, every: bool = False) -> Version:
    """A file as a listing tells of it; its tag is the best of what changes with it, or ``every`` such thing."""
    tags = [str(row[key]).strip('"') for key in _VERSIONS if row.get(key)]
    return Version(-1 if row.get("size") is None else int(row["size"]), " ".join(tags if every else tags[:1]))


class _Body:
    """The body of an answer of S3, received in the loop of s3fs."""

    def __init__(self, loop: Any, body: Any) -> None:
        self._loop, self._body = loop, body

    def read(self, nbytes: int) -> bytes:
        from fsspec.asyn import sync  # type: ignore[import-untyped]

        return bytes(sync(self._loop, self._body.read, nbytes))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._body.close)


class FileSystem(Store):
    """Reads one."""

    def __init__(self, url: str) -> None:
        self._fs = open_filesystem(url)[0]

    def _path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))

    def list(self, url: str, catalog: Catalog = Catalog()) -> Mapping[str, Version]:  # noqa: ARG002, B008 - it can list
        above = self._path(url).strip("/")
        listing = self._ask(url, self._fs.find, detail=True)
        rows = {name.strip("/"): row for name, row in listing.items() if row.get("type", "file") == "file"}
        if above in rows:
            return {"": entry_of(rows[above])}
        start = f"{above}/" if above else ""
        return {name.removeprefix(start): entry_of(row) for name, row in rows.items() if name.startswith(start)}

    def entry(self, url: str) -> Version:
        row = self._ask(url, self._fs.info)
        if row.get("type", "file") != "file":
            raise UsageError(f"{url}: not a file: give the URL of one")
        return entry_of(row)

    def request(self, url: str) -> None:
        """It has none."""

    def fetch(self, url: str, start: int, stop: int) -> bytes:
        return bytes(self._fs.cat_file(self._path(url), start=start, end=stop))

    def receive(self, url: str, start: int, stop: int) -> Answer | None:
        if not hasattr(self._fs, "call_s3"):
            return None
        bucket, key, _ = self._fs.split_path(self._path(url))
        answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        return _Body(self._fs.loop, answer["Body"])

    def _ask(self, url: str, call: Callable[..., Any], **options: Any) -> Any:
        """What a call gives, or a line that says why not."""
        self._fs.invalidate_cache()
        try:
            return again(asked(scheme_of(url))(partial(call, self._path(url), **options)), url, OVER, READING, small=True)
        except Refused as refused:
            raise refusal(url, refused.status, str(refused)) from None
