"""Folders behind URLs: listed at most once, their files read by ranges."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from streamconv.errors import UsageError
from streamconv.storage import Version
from streamconv.storage.addresses import WEB, refusal, scheme_of
from streamconv.storage.folder import Folder, IrregularFile, Location, Walked
from streamconv.storage.ranges import read_range
from streamconv.storage.sources import HEAD, Catalog, Probed
from streamconv.storage.stores import opened, store_of

_NEAR = 4 << 10  # bytes read where something is looked up in the middle of a file
_TAIL = 32 << 10  # bytes read at the end of a file, where some have their directory
_HEADS = 256  # heads of files kept until they are read
_Result = TypeVar("_Result")


class Tree:
    """The files below a URL, listed at most once, and what has been read of them.

    Args:
        url: of the folder; with a slash at the end it is known to be one.
        catalog: what files it may consist of.
        files: of it that were given by their own URLs: these, and what is known of them.
    """

    def __init__(self, url: str, catalog: Catalog, files: Mapping[str, tuple[str, Version]] | None = None) -> None:
        self.url, self.catalog = url.rstrip("/"), catalog
        self.store = store_of(url)
        self.memo: dict[object, Any] = {}
        self._is_folder = url.endswith("/")
        self._listed: dict[str, Version] | None = None
        self._folders: set[str] | None = None
        self._urls = {name: own for name, (own, _) in (files or {}).items()}
        self._entries: dict[str, Version | None] = {name: entry for name, (_, entry) in (files or {}).items() if entry.size >= 0}
        self._heads: dict[str, bytes] = {}
        self._read: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def address(self, relative: str) -> str:
        """The URL of a file."""
        if not relative:
            return self.url
        if relative in self._urls:
            return self._urls[relative]
        return f"{self.url}/{quote(relative) if scheme_of(self.url) in WEB else relative}"

    def files(self) -> dict[str, Version]:
        """All of them, by relative name; a size of -1 is not known yet."""
        with self._lock:
            if self._listed is None:
                listing = self.store.list(self.url, self.catalog)
                if not listing:
                    raise refusal(self.url, 404)
                self._listed = dict(listing)
                self._read = listing.read if isinstance(listing, Probed) else {}
            return self._listed

    @property
    def is_listed(self) -> bool:
        return self._listed is not None

    def folders(self) -> Collection[str]:
        """The relative names of all folders."""
        if self._folders is None:
            folders = set()
            for name in self.files():
                while name:
                    name = name.rpartition("/")[0]  # noqa: PLW2901 - each folder above
                    folders.add(name)
            self._folders = folders
        return self._folders

    def single(self) -> Version | None:
        """What is known of the one file that the URL names, a size of -1 for nothing yet; None: it is a folder's."""
        if self._is_folder:
            return None
        if scheme_of(self.url) in WEB and self.url.endswith(self.catalog.suffixes):
            return Version(-1)
        return self.files().get("")

    def entry(self, relative: str) -> Version | None:
        """A file's, or None where there is none. What is not listed is asked for by itself.

        Raises:
            StreamconvError: the file that the URL names cannot be read.
        """
        if relative not in self._entries:
            version = Version(-1) if self._listed is None else self._listed.get(relative)
            if version is not None and version.size < 0:
                try:
                    version, head = self.store.head(self.address(relative))
                    if scheme_of(self.url) in WEB:
                        opened[self.address(relative)] = version
                    self._keep_head(relative, head)
                except UsageError:
                    if self._listed is not None or relative in self._urls:
                        raise
                    version = None
            self._entries[relative] = version
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

    is_remote = True

    def __init__(self, url: str, entry: Version, head: bytes) -> None:
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
            if first := self._head[start:]:
                start += len(first)
            data = bytearray(min(self.size - start, max(ahead, stop - start)))
            read_range(self._url, start, memoryview(data), self._tag)
            self._window, self._start = first + data, start - len(first)
        return self._window[offset - self._start : stop - self._start]


class RemoteFolder(Folder):
    """A folder behind a URL."""

    local = None

    def __init__(self, tree: Tree, within: str = "") -> None:
        self._tree, self.within = tree, within

    def _relative(self, name: str) -> str:
        return "/".join(filter(None, (self.within, name)))

    def address(self, name: str) -> str:
        return self._tree.address(self._relative(name))

    def _find_names(self) -> Sequence[str]:
        start = f"{self.within}/" if self.within else ""
        names = dict.fromkeys(name[len(start) :].partition("/")[0] for name in self._tree.files() if name.startswith(start))
        return [name for name in names if name]

    def walk(self) -> Iterator[Walked]:
        names = sorted(self.list())
        folders = list(filter(self.has_folder, names))
        yield "", folders, list(filter(self.has_file, names))
        for name in folders:
            for inner, inner_folders, files in self.folder(name).walk():
                yield "/".join(filter(None, (name, inner))), inner_folders, files

    def has(self, name: str) -> bool:
        return self.has_file(name) or (self._tree.is_listed and self.has_folder(name))

    def has_file(self, name: str) -> bool:
        relative = self._relative(name)
        return relative in self._tree.files() if self._tree.is_listed else self._tree.entry(relative) is not None

    def has_folder(self, name: str) -> bool:
        return self._relative(name) in self._tree.folders()

    def size(self, name: str) -> int:
        return self._entry(name).size

    def open(self, name: str) -> RemoteFile:
        entry = self._entry(name)
        return RemoteFile(self.address(name), entry, self._tree.head(self._relative(name)))

    def _entry(self, name: str) -> Version:
        entry = self._tree.entry(self._relative(name)) if name else None
        if entry is not None:
            return entry
        if not name or self.has_folder(name):
            raise IrregularFile(errno.EISDIR, os.strerror(errno.EISDIR), self.address(name))
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.address(name))

    def _inner(self, name: str, within: str) -> RemoteFolder:  # noqa: ARG002 - the tree is one
        return RemoteFolder(self._tree, within)

    def remember(self, kind: object, name: str, read: Callable[[], _Result]) -> _Result:
        key = (kind, self._relative(name))
        if key not in self._tree.memo:
            self._tree.memo[key] = read()
        result: _Result = self._tree.memo[key]
        return result


def locate_url(url: str, catalog: Catalog) -> Location:
    """The file or the folder that a public URL names; ``catalog`` says what files a folder may consist of.

    Raises:
        StreamconvError: nothing knows such URLs, there is nothing, or the server does not answer.
    """
    tree = Tree(store_of(url).pin(url), catalog)
    single = tree.single()
    if single is None:
        return RemoteFolder(tree).file("")
    above, _, last = tree.url.rpartition("/")
    name = unquote(last) if scheme_of(tree.url) in WEB else last
    beside = Tree(f"{above}/", catalog, {name: (tree.url, single)})
    return RemoteFolder(beside).file(name)
