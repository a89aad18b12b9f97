"""Reads and writes past the page cache, where the filesystem has that.

Large copies spend most of their processor time on pages that nobody will read again, and push everybody else's out of memory.
Direct I/O wants offsets, lengths and addresses in whole blocks, so data goes through a block-aligned buffer and is shifted
there; what is left at the edges of a range goes through the page cache. What the page cache already holds is taken from it.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from streamconv.engine.io import PositionedReader, write
from streamconv.errors import SourceChanged

BLOCK = 4096  # bytes: offsets, lengths and addresses are multiples of this
CHUNK = 1 << 20  # bytes of one direct read or write
LEAST = 256 << 10  # bytes: shorter ranges go through the page cache
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
_SHARING = ("btrfs", "xfs", "bcachefs", "zfs", "apfs")
AVAILABLE = hasattr(os, "O_DIRECT") and hasattr(os, "preadv")


def shares_extents(path: Path) -> bool:
    """Whether a file system may share a copy's blocks with its source, which in-kernel copies then do."""
    try:
        rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return True
    real = os.path.realpath(path)
    mounts = {row[1]: row[2] for row in rows if len(row) > 2 and (real == row[1] or real.startswith(row[1].rstrip("/") + "/"))}
    return not mounts or mounts[max(mounts, key=len)] in _SHARING


class DirectReader(PositionedReader):
    """`PositionedReader` whose long reads do not leave pages behind. For one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[str, int] = {}
        self._bounce: memoryview | None = None

    def read(self, path: str, offset: int, view: memoryview) -> None:
        """Fills ``view`` from ``offset``.

        Raises:
            SourceChanged: the file ends before ``view`` is full.
        """
        if len(view) < LEAST:
            super().read(path, offset, view)
            return
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            self._read_chunk(path, offset + start, piece)

    def _read_chunk(self, path: str, offset: int, view: memoryview) -> None:
        if self._is_cached(path, offset, view):
            return
        direct = self._direct_fd(path)
        if direct < 0:
            super().read(path, offset, view)
            return
        first = offset - offset % BLOCK
        wanted = offset - first + len(view)
        bounce = self.bounce()
        done = _read_blocks(direct, first, bounce[: -(-wanted // BLOCK) * BLOCK], wanted)
        if done is None:
            self._direct[path] = -1
            super().read(path, offset, view)
        elif done < wanted:
            raise SourceChanged(f"{path}: ends at byte {first + done}, {wanted - done} more were planned: it changed; plan again")
        else:
            view[:] = bounce[offset - first : wanted]

    def _is_cached(self, path: str, offset: int, view: memoryview) -> bool:
        """Fills ``view`` if all of it is in the page cache; costs one call if not."""
        try:
            return os.preadv(self.fd(path), [view], offset, os.RWF_NOWAIT) == len(view)
        except OSError as error:
            if error.errno == errno.EAGAIN or error.errno in _REFUSED:
                return False
            raise

    def _direct_fd(self, path: str) -> int:
        if path not in self._direct:
            while len(self._direct) >= self.limit:
                _close(self._direct.pop(next(iter(self._direct))))
            self._direct[path] = open_direct(path, os.O_RDONLY)
        return self._direct[path]

    def bounce(self) -> memoryview:
        """This thread's block-aligned buffer of a chunk and a block at either end."""
        if self._bounce is None:
            self._bounce = memoryview(mmap.mmap(-1, CHUNK + 2 * BLOCK))
        return self._bounce

    def close(self) -> None:
        super().close()
        while self._direct:
            _close(self._direct.popitem()[1])


class DirectWriter:
    """Writes whole blocks directly and the edges through the page cache. For one thread."""

    limit = 8  # descriptors

    def __init__(self) -> None:
        self._direct: dict[str, int] = {}
        self._bounce: memoryview | None = None

    def buffer(self) -> memoryview:
        """This thread's block-aligned buffer for what is to be written."""
        if self._bounce is None:
            self._bounce = memoryview(mmap.mmap(-1, CHUNK))
        return self._bounce

    def takes(self, path: str, nbytes: int) -> bool:
        """Whether a range of a file is to be written directly."""
        return nbytes >= LEAST and self._fd(path) >= 0

    def write(self, path: str, fd: int, view: memoryview, offset: int) -> None:
        """Writes ``view`` at ``offset`` of ``path``, whose ordinary descriptor is ``fd``."""
        if not self.takes(path, len(view)):
            write(fd, view, offset)
            return
        first, last = blocks(offset, len(view))
        write(fd, view[: first - offset], offset)
        for start in range(first, last, CHUNK):
            size = min(CHUNK, last - start)
            self.buffer()[:size] = view[start - offset : start - offset + size]
            self.write_buffer(path, fd, start, size)
        write(fd, view[last - offset :], last)

    def write_buffer(self, path: str, fd: int, offset: int, size: int) -> None:
        """Writes ``size`` bytes of `buffer`, in whole blocks, at a block's ``offset``."""
        done = 0
        while done < size:
            try:
                done += os.pwrite(self._direct[path], self.buffer()[done:size], offset + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                _close(self._direct[path])
                self._direct[path] = -1
            if self._direct[path] < 0 or done % BLOCK:
                write(fd, self.buffer()[done:size], offset + done)
                return

    def _fd(self, path: str) -> int:
        if path not in self._direct:
            while len(self._direct) >= self.limit:
                _close(self._direct.pop(next(iter(self._direct))))
            self._direct[path] = open_direct(path, os.O_WRONLY)
        return self._direct[path]

    def close(self) -> None:
        while self._direct:
            _close(self._direct.popitem()[1])


def blocks(offset: int, nbytes: int) -> tuple[int, int]:
    """The whole blocks within a range: first and last offset."""
    first = -(-offset // BLOCK) * BLOCK
    return first, max(first, (offset + nbytes) // BLOCK * BLOCK)


def open_direct(path: str, flags: int) -> int:
    """A descriptor for direct I/O, or -1 where there is none."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC) if AVAILABLE else -1
    except OSError as error:
        if error.errno in _REFUSED:
            return -1
        raise


def _read_blocks(fd: int, offset: int, view: memoryview, least: int) -> int | None:
    """Reads whole blocks until ``least`` bytes are there or the file ends; None where direct reads are refused."""
    done = 0
    while done < least:
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            if error.errno in _REFUSED:
                return None
            raise
        if got == 0:
            break
        done += got
        if done % BLOCK:  # the end of the file
            break
    return done


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
