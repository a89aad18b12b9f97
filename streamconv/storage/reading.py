"""Files of this machine that are read as a whole: never a pipe or device, which may wait or have no end, and never more than expected."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_WHOLE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def read_whole(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file of ``most`` bytes at most.

    Raises:
        OSError: there is none, it is something else, or larger.
    """
    try:
        fd = os.open(path, _WHOLE)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no path ({error})") from error
    with os.fdopen(fd, "rb") as file:
        size = check_whole(fd, most)
        return file.read(size)


def check_whole(fd: int, most: int) -> int:
    """The size of an open file. Raises OSError if it is no regular file, or larger than ``most`` bytes."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or device, no regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"has {status.st_size} bytes, more than the {most} that it can have")
    return status.st_size
