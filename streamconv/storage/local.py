"""Folders of this machine."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from streamconv.storage.folder import Folder, IrregularFile, Walked


class LocalFile(io.FileIO):
    """A file of this machine whose reads bring all that is asked for, up to its end."""

    is_remote = False

    @property
    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        """``size`` bytes, or all that are left."""
        return self.readall() if size is None or size < 0 else _gather(lambda count, _: super(LocalFile, self).read(count) or b"", size)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """At most so many bytes from ``offset``; the position stays."""
        return _gather(lambda count, done: os.pread(self.fileno(), count, offset + done), nbytes)


def _gather(read: Callable[[int, int], bytes], nbytes: int) -> bytes:
    """What ``read`` gives, called with how many bytes are wanted and how many have come: one call of the system may bring fewer."""
    piece = read(nbytes, 0)
    if not piece or len(piece) == nbytes:
        return piece
    pieces, done = [piece], len(piece)
    while done < nbytes and (piece := read(nbytes - done, done)):
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)


class LocalFolder(Folder):
    """A folder of this machine."""

    local: Path

    def __init__(self, path: Path, within: str = "") -> None:
        self.local, self.within = path, within
        self._path = str(path)

    def address(self, name: str) -> str:
        return os.path.join(self._path, name) if name else self._path  # noqa: PTH118 - a text is wanted, of each of many files

    def _find_names(self) -> Sequence[str]:
        return os.listdir(self._path)  # noqa: PTH208 - names are wanted

    def walk(self) -> Iterator[Walked]:
        for folder, folders, files in os.walk(self._path, onerror=_fail):
            yield folder.removeprefix(self._path).lstrip("/"), folders, files

    def has(self, name: str) -> bool:
        return os.path.exists(self.address(name))  # noqa: PTH110 - Path.exists may raise

    def has_file(self, name: str) -> bool:
        return os.path.isfile(self.address(name))  # noqa: PTH113 - Path.is_file may raise

    def has_folder(self, name: str) -> bool:
        return os.path.isdir(self.address(name))  # noqa: PTH112 - Path.is_dir may raise

    def size(self, name: str) -> int:
        return os.stat(self.address(name)).st_size  # noqa: PTH116 - paths are texts here

    def open(self, name: str) -> LocalFile:
        path = self.address(name)
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - and looked at before they are opened
            raise IrregularFile(errno.EINVAL, "not a regular file", path)
        return LocalFile(path)

    def _inner(self, name: str, within: str) -> LocalFolder:
        return LocalFolder(self.local / name, within)


def _fail(error: OSError) -> None:
    if not str(error.filename).endswith("lost+found"):  # which file systems have, and nobody may read
        raise error


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, from above.

    Raises:
        OSError: a folder cannot be read.
    """
    return ((Path(here), folders, files) for here, folders, files in os.walk(folder, onerror=_fail))
