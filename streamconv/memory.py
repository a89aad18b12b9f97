"""What this process holds in memory, as the kernel counts it. All figures in bytes."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _status() -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon, RssFile, ... of this process; empty where there is no /proc."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


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


def trim() -> None:
    """Gives the system back what is free in the C library's heaps, where that library can be asked to (glibc's)."""
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
