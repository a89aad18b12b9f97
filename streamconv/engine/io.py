"""Bytes in and out of files: bounded sets of descriptors, mapped or positioned reads, in-kernel copies that keep holes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from streamconv.errors import DestinationError, RunError, SourceChanged
from streamconv.memory import BLOCK, HUGE_PAGE, allocate_pages

CHUNK = HUGE_PAGE  # bytes of one read or write through a worker's buffer
BUFFER = CHUNK + 2 * BLOCK  # bytes of that buffer: a range of a chunk touches a block more, two ranges of half a chunk two
WINDOW = 256 << 10  # bytes of a map
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # of outputs: what is put in their place meanwhile is not written through
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class Files:
    """Open descriptors by path, at most ``limit`` of them; the least recently used unused one is closed first.

    ``open_file`` may give -1 for a file that it cannot open its way.
    """

    def __init__(self, open_file: Callable[[str], int], limit: int) -> None:
        self._open_file, self._limit = open_file, limit
        self._open: OrderedDict[str, tuple[int, list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: str) -> Iterator[int]:
        """The descriptor of ``path``, not closed while in use."""
        with self._lock:
            if path in self._open:
                fd, users = self._open.pop(path)
            else:
                for old, (unused, busy) in list(self._open.items()):
                    if len(self._open) < self._limit:
                        break
                    if not busy[0]:
                        _close(unused)
                        del self._open[old]
                fd, users = self._open_file(path), [0]
            self._open[path] = (fd, users)
            users[0] += 1
        try:
            yield fd
        finally:
            with self._lock:
                users[0] -= 1

    def close(self, path: str | None = None) -> None:
        """Closes ``path``'s descriptor, or all; one in use stays open: its number must not come to mean another file."""
        with self._lock:
            for name in [path] if path else list(self._open):
                if name in self._open and not self._open[name][1][0]:
                    _close(self._open.pop(name)[0])


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class OwnFiles:
    """One thread's descriptors by path, the oldest closed first; ``open_file`` may give -1 for a file it cannot open its way."""

    def __init__(self, open_file: Callable[[str], int], limit: int) -> None:
        self._open_file, self._limit = open_file, limit
        self._open: dict[str, int] = {}

    def get(self, path: str) -> int:
        """The descriptor of ``path``, opened if it is not."""
        fd = self._open.get(path)
        if fd is None:
            while len(self._open) >= self._limit:
                self._close(next(iter(self._open)))
            fd = self._open[path] = self._open_file(path)
        return fd

    def refuse(self, path: str) -> None:
        """Closes ``path``'s descriptor and gives -1 for it from now on."""
        self._close(path)
        self._open[path] = -1

    def close(self) -> None:
        for path in list(self._open):
            self._close(path)

    def _close(self, path: str) -> None:
        _close(self._open.pop(path, -1))


def share_descriptors(workers: int) -> tuple[int, int]:
    """How many workers may run, and how many descriptors of each of two kinds each may hold, within what the process may open.

    Beside these a run may have two open files for each worker to write to.
    """
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, ValueError):
        soft = 512
    free = max(8, min(soft, 4096) - 32)
    workers = min(workers, max(1, free // 4))
    return workers, max(1, min(8, (free - 2 * workers) // (2 * workers)))


class PositionedReader:
    """Reads by ``preadv`` into the caller's memory; nothing is mapped. For one thread, with ``limit`` descriptors of a kind."""

    def __init__(self, limit: int = 8) -> None:
        self._files = OwnFiles(lambda path: os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)), limit)
        self._buffer: memoryview | None = None

    def buffer(self) -> memoryview:
        """This thread's own `BUFFER` bytes, which begin at a block; `read` may use them as well."""
        if self._buffer is None:
            self._buffer = allocate_pages(BUFFER)
        return self._buffer

    def fd(self, path: str) -> int:
        """This reader's own descriptor of a file: seeking for holes may move its position."""
        return self._files.get(path)

    def expect(self, reads: Iterable[tuple[str, int, int]]) -> None:
        """Announces what will be read next, as path, offset and bytes; only what is behind a URL needs that."""

    def read(self, path: str, offset: int, view: memoryview) -> None:
        """Fills ``view`` from ``offset``.

        Raises:
            SourceChanged: the file ends before ``view`` is full.
        """
        fd = self.fd(path)
        while view:
            try:
                count = os.preadv(fd, [view], offset) if hasattr(os, "preadv") else _seek_read(fd, offset, view)
            except OSError as error:
                raise locate(error, path, offset) from error
            if count == 0:
                raise SourceChanged(f"{path}: ends at byte {offset}, {len(view)} more were planned: it changed; plan again")
            view, offset = view[count:], offset + count

    def load(self, path: str, offset: int, nbytes: int, buffer: memoryview) -> int:
        """Reads ``nbytes`` at ``offset`` into ``buffer``, which begins at a block and is a block longer; gives where in it they are.

        Raises:
            SourceChanged: the file ends before that.
        """
        self.read(path, offset, buffer[:nbytes])
        return 0

    def close(self) -> None:
        self._files.close()


@contextmanager
def located(path: str, offset: int) -> Iterator[None]:
    """Has an error of the operating system say where it came; see `locate`."""
    try:
        yield
    except OSError as error:
        raise locate(error, path, offset) from error


def locate(error: OSError, path: str, offset: int) -> OSError:
    """The error with the byte of the file at which it came, unless it names a file already."""
    return error if name_in(error) else OSError(error.errno, error.strerror or str(error), f"{path}, byte {offset}")


_seek_lock = threading.Lock()


def _seek_read(fd: int, offset: int, view: memoryview) -> int:
    """`os.preadv` for systems without it."""
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


class MappedReader(PositionedReader):
    """Reads from memory maps and gives the pages back behind itself, so that resident memory stays that of the pieces in flight."""

    def read(self, path: str, offset: int, view: memoryview) -> None:
        """Fills ``view`` from ``offset``; a window of at most `WINDOW` bytes is mapped at a time.

        Raises:
            SourceChanged: the file ends before ``view`` is full.
        """
        while view:
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            piece = view[: WINDOW - (offset - start)]
            if not _copy_from_map(self.fd(path), start, offset - start, piece):
                super().read(path, offset, piece)  # which says why, if it cannot either
            view, offset = view[len(piece) :], offset + len(piece)


def _copy_from_map(fd: int, start: int, skip: int, view: memoryview) -> bool:
    """Fills ``view`` from a map of a file at ``start``, ``skip`` bytes into it; whether that could be done.

    The kernel copies: a page that is past the end, or that the disk does not give, is an error to it, and would be a fatal signal to us.
    """
    if _libc is None or not hasattr(_libc, "process_vm_readv"):
        return False
    try:
        window = mmap.mmap(fd, skip + len(view), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    except (OSError, ValueError):  # beyond the end, or a file system without maps
        return False
    with window:
        ours, theirs = ctypes.c_char.from_buffer(view), ctypes.c_char.from_buffer(window)
        into = (ctypes.c_size_t * 2)(ctypes.addressof(ours), len(view))
        of = (ctypes.c_size_t * 2)(ctypes.addressof(theirs) + skip, len(view))
        count = _libc.process_vm_readv(os.getpid(), ctypes.byref(into), 1, ctypes.byref(of), 1, 0)
        del theirs  # a map that is pointed into cannot be closed
    return bool(count == len(view)) and os.fstat(fd).st_size >= start + skip + len(view)  # a page is filled up with zeros


def is_sparse(file: int | str) -> bool:
    """Whether the file has holes worth keeping."""
    status = os.stat(file)  # noqa: PTH116 - a descriptor, too
    return hasattr(os, "SEEK_DATA") and status.st_blocks * 512 < status.st_size - 4096


def data_ranges(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, stop) that are not holes. Moves the descriptor's position: it must be this thread's own."""
    while start < stop:
        try:
            begin = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end
                return
            raise
        if begin >= stop:
            return
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), stop)
        yield begin, end
        start = end


def copy_range(source: int, target: int, src: int, dst: int, nbytes: int, buffer: Callable[[], memoryview], path: str = "") -> None:
    """Copies ``nbytes`` from offset ``src`` to offset ``dst``, in the kernel where it can, else through ``buffer()``.

    Raises:
        SourceChanged: the source ends before that.
    """
    while nbytes:
        if hasattr(os, "copy_file_range"):
            try:
                count = os.copy_file_range(source, target, nbytes, src, dst)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                count = -1
        else:
            count = -1
        if count <= 0:  # nothing may mean the end, or a file system that has no such thing
            view = buffer()[: min(nbytes, CHUNK)]
            count = os.preadv(source, [view], src) if hasattr(os, "preadv") else _seek_read(source, src, view)
            write(target, view[:count], dst)
        if count == 0:
            raise SourceChanged(f"{path}: ends at byte {src}, {nbytes} more were planned: it changed; plan again")
        src, dst, nbytes = src + count, dst + count, nbytes - count


def write(fd: int, view: memoryview, offset: int) -> None:
    """Writes all of ``view`` at ``offset``."""
    while view:
        if hasattr(os, "pwrite"):
            count = os.pwrite(fd, view, offset)
        else:
            with _seek_lock:
                os.lseek(fd, offset, os.SEEK_SET)
                count = os.write(fd, view)
        view, offset = view[count:], offset + count


def filled(view: memoryview, block: int = 1 << 16) -> Iterator[tuple[int, int]]:
    """Where in ``view`` there are bytes other than zeros, as ranges of whole blocks."""
    zeros, start = bytes(block), 0
    for at in range(0, len(view), block):
        piece = view[at : at + block]
        if piece == zeros[: len(piece)]:
            if start < at:
                yield start, at
            start = at + len(piece)
    if start < len(view):
        yield start, len(view)


def check_folder(path: Path) -> None:
    """Refuses what is no folder of its own: what is written below a link is written somewhere else.

    Raises:
        DestinationError: it is a link, or a file.
    """
    if not stat.S_ISDIR(path.lstat().st_mode):
        what = "a link" if path.is_symlink() else "no folder"
        raise DestinationError(f"{path}: is {what}, and files are to go below it: remove it, or give another DST")


def make_folders(root: Path, name: str) -> None:
    """Makes the folders of an output file below ``root``.

    Raises:
        DestinationError: one of them is a link, or a file.
    """
    folder = root
    folder.mkdir(parents=True, exist_ok=True)
    for part in PurePosixPath(name).parent.parts:
        folder = folder / part
        with suppress(FileExistsError):
            folder.mkdir()
        check_folder(folder)


def sync_directory(path: str) -> None:
    """Makes the names in a directory durable, where the system knows how to."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def name_in(error: OSError) -> str:
    """The file that an error names, or nothing; of one that came by a descriptor, Python gives the number."""
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""


def describe_os_error(error: OSError, path: str) -> RunError:
    """An operating system's error as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: no room left on the disk; free some and rerun the same command with --resume")
    return RunError(f"{name_in(error) or path}: {error.strerror or error}; mend that and rerun the same command with --resume")
