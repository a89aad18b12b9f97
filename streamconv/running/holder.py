"""A log that one process alone writes to: it is locked (``flock``); where there are no locks, it says who is at work, dead or alive."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import DestinationError
from streamconv.running.directory import STRANGE
from streamconv.running.log import Holder, Line, read_lines
from streamconv.running.output import MOST
from streamconv.storage.reading import check_whole

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None  # type: ignore[assignment]

FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


def open_locked(path: Path, flags: int) -> int:
    """A descriptor of ``path``, locked, or -1 if it is not there.

    Raises:
        DestinationError: another run has it, or it is no file.
    """
    while True:
        try:
            fd = os.open(path, flags | FLAGS, 0o666)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except OSError as error:
            raise _describe_stranger(path, error) from error
        try:
            check_whole(fd, MOST)
        except OSError as error:
            os.close(fd)
            raise _describe_stranger(path, error) from error
        if not _lock_or_close(fd):
            holder = last_value(read_log(fd)[0], "holder") or {}
            os.close(fd)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise DestinationError(f"{path.parent}: {who} is writing there: wait for it, or give another DST")
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # it was finished and removed in between


def _describe_stranger(path: Path, error: OSError) -> Exception:
    """What is said of something in a log's place that cannot be one; an error of another kind as it is."""
    if error.errno not in STRANGE:
        return error
    return DestinationError(f"{path}: is in the place of this output's log and {error.strerror}: remove it, or give another DST")


def read_log(fd: int) -> tuple[list[Line], int, bool]:
    """The whole lines of an open log, how many bytes they are, and whether a whole line follows that is none."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        text = file.read(check_whole(fd, MOST))
    lines, size = read_lines(text)
    return lines, size, b"\n" in text[size:]


def last_value(lines: Iterable[Mapping[str, Any]], key: str) -> Any:
    """What the last line that has ``key`` says of it; None where no line does."""
    return next((line[key] for line in reversed(list(lines)) if key in line), None)


def lock_file(fd: int) -> bool:
    """Takes a file's lock; where there are none, whether the last holder is gone."""
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    holder = last_value(read_log(fd)[0], "holder")
    return holder is None or not is_alive(holder)


def _lock_or_close(fd: int) -> bool:
    """`lock_file`; a descriptor that cannot be locked for another reason is closed."""
    try:
        return lock_file(fd)
    except OSError:
        os.close(fd)
        raise


def is_alive(holder: Holder) -> bool:
    """Whether a process is there; of those on other hosts nobody knows."""
    if holder["host"] != socket.gethostname():
        return True
    return holder["pid"] != os.getpid() and holder["started"] is not None and _read_start(holder["pid"]) == holder["started"]


def describe_process() -> Holder:
    """This process."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _read_start(os.getpid())}


def _read_start(pid: int) -> float | None:
    """When a process began, in the system's own measure; None where it is not there."""
    if sys.platform == "linux":
        try:
            return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        except OSError:
            return None
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
