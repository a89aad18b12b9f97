"""Reads and writes past the page cache, where the filesystem has that.

Large copies spend most of their processor time on pages that nobody will read again, and push everybody else's out of memory.
Direct I/O wants offsets, lengths and addresses in whole blocks, so data goes through the thread's buffer and is shifted there, unless it
lies in memory as in the file; blocks at the ends of a range are read with it. What the page cache already holds of a file of which it
holds most is taken from it, where the kernel says so: asking for it with a read that must not wait would start a read-ahead, and read
everything twice.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamconv.engine.io import CHUNK, OwnFiles, PositionedReader, located
from streamconv.memory import BLOCK, address_of

LEAST = 256 << 10  # bytes: shorter ranges are copied and written through the page cache ...
_LEAST_READ = 16 << 10  # ... and these are read to be computed with: a disk may be set to read megabytes ahead of each
_MOST = 0.9  # of a file, from which on it is taken from the page cache
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
REFUSED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
_SHARING = ("btrfs", "xfs", "bcachefs", "zfs", "apfs")
AVAILABLE = hasattr(os, "O_DIRECT") and hasattr(os, "preadv")


_CACHESTAT = 451  # the same number on all architectures that Python's Linux builds run on
_PAGE = mmap.PAGESIZE


def is_cached(fd: int, offset: int, nbytes: int) -> bool:
    """Whether the page cache holds all of a range (False where the kernel, before 6.5, cannot tell)."""
    return _share_cached(fd, offset, nbytes) >= 1


def _share_cached(fd: int, offset: int, nbytes: int) -> float:
    """What part of a range the page cache holds; 0 where that is not known."""
    span, counts = (ctypes.c_uint64 * 2)(offset, nbytes), (ctypes.c_uint64 * 5)()
    if _libc is None or not nbytes or _libc.syscall(_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(counts), 0) != 0:
        return 0
    pages = (offset + nbytes - 1) // _PAGE - offset // _PAGE + 1
    return int(counts[0]) / pages


def shares_extents(path: Path) -> bool:
    """Whether a file system may share a copy's blocks with its source, which in-kernel copies then do."""
    try:
        rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return True
    real = os.path.realpath(path)
    mounts = {row[1]: row[2] for row in rows if len(row) > 2 and (real == row[1] or real.startswith(row[1].rstrip("/") + "/"))}
    return not mounts or mounts[max(mounts, key=len)] in _SHARING


def allocate(fd: int, nbytes: int) -> None:
    """Reserves a file's blocks, where that does not mean to write them: direct writes into holes of one file wait for each other.

    Raises:
        OSError: there is no room.
    """
    if _libc is None or _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == 0:
        return
    if (number := ctypes.get_errno()) not in (*REFUSED, errno.EINTR):
        raise OSError(number, os.strerror(number))


class DirectReader(PositionedReader):
    """`PositionedReader` whose long reads do not leave pages behind. For one thread."""

    def __init__(self, limit: int = 8) -> None:
        super().__init__(limit)
        self._direct = OwnFiles(lambda path: open_direct(path, os.O_RDONLY), limit)
        self._were_cached: dict[str, bool] = {}

    def read(self, path: str, offset: int, view: memoryview) -> None:
        """Fills ``view`` from ``offset``.

        Raises:
            SourceChanged: the file ends before ``view`` is full.
        """
        if len(view) < _LEAST_READ:
            super().read(path, offset, view)
            return
        if len(view) >= LEAST and address_of(view) % BLOCK == offset % BLOCK and self._read_in_place(path, offset, view):
            return
        buffer = self.buffer()
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            at = self._load_blocks(path, offset + start, len(piece), buffer)
            if at is None:
                super().read(path, offset + start, piece)
            else:
                piece[:] = buffer[at : at + len(piece)]

    def _read_in_place(self, path: str, offset: int, view: memoryview) -> bool:
        """`read` where blocks of the file are to be blocks of memory; False where they are to be had in another way."""
        direct = self._direct.get(path)
        if direct < 0 or self._is_cached(path, offset, len(view)):
            return False
        first = -offset % BLOCK
        last = first + (len(view) - first) // BLOCK * BLOCK
        head, tail = self.buffer()[: BLOCK if first else 0], self.buffer()[BLOCK : 2 * BLOCK if last < len(view) else BLOCK]
        start = offset + first - len(head)
        with located(path, offset):
            count = _read_blocks(direct, start, [head, view[first:last], tail], offset + len(view) - start)
        if count is None:
            self._direct.refuse(path)
            return False
        if start + count < offset + len(view):  # the file has become shorter
            super().read(path, offset, view)
            return True
        view[:first], view[last:] = head[len(head) - first :], tail[: len(view) - last]
        return True

    def load(self, path: str, offset: int, nbytes: int, buffer: memoryview) -> int:
        """`PositionedReader.load`; nothing is moved within ``buffer``."""
        at = self._load_blocks(path, offset, nbytes, buffer) if nbytes >= LEAST else None
        if at is None:
            super().read(path, offset, buffer[:nbytes])
        return at or 0

    def _load_blocks(self, path: str, offset: int, nbytes: int, buffer: memoryview) -> int | None:
        """`load` past the page cache; None where the bytes are to be had from there."""
        direct = self._direct.get(path)
        if direct < 0 or self._is_cached(path, offset, nbytes):
            return None
        at = offset % BLOCK
        end = at + nbytes
        with located(path, offset):
            count = _read_blocks(direct, offset - at, [buffer[: -(-end // BLOCK) * BLOCK]], end)
        if count is None:
            self._direct.refuse(path)
        return at if count is not None and count >= end else None  # what ends early does so in the other way, too, or did not end

    def _is_cached(self, path: str, offset: int, nbytes: int) -> bool:
        """Whether a range is to be had from the page cache, which held most of the file at first.

        Of one that is there in part, reads have the kernel read ahead, which soon is where the next read would go directly.
        """
        fd = self.fd(path)
        if path not in self._were_cached:
            self._were_cached[path] = _share_cached(fd, 0, os.fstat(fd).st_size) >= _MOST
        return self._were_cached[path] and is_cached(fd, offset, nbytes)

    def close(self) -> None:
        super().close()
        self._direct.close()


def open_direct(path: str, flags: int) -> int:
    """A descriptor for direct I/O, or -1 where there is none."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC) if AVAILABLE else -1
    except OSError as error:
        if error.errno in REFUSED:
            return -1
        raise


def _read_blocks(fd: int, offset: int, views: Sequence[memoryview], least: int) -> int | None:
    """Reads whole blocks into one view after the other until ``least`` bytes are there or the file ends; None: direct reads are refused."""
    count = 0
    while count < least:
        try:
            nbytes = os.preadv(fd, list(_after(views, count)), offset + count)
        except OSError as error:
            if error.errno in REFUSED:
                return None
            raise
        if nbytes == 0:
            break
        count += nbytes
        if count % BLOCK:  # the end of the file
            break
    return count


def _after(views: Sequence[memoryview], count: int) -> Iterator[memoryview]:
    """What of some views follows their first ``count`` bytes."""
    for view in views:
        if count < len(view):
            yield view[count:]
        count = max(0, count - len(view))
