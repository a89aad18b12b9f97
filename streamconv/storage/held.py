"""Files that this process holds in memory, under URLs like any store's: what is given in Python is then read as all else is."""

from __future__ import annotations

import uuid
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from streamconv.errors import UsageError
from streamconv.storage import Version
from streamconv.storage.sources import Catalog, Store

SCHEME = "held"


class Piece(NamedTuple):
    """A part of a file: how many bytes it has, what gives those from one up to another, and whether they are in memory all the time."""

    nbytes: int
    read: Callable[[int, int], bytes | memoryview]
    is_resident: bool


class Address(str):
    """The URL of a file that is held as long as this object is."""

    __slots__ = ("__weakref__",)


class _File:
    """Pieces, one after the other."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces, self._starts, self.size = list(pieces), [0], 0
        self.resident = sum(piece.nbytes for piece in self._pieces if piece.is_resident)
        for piece in self._pieces:
            self.size += piece.nbytes
            self._starts.append(self.size)

    def read(self, start: int, stop: int) -> bytes:
        parts = []
        number = bisect_right(self._starts, start) - 1
        while start < min(stop, self.size):
            piece, first = self._pieces[number], self._starts[number]
            last = min(stop - first, piece.nbytes)
            if last > start - first:
                parts.append(piece.read(start - first, last))
            start, number = max(start, first + piece.nbytes), number + 1
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)


_files: dict[str, _File] = {}


def hold(name: str, pieces: Iterable[Piece]) -> Address:
    """Holds a file of that name; nothing is copied.

    No two addresses are the same, of other processes either: a run that was interrupted never goes on with what another process holds.
    """
    address = Address(f"{SCHEME}://{uuid.uuid4().hex}/{name}")
    _files[str(address)] = _File(pieces)
    weakref.finalize(address, _files.pop, str(address)).atexit = False
    return address


def resident(url: str) -> int:
    """Bytes of a file that are in memory all the time; 0 of whatever is not held."""
    return _files[url].resident if url in _files else 0


def keep(address: Address, owner: object) -> None:
    """Has a file be held as long as ``owner`` is there, too."""
    weakref.finalize(owner, str, address).atexit = False


class Held(Store):
    """Reads what is held."""

    def list(self, url: str, catalog: Catalog = Catalog()) -> Mapping[str, Version]:  # noqa: ARG002, B008 - it can list
        if url in _files:
            return {"": self.entry(url)}
        above = f"{url.rstrip('/')}/"
        return {name.removeprefix(above): self.entry(name) for name in list(_files) if name.startswith(above)}

    def entry(self, url: str) -> Version:
        return Version(self._file(url).size, "held")

    def request(self, url: str) -> None:
        """It has none."""

    def fetch(self, url: str, start: int, stop: int) -> bytes:
        return self._file(url).read(start, stop)

    def _file(self, url: str) -> _File:
        file = _files.get(url)
        if file is None:
            raise UsageError(f"{url}: was held in memory by a process or a plan that is no more: give the tensors again")
        return file
