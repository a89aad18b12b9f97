"""Where a file's bytes go: to this machine, in any order, or front to back, as an upload takes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from streamconv.engine.direct import LEAST, REFUSED, open_direct
from streamconv.engine.edges import Edges
from streamconv.engine.io import CHUNK, NOFOLLOW, Files, copy_range, filled, located, write
from streamconv.memory import BLOCK, address_of

_AT_ONCE = 8 << 20  # bytes of one direct write: more at a time would have the reads of other threads wait, less keeps a disk idle between
_ZEROS = memoryview(bytes(64 << 10))


class Writer(Protocol):
    """Takes the bytes of one file, for one thread, each byte once. What it is not given reads as zeros."""

    def write(self, view: memoryview, offset: int) -> None:
        """Takes bytes that belong at an offset of the file; they may change when this has returned."""
        ...

    def copy_from(self, fd: int, offset: int, nbytes: int, dst: int, path: str) -> bool:
        """Takes bytes from an open file, ``path``, without their being handed over; False: that has to be done, by `write`."""
        ...


class LocalFile:
    """A file of this machine, which takes bytes in any order.

    Long ranges go past the page cache, in whole blocks, those at their edges when all of a block has come; short ranges through it.

    Args:
        fd: of the file.
        direct: another, for direct I/O; -1 where there is none.
        buffer: the thread's own, by way of which bytes go directly that do not lie at a block in memory.
        edges: of the file.
        keeps_holes: blocks of zeros are not written.
    """

    def __init__(self, fd: int, direct: int, buffer: Callable[[], memoryview], edges: Edges, *, keeps_holes: bool) -> None:
        self._fd, self._direct, self._buffer, self._edges, self._keeps_holes = fd, direct, buffer, edges, keeps_holes

    def write(self, view: memoryview, offset: int) -> None:
        for start, stop in filled(view) if self._keeps_holes else [(0, len(view))]:
            self._write(view[start:stop], offset + start)

    def copy_from(self, fd: int, offset: int, nbytes: int, dst: int, path: str) -> bool:
        if self._takes_directly(nbytes):
            return False
        with located(path, offset):
            copy_range(fd, self._fd, offset, dst, nbytes, self._buffer, path)
        return True

    def _takes_directly(self, nbytes: int) -> bool:
        return self._direct >= 0 and nbytes >= LEAST

    def _write(self, view: memoryview, offset: int) -> None:
        if not self._takes_directly(len(view)):
            write(self._fd, view, offset)
            return
        first = -(-offset // BLOCK) * BLOCK
        last = (offset + len(view)) // BLOCK * BLOCK
        self._write_edge(view[: first - offset], offset)
        self._write_edge(view[last - offset :], last)
        blocks = view[first - offset : last - offset]
        is_in_place = not blocks.readonly and address_of(blocks) % BLOCK == 0
        most = _AT_ONCE if is_in_place else CHUNK
        for start in range(0, len(blocks), most):
            piece = blocks[start : start + most]
            self._write_blocks(piece if is_in_place else self._in_buffer(piece), first + start)

    def _write_edge(self, view: memoryview, offset: int) -> None:
        if view:
            self._edges.add(view, offset, self._write_blocks)

    def _in_buffer(self, view: memoryview) -> memoryview:
        buffer = self._buffer()
        buffer[: len(view)] = view
        return buffer[: len(view)]

    def _write_blocks(self, view: memoryview, offset: int) -> None:
        """Writes whole blocks directly, as far as the file system takes them so; what is not whole through the page cache."""
        done = 0
        while len(view) - done >= BLOCK and done % BLOCK == 0 and self._direct >= 0:
            try:
                done += os.pwrite(self._direct, view[done:], offset + done)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._direct = -1
        write(self._fd, view[done:], offset + done)


class LocalFiles:
    """Files of this machine that several threads write to; at most ``limit`` stay open, twice where direct I/O is wanted."""

    def __init__(self, limit: int, *, is_direct: bool) -> None:
        flags = os.O_RDWR | NOFOLLOW | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._files = Files(lambda path: os.open(path, flags), limit)
        self._direct = Files(lambda path: open_direct(path, os.O_WRONLY | NOFOLLOW) if is_direct else -1, limit)
        self._edges: dict[str, Edges] = {}

    @contextmanager
    def open(self, path: str, buffer: Callable[[], memoryview], *, keeps_holes: bool) -> Iterator[LocalFile]:
        """A file, for one thread, whose buffer this is."""
        with self._files.use(path) as fd, self._direct.use(path) as direct:
            yield LocalFile(fd, direct, buffer, self._edges.setdefault(path, Edges()), keeps_holes=keeps_holes)

    @contextmanager
    def settled(self, path: str) -> Iterator[int]:
        """The descriptor of a file that has all that was written until now."""
        with self._files.use(path) as fd:
            self._edges.setdefault(path, Edges()).settle(partial(write, fd))
            yield fd

    def close(self, path: str | None = None) -> None:
        """Closes ``path``, or all, unless they are in use."""
        self._files.close(path)
        self._direct.close(path)
        self._edges.pop(path or "", None)


class Stream:
    """A file that goes front to back, and takes only what is next; what is left out goes as zeros.

    Args:
        send: takes the file's bytes, one piece after the other.
        start: the byte of the file that comes first.

    Attributes:
        sent: the byte that comes next.
    """

    def __init__(self, send: Callable[[memoryview], None], start: int = 0) -> None:
        self._send, self.sent = send, start

    def write(self, view: memoryview, offset: int) -> None:
        self.fill(offset)
        self._hand_on(view)

    def fill(self, offset: int) -> None:
        """Sends zeros up to an offset."""
        assert offset >= self.sent, "what is sent cannot be changed"
        while self.sent < offset:
            self._hand_on(_ZEROS[: offset - self.sent])

    def copy_from(self, fd: int, offset: int, nbytes: int, dst: int, path: str) -> bool:  # noqa: ARG002 - it takes no descriptors
        return False

    def _hand_on(self, view: memoryview) -> None:
        self._send(view)
        self.sent += len(view)
