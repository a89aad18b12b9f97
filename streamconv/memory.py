"""What this process holds in memory, as the kernel counts it. All figures in bytes."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamconv.errors import BudgetError
from streamconv.units import format_size

READING = 1_000_000_000  # what reading one thing may take where nobody said how much memory there is to be
BLOCK = 4 << 10  # bytes: direct I/O takes offsets, lengths and addresses that are multiples of this
HUGE_PAGE = 2 << 20  # bytes
RARELY = 200_000  # objects
KEPT = 16 << 20  # bytes that a thread's heap may keep at its end
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""How memory is mapped that no file stands behind: shared, which is the default, would count as file pages."""
_STATUS = Path("/proc/self/status")


def _status(path: Path = _STATUS) -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon, RssFile, ... of this process or another; empty where there is no such process, or no /proc."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Has the cyclic garbage collector look rarely: many objects are made here that stay, and it would walk them again and again.

    It does look: what other libraries leave in cycles may be large.

    >>> with collecting_rarely():
    ...     gc.get_threshold()[0]
    200000
    """
    usual = gc.get_threshold()
    gc.set_threshold(RARELY, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def keep_freed() -> None:
    """Has the C library keep some memory that is freed, which numbers on their way take again and again, and not give it back each time.

    It does so by itself for pieces below 128 kB only. Elsewhere than with glibc nothing changes.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_TRIM_THRESHOLD, KEPT)
        library.mallopt(_MMAP_THRESHOLD, KEPT // 2)


def resident() -> int:
    """Resident memory now, mapped pages included."""
    if (status := _status()) and "VmRSS" in status:
        return status["VmRSS"]
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The high-water mark of resident memory since the process began."""
    if (status := _status()) and "VmHWM" in status:
        return status["VmHWM"]
    if os.name == "nt":
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def anonymous() -> int:
    """Resident memory that no file stands behind (where the kernel tells; else all resident memory)."""
    return _status().get("RssAnon") or resident()


def anonymous_of(process: int) -> int:
    """That of another process, by its number; 0 where the kernel does not tell, or it has ended."""
    return _status(Path(f"/proc/{process}/status")).get("RssAnon", 0)


def allocate_pages(nbytes: int) -> memoryview:
    """``nbytes`` of zeros that begin at a huge page, and lie in such pages as far as they fill them and the system has some.

    A disk takes so many pieces of memory in a request: 254 small pages are 1 MB, a huge page is a single piece.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, max(nbytes, 1), **PRIVATE))[:nbytes]
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE, **PRIVATE)
    first, filled = -address_of(pages) % HUGE_PAGE, nbytes // HUGE_PAGE * HUGE_PAGE
    with suppress(OSError):  # a kernel without them
        if filled:
            pages.madvise(mmap.MADV_HUGEPAGE, first, filled)
    return memoryview(pages)[first : first + nbytes]


def address_of(buffer: memoryview | mmap.mmap) -> int:
    """Where in memory a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def trim() -> None:
    """Gives the system back what is free in the C library's heaps, where that library can be asked to (glibc's)."""
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_bound: int | None = None  # of this process, as memory is


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """Has `claim` keep the process below ``limit`` for the block."""
    global _bound  # noqa: PLW0603
    before, _bound = _bound, limit
    try:
        yield
    finally:
        _bound = before


def claim(nbytes: int, what: str) -> None:
    """Refuses to take so much more, before it is taken; ``what`` begins the line.

    Raises:
        BudgetError: it would be more than `bounded` says, or than `READING`.
    """
    if nbytes < 1 << 20:
        return
    used = 0 if _bound is None else resident()
    limit = READING if _bound is None else _bound
    if used + nbytes > limit:
        needed = -(-(used + nbytes) // 10**6) * 10**6
        beside = f" beside the {format_size(used)} of the process" if used else ""
        remedy = f"use --max-memory {needed // 10**6}MB" if used else "give a checkpoint of smaller files"
        raise BudgetError(
            f"{what} may take {format_size(nbytes)} to read{beside}, more than the {format_size(limit)} there are: {remedy}", needed
        )
