"""Folders of files that are read, whatever they are of: this machine, a store, a revision on the Hub."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from streamconv.stage import begin
from streamconv.storage.sources import in_parallel

Walked = tuple[str, list[str], list[str]]
"""A folder's name below another, "" for that itself, and the names of the folders and of the files in it."""
_Result = TypeVar("_Result")


class IrregularFile(OSError):
    """The error for what is no file of bytes: a folder, a pipe or a device."""


class File(Protocol):
    """An open file, read from its position or at any offset.

    Attributes:
        size: in bytes.
        is_remote: each look takes a request, so that what can be known otherwise is not looked up.
    """

    is_remote: bool

    @property
    def size(self) -> int: ...

    def pread(self, nbytes: int, offset: int) -> bytes:
        """At most so many bytes from ``offset``; the position stays."""
        ...

    def read(self, nbytes: int = -1, /) -> bytes:
        """So many bytes from the position, or all that are left."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Sets the position."""
        ...

    def tell(self) -> int:
        """The position."""
        ...

    def close(self) -> None:
        """Ends reading."""
        ...


class Folder(ABC):
    """A folder, and what lies below it. Names are relative to it, with slashes.

    Attributes:
        within: how it is called below the folder that was located; "" for that itself.
        local: its path on this machine, None where it is none of it.
    """

    within: str
    local: Path | None

    @property
    def url(self) -> str:
        """What people call it: its path, or its URL without secrets."""
        return self.address("")

    @abstractmethod
    def address(self, name: str) -> str:
        """What a plan's sources call a file."""

    def list(self) -> Sequence[str]:
        """The names of the files and folders directly in it, looked for once.

        Raises:
            OSError: it cannot be read.
            StreamconvError: the same, of a store.
        """
        return self._names

    @cached_property
    def _names(self) -> Sequence[str]:
        return self._find_names()

    @abstractmethod
    def _find_names(self) -> Sequence[str]:
        """See `list`."""

    @abstractmethod
    def walk(self) -> Iterator[Walked]:
        """All folders from above; those that are taken out of a list are not entered.

        Raises:
            OSError: one cannot be read.
        """

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether anything of this name is there, or what a link of this name leads to; never raises for what a file is."""

    @abstractmethod
    def has_file(self, name: str) -> bool:
        """Whether that is a file."""

    @abstractmethod
    def has_folder(self, name: str) -> bool:
        """Whether that is a folder."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. Raises as `open`."""

    @abstractmethod
    def open(self, name: str) -> File:
        """A file, for reading.

        Raises:
            IrregularFile: it is something else; a pipe is not waited for.
            OSError: it is not there, or cannot be read.
            StreamconvError: the same, of a store.
        """

    def folder(self, name: str) -> Folder:
        """A folder below it, which need not be there; itself without a name."""
        return self._inner(name, "/".join(filter(None, (self.within, name)))) if name else self

    @abstractmethod
    def _inner(self, name: str, within: str) -> Folder:
        """A folder below it."""

    def file(self, name: str) -> Location:
        """A file below it; it need not be there."""
        return Location(self, name)

    def remember(self, kind: object, name: str, read: Callable[[], _Result]) -> _Result:  # noqa: ARG002 - files of this machine are read anew
        """What ``read`` makes of a file; where a file is a request, what it made when the file was first read as ``kind``."""
        return read()


@dataclass(frozen=True, slots=True)
class Location:
    """A file, by a folder and the file's name below it; without a name the folder itself."""

    folder: Folder
    relative: str = ""

    def __str__(self) -> str:
        return self.folder.address(self.relative)

    @property
    def is_folder(self) -> bool:
        return not self.relative

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return self.relative.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.relative).suffix

    @property
    def local(self) -> Path | None:
        """Its path on this machine, None where it is none of it."""
        return None if self.folder.local is None else self.folder.local / self.relative

    @property
    def size(self) -> int:
        """Bytes. Raises as `Folder.open`."""
        return self.folder.size(self.relative)

    def below(self, folder: Folder) -> str:
        """How it is called below a folder that it lies in."""
        whole = "/".join(filter(None, (self.folder.within, self.relative)))
        return whole.removeprefix(f"{folder.within}/") if folder.within else whole


AnyPath = str | os.PathLike[str] | Location


def each(files: Iterable[Location], work: Callable[[Location], _Result]) -> Iterator[_Result]:
    """What ``work`` makes of each; of several at a time where looking at one takes a request."""
    files = list(files)
    if len(files) < 2:
        return map(work, files)
    stage = begin("reading headers", len(files))

    def look(file: Location) -> _Result:
        result = work(file)
        stage.done += 1
        return result

    return map(look, files) if all(file.local for file in files) else iter(in_parallel(look, files))


def read_each(files: Iterable[Location], kind: object, read: Callable[[Location], _Result]) -> Iterator[_Result]:
    """The same, but each is read once for each ``kind`` where that takes requests."""
    return each(files, lambda file: file.folder.remember(kind, file.relative, lambda: read(file)))
