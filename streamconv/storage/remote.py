"""Paths of files behind URLs, for code that reads checkpoints as it reads those of this machine."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from streamconv.errors import UsageError
from streamconv.storage import Entry, is_url
from streamconv.storage.addresses import WEB, forget, from_page, is_offline, public, refusal, scheme_of
from streamconv.storage.ranges import read_range
from streamconv.storage.sources import HEAD, Catalog, Probed, in_parallel
from streamconv.storage.stores import opened, store_of

_NEAR = 4 << 10  # bytes read where something is looked up in the middle of a file
_TAIL = 32 << 10  # bytes read at the end of a file, where some have their directory
_HEADS = 256  # heads of files kept until they are read
_Place = TypeVar("_Place", bound="Path | RemotePath")
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Stat:
    """What `RemotePath.stat` tells; ``st_size`` in bytes."""

    st_size: int
    st_mode: int
    st_mtime_ns: int = 0


class _Tree:
    """The files below a URL, listed at most once, and what has been read of them."""

    def __init__(self, url: str, catalog: Catalog) -> None:
        self.url, self.catalog = url.rstrip("/"), catalog
        self.store = store_of(url)
        self.memo: dict[object, Any] = {}
        self._is_folder = url.endswith("/")
        self._listed: dict[str, Entry] | None = None
        self._entries: dict[str, Entry | None] = {}
        self._heads: dict[str, bytes] = {}
        self._read: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def address(self, relative: str) -> str:
        """The URL of a file."""
        if not relative:
            return self.url
        return f"{self.url}/{quote(relative) if scheme_of(self.url) in WEB else relative}"

    def files(self) -> dict[str, Entry]:
        """All of them, by relative name; a size of -1 is not known yet."""
        with self._lock:
            if self._listed is None:
                listed = self.store.list(self.url, self.catalog)
                if not listed:
                    raise refusal(self.url, 404)
                self._listed = dict(listed)
                self._read = listed.read if isinstance(listed, Probed) else {}
            return self._listed

    def is_file(self) -> bool:
        """Whether the URL is that of one file."""
        if self._is_folder:
            return False
        return (scheme_of(self.url) in WEB and self.url.endswith(self.catalog.suffixes)) or "" in self.files()

    def entry(self, relative: str) -> Entry | None:
        """A file's, or None where there is none. What is not listed is asked for by itself.

        Raises:
            StreamconvError: the file that the URL names cannot be read.
        """
        if relative not in self._entries:
            known = Entry(-1) if self._listed is None else self._listed.get(relative)
            if known is not None and known.size < 0:
                try:
                    known, head = self.store.head(self.address(relative))
                    if scheme_of(self.url) in WEB:
                        opened[self.address(relative)] = known
                    self._keep_head(relative, head)
                except UsageError:
                    if self._listed is not None or not relative:
                        raise
                    known = None
            self._entries[relative] = known
        return self._entries[relative]

    def _keep_head(self, relative: str, head: bytes) -> None:
        """Keeps a file's first bytes until others have come; several threads look at files at once."""
        with self._lock:
            self._heads[relative] = head
            while len(self._heads) > _HEADS:
                del self._heads[next(iter(self._heads))]

    def head(self, relative: str) -> bytes:
        """Those of its first bytes that are known already."""
        return self._read.get(relative) or self._heads.get(relative, b"")


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read by ranges; a little more is read than is asked for, and kept."""

    def __init__(self, url: str, entry: Entry, head: bytes) -> None:
        self.size, self._url, self._tag = entry.size, url, entry.tag
        self._position = self._start = 0
        self._head = self._window = head

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position."""
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as there are bytes."""
        data = self.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """At most so many bytes from ``offset``, whatever the position is."""
        stop = min(self.size, offset + nbytes)
        if offset >= stop:
            return b""
        if stop <= len(self._head):
            return self._head[offset:stop]
        end = self._start + len(self._window)
        if offset < self._start or stop > end:
            start, ahead = offset, HEAD if offset == end or offset < HEAD else _NEAR
            if self.size - offset < _TAIL:
                start, ahead = max(0, self.size - _TAIL), _TAIL  # a directory at the end is read from its end to its start
            if known := self._head[start:]:
                start += len(known)
            data = bytearray(min(self.size - start, max(ahead, stop - start)))
            read_range(self._url, start, memoryview(data), self._tag)
            self._window, self._start = known + data, start - len(known)
        return self._window[offset - self._start : stop - self._start]


class RemotePath:
    """A path behind a URL, with what readers of checkpoints use of `pathlib.Path`. Its text is the URL without its query."""

    __slots__ = ("_tree", "relative")

    def __init__(self, tree: _Tree, relative: str = "") -> None:
        self._tree = tree
        self.relative = relative

    def __str__(self) -> str:
        return self._tree.address(self.relative)

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._tree, f"{self.relative}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        last = str(self).rpartition("/")[2]
        return unquote(last) if scheme_of(self._tree.url) in WEB else last

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        if self.relative:
            return RemotePath(self._tree, self.relative.rpartition("/")[0])
        if "" not in self._tree.memo:
            self._tree.memo[""] = _Tree(self._tree.url.rpartition("/")[0] + "/", self._tree.catalog)
        return RemotePath(self._tree.memo[""])

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def is_relative_to(self, other: Location) -> bool:
        """Whether it lies below another path, or is it."""
        return f"{self}/".startswith(f"{other}/")

    def relative_to(self, other: Location) -> PurePosixPath:
        """How it is called below another path."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} is not below {other}")
        rest = str(self).removeprefix(str(other)).lstrip("/")
        return PurePosixPath(unquote(rest) if scheme_of(self._tree.url) in WEB else rest)

    def is_file(self) -> bool:
        """Whether there is a file."""
        if not self.relative:
            return self._tree.is_file()
        return self._tree.entry(self.relative) is not None

    def is_dir(self) -> bool:
        """Whether there are files below it, or could be for all that can be known."""
        if not self.relative:
            return not self._tree.is_file()
        return any(name.startswith(f"{self.relative}/") for name in self._tree.files())

    def exists(self) -> bool:
        """Whether there is something; what an index on a web server names is only known to be there once it is read."""
        return self.relative in self._tree.files() or self.is_dir() if self.relative else True

    def stat(self) -> Stat:
        """Size and kind.

        Raises:
            FileNotFoundError: there is nothing.
            StreamconvError: the store does not let us see it.
        """
        if (self.relative or self._tree.is_file()) and (entry := self._tree.entry(self.relative)) is not None:
            return Stat(entry.size, stat.S_IFREG | 0o444)
        if not self.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return Stat(0, stat.S_IFDIR | 0o555)

    def open(self, mode: str = "rb", buffering: int = -1) -> RemoteFile:  # noqa: ARG002 - as that of pathlib
        """The file, for reading bytes."""
        self.stat()
        entry = self._tree.entry(self.relative)
        if entry is None:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self))
        return RemoteFile(str(self), entry, self._tree.head(self.relative))

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def iterdir(self) -> Iterator[RemotePath]:
        """What is directly below it."""
        start = f"{self.relative}/" if self.relative else ""
        names = dict.fromkeys(name[len(start) :].partition("/")[0] for name in self._tree.files() if name.startswith(start))
        return (self / name for name in names if name)

    def walk(self) -> Iterator[tuple[RemotePath, list[str], list[str]]]:
        """Folders with the names of the folders and the files in them, from above; folders taken out of a list are not entered."""
        inside = sorted(self.iterdir(), key=lambda path: path.name)
        folders = [path.name for path in inside if path.is_dir()]
        yield self, folders, [path.name for path in inside if path.relative in self._tree.files()]
        for name in folders:
            yield from (self / name).walk()

    def remembered(self, kind: object, read: Callable[[RemotePath], _Found]) -> _Found:
        """What ``read`` made of the file when it was first read as ``kind`` since it was listed."""
        key = (kind, self.relative)
        if key not in self._tree.memo:
            self._tree.memo[key] = read(self)
        found: _Found = self._tree.memo[key]
        return found


Location = Path | RemotePath


def locate(path: str | os.PathLike[str], catalog: Catalog = Catalog()) -> Location:  # noqa: B008 - it is frozen
    """The path on this machine, or behind a URL. What a revision of a repository on the Hub stands for is looked up.

    ``catalog`` says what files a folder behind it may consist of.

    Raises:
        StreamconvError: nothing knows such URLs, or the server does not answer.
    """
    if isinstance(path, RemotePath):
        return path
    text = str(path)
    if not is_url(text):
        return Path(path)
    if scheme_of(text) in ("file", "local"):
        return Path(unquote(text.partition("://")[2]))
    url = shown(from_page(path if isinstance(path, str) else text))
    if scheme_of(url) == "hf" and is_offline():
        from streamconv.storage.repositories import cached_snapshot

        return Path(cached_snapshot(url))
    return RemotePath(_Tree(store_of(url).pin(url), catalog))


class Shown(str):
    """A URL that was taken off its query by `shown`: `locate` still knows it."""

    __slots__ = ()

    def __str__(self) -> str:
        return self  # else it would be a text like any other


def shown(path: str) -> str:
    """A path as it is, a URL as everybody may see it: without its query, which `locate` remembers."""
    if isinstance(path, Shown) or not is_url(path):
        return path
    url = public(path)
    if url == path:
        forget(url)  # whoever gives it without a query means it without
    return Shown(url)


# What differs between the two ----------------------------------------------------------------------------------------


def is_dir(path: Location) -> bool:
    """Whether it is a directory; of a path on this machine it never raises."""
    return path.is_dir() if isinstance(path, RemotePath) else os.path.isdir(path)  # noqa: PTH112 - Path.is_dir may raise


def exists(path: Location) -> bool:
    """Whether it is there; of a path on this machine it never raises."""
    return path.exists() if isinstance(path, RemotePath) else os.path.exists(path)  # noqa: PTH110 - Path.exists may raise


def names_in(path: Location) -> list[str]:
    """The names in a directory."""
    return [inside.name for inside in path.iterdir()] if isinstance(path, RemotePath) else os.listdir(path)  # noqa: PTH208 - names are wanted


def walk(path: Location) -> Iterator[tuple[Location, list[str], list[str]]]:
    """As `os.walk`, from above.

    Raises:
        OSError: a folder cannot be read.
    """
    if isinstance(path, RemotePath):
        yield from path.walk()
    else:
        yield from ((Path(folder), folders, files) for folder, folders, files in os.walk(path, onerror=_fail))


def _fail(error: OSError) -> None:
    if not str(error.filename).endswith("lost+found"):  # which file systems have, and nobody may read
        raise error


def relative(path: Location, root: Location) -> str:
    """How a path below another is called there."""
    if isinstance(path, RemotePath):
        return path.relative_to(root).as_posix()
    return path.relative_to(str(root)).as_posix()


def each(paths: Iterable[_Place], work: Callable[[_Place], _Found]) -> Iterator[_Found]:
    """What ``work`` makes of each; of paths behind URLs for several at a time."""
    given = list(paths)
    if len(given) < 2 or not any(isinstance(path, RemotePath) for path in given):
        return map(work, given)
    return iter(in_parallel(work, given))


def read_each(paths: Iterable[Location], kind: object, read: Callable[[Location], _Found]) -> Iterator[_Found]:
    """The same, but files behind URLs are read once for each ``kind``."""
    return each(paths, lambda path: path.remembered(kind, read) if isinstance(path, RemotePath) else read(path))
