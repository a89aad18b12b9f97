"""Folders for files on their way to somewhere else: each goes with its process, and what a killed one has left with the next one here."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from streamconv.errors import UsageError

try:
    import fcntl
except ImportError:  # a system without it: nothing is known of what others have left
    fcntl = None  # type: ignore[assignment]

_ATTEMPTS = 3  # to remove a folder, where the system fails now and then


@contextmanager
def staging() -> Iterator[Path]:
    """A new folder in the directory for temporary files; its lock says that somebody is at it.

    Raises:
        UsageError: none can be made there.
    """
    _clear(_prefix())
    try:
        folder, lock = _make()
    except OSError as error:
        where = error.filename or tempfile.gettempdir()
        raise UsageError(f"{where}: no folder for temporary files can be made ({error.strerror}): set TMPDIR to another") from error
    try:
        yield folder
    finally:
        _remove(folder)
        if lock >= 0:
            with suppress(OSError):
                os.close(lock)


def _make() -> tuple[Path, int]:
    """A folder and the descriptor that locks it; -1 where there are no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix()))
        try:
            lock = _lock(folder)
        except OSError:
            _remove(folder)
            raise
        if lock is not None:
            return folder, lock  # else another process took it for what a killed one has left


def _lock(folder: Path) -> int | None:
    """The descriptor that holds a folder's lock, -1 where there are no locks, None if another process holds it or the folder is gone."""
    if fcntl is None:
        return -1
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), folder.lstat()):
            return fd
        result = None
    except (BlockingIOError, FileNotFoundError):
        result = None
    except OSError:
        result = -1
    os.close(fd)
    return result


@cache
def _clear(prefix: str) -> None:
    """Removes what killed processes of this machine have left, once."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            lock = _lock(folder)
            if lock is not None and lock >= 0:
                _remove(folder)
                os.close(lock)


def _remove(folder: Path) -> None:
    for _ in range(_ATTEMPTS):
        with suppress(OSError):  # which it raises all the same where it cannot close a folder
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@cache
def _prefix() -> str:
    """How names of such folders begin on this machine, since it was started: of others, which may share them, locks say nothing here."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        machine = f"{socket.gethostname()} {uuid.getnode()}"
    return f"streamconv-{uuid.uuid5(uuid.NAMESPACE_OID, machine).hex[:12]}-"
