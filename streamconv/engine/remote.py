"""Reading where some sources are behind URLs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from streamconv.engine.io import PositionedReader
from streamconv.storage import Version, is_url
from streamconv.storage.ranges import Ranges, join


class RemoteReader(PositionedReader):
    """Reads URLs by range requests and paths as ``local`` does. For one thread.

    Args:
        local: of this machine's files.
        known: size and version of the files behind URLs.
        stop: ends waits for a server when it is set.
    """

    def __init__(self, local: PositionedReader, known: Mapping[str, Version], stop: threading.Event | None) -> None:
        super().__init__()
        self._local, self._ranges = local, Ranges(known, stop)

    def buffer(self) -> memoryview:
        return self._local.buffer()

    def fd(self, path: str) -> int:
        return self._local.fd(path)

    def expect(self, reads: Iterable[tuple[str, int, int]]) -> None:
        self._ranges.expect(join(reads))

    def read(self, path: str, offset: int, view: memoryview) -> None:
        (self._ranges if is_url(path) else self._local).read(path, offset, view)

    def load(self, path: str, offset: int, nbytes: int, buffer: memoryview) -> int:
        if not is_url(path):
            return self._local.load(path, offset, nbytes, buffer)
        self._ranges.read(path, offset, buffer[:nbytes])
        return 0

    def close(self) -> None:
        self._local.close()
        self._ranges.close()
