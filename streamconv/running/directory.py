"""An output on this machine, or on a file system that many share: a folder, or one file in a folder of others."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from streamconv.engine.check import OutputCheck
from streamconv.engine.io import check_folder, sync_directory
from streamconv.errors import DestinationError, SpaceError
from streamconv.planning.plan import Plan
from streamconv.running.output import EARLIER, LOG, MOST, MOST_OF_PLAN, PLAN, STATE, state_name
from streamconv.storage import Version
from streamconv.storage.filenames import LONGEST
from streamconv.storage.reading import read_whole
from streamconv.units import format_size

PARTIAL = ".partial"
DRAFT = ".new"  # at the end of a log's name, until its first line is there
UNFINISHED = re.compile(r"\.[0-9a-f]{12}\.partial$")
ATTEMPTS = 5  # to make or remove what others remove or make at the same time
STRANGE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EINVAL, errno.EFBIG}  # what links, folders, devices and large files say
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def partial(path: Path, suffix: str = PARTIAL) -> Path:
    """The name of an output file until it is complete."""
    return path.with_name(f"{path.name}{suffix}")


def new_suffix() -> str:
    """A suffix of its own for the names of unfinished files."""
    return f".{uuid.uuid4().hex[:12]}.partial"


def holds(path: Path, size: int) -> bool:
    """Whether at ``path`` there is a file of this size, and no link."""
    try:
        return path.is_file() and not path.is_symlink() and path.stat().st_size == size
    except OSError:
        return False


class Directory:
    """See `Output`.

    Args:
        root: the folder that the output's files are relative to.
        single: the name of the one file, if DST is one.
    """

    sink = None
    stays = False

    def __init__(self, root: Path, single: str | None = None) -> None:
        self.root, self._single = root, single
        self.where = str(root / single if single else root)
        self.state = root / state_name(single)
        self.earlier = self.state.with_name(f"{self.state.name}{EARLIER}")

    # Files -----------------------------------------------------------------------------------------------------

    def list(self, folders: Iterable[str] = ()) -> Mapping[str, Version]:
        if self._single or not self.root.is_dir():
            return self.look([self._single] if self._single else [])
        inside = [path for path in self.root.iterdir() if path.is_dir() and not path.is_symlink()]
        deep = [self.root / folder for folder in folders if "/" in folder]
        readable = filter(_is_readable, {self.root, *inside, *(folder for folder in deep if not folder.is_symlink())})
        paths = itertools.chain.from_iterable(folder.iterdir() for folder in readable)
        return self.look(path.relative_to(self.root).as_posix() for path in paths if not path.is_dir())

    def look(self, names: Iterable[str]) -> dict[str, Version]:
        versions = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                versions[name] = _version(self.root / name)
        return versions

    def remove(self, seen: Mapping[str, Version], remade: Container[str]) -> None:
        """See `Output`.

        What others may replace is taken aside before it is looked at again: between a look and a removal one may have put a new one there.
        """
        there = self.look(seen)
        for name in (name for name, version in there.items() if version == seen[name]):
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                raise DestinationError(f"{path}: is a directory, and a file is to be there: remove it, or give another DST")
            aside = partial(path, new_suffix()) if name in remade else path
            with suppress(FileNotFoundError):
                path.rename(aside)
                if _version(aside) == seen[name]:
                    aside.unlink()
                elif aside != path:
                    _link(aside, path)  # back, unless another one is there by now
                    aside.unlink(missing_ok=True)
        for folder in {(self.root / name).parent for name in there}:
            if folder.is_dir():
                sync_directory(str(folder))

    def find_wrong(self, plan: Plan, numbers: Iterable[int]) -> set[int]:
        """See `Output`; checksums, which take reading a file, are not looked at."""
        bare = replace(plan, files=tuple(replace(file, checksums=()) for file in plan.files))
        wrong, check = set(), OutputCheck(bare)
        for number in numbers:
            try:
                wrong |= check.find_wrong_literals([number])
            except FileNotFoundError:  # another process found it wrong and took it away
                wrong.add(number)
        return wrong

    def clear_up(self, plan: Plan) -> None:
        remove_unfinished(plan)

    def address(self, name: str) -> Path:
        return self.root / name

    def check_room(self, plan: Plan, stale: Iterable[str]) -> None:
        above = next(parent for parent in (self.root, *self.root.parents) if parent.exists())
        free = shutil.disk_usage(above).free
        targets = [self.root / file.path for file in plan.files]
        replaced = {*targets, *map(partial, targets), *(self.root / name for name in stale)}
        present = sum(map(_allocated, replaced))
        if plan.totals.disk_needed > free + present:
            raise SpaceError(
                f"{self.root}: no room on the disk: the output needs {format_size(plan.totals.disk_needed)}, {format_size(free)} are free: "
                "free some, or give a DST on another disk"
            )

    def prepare(self, plan: Plan, suffix: str) -> None:
        try:
            check_folders(plan, self.root)
            check_names(plan, self.root, suffix)
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise DestinationError(f"{self.root}: cannot be written: make it writable or give another DST")
        except OSError as error:
            raise DestinationError(f"{self.root}: cannot be written: {error.strerror}; give another DST") from error

    def check_empty(self) -> None:
        occupied = (
            os.path.lexists(self.where)
            if self._single
            else self.root.is_dir() and any(not entry.name.startswith(STATE) for entry in self.root.iterdir())
        )
        if occupied:
            raise DestinationError(f"{self.where}: already exists and is not empty: give another DST, or --overwrite, or --resume")

    # Its state -------------------------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.state / LOG

    def is_begun(self) -> bool:
        return self.log.exists()

    def load(self, name: str) -> bytes | None:
        """See `Output`; nothing of what cannot be such a file.

        Raises:
            OSError: it cannot be read now.
        """
        return _read(self.state / name, MOST if name == LOG else MOST_OF_PLAN)

    def load_earlier(self) -> bytes | None:
        return _read(self.earlier, MOST)

    def keep(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """See `Output`; unless there is one, which stays: it is made by ``link``, which one of many wins, over NFS too."""
        path = self.state / name
        if path.exists():
            return
        for _ in range(ATTEMPTS):
            draft = partial(path, new_suffix())
            try:
                if name == LOG:  # else whoever took the folder away has ended what was begun
                    self.state.mkdir(exist_ok=True)
                write_durably(draft, pieces())
                _link(draft, path)
            except FileNotFoundError:
                if name != LOG:
                    return
                if not self.root.exists():
                    raise
            else:
                break
            finally:
                with suppress(OSError):
                    draft.unlink()
                with suppress(OSError):  # it holds something, unless nothing could be made
                    self.state.rmdir()
        sync_directory(str(self.state))
        sync_directory(str(self.root))

    def leave(self) -> None:
        """See `Output`; what is not of ours stays, wherever it is."""
        if not os.path.lexists(self.state):
            return
        check_folder(self.state)
        self.log.unlink(missing_ok=True)
        for _ in range(ATTEMPTS):
            try:
                for path in self.state.iterdir():
                    if UNFINISHED.sub("", path.name).removesuffix(DRAFT) in {PLAN, LOG}:
                        path.unlink(missing_ok=True)
                self.state.rmdir()
                break
            except FileNotFoundError:  # another was quicker
                break
            except OSError as error:  # another has put something there meanwhile
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        sync_directory(str(self.root))

    def drop_earlier(self) -> None:
        self.earlier.unlink(missing_ok=True)


def write_durably(path: Path, pieces: Iterable[bytes]) -> None:
    """Makes a new file of these pieces that outlasts a crash."""
    with path.open("xb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def check_folders(plan: Plan, root: Path) -> None:
    """Refuses a plan's files, and the state, where a folder of theirs below ``root`` is a link or no folder.

    Raises:
        DestinationError: says which.
    """
    folders = [folder for file in plan.files for folder in PurePosixPath(file.path).parents if folder.name]
    for folder in dict.fromkeys([PurePosixPath(state_name(plan.single)), *folders]):
        if os.path.lexists(root / folder):
            check_folder(root / folder)


def check_names(plan: Plan, root: Path, suffix: str = PARTIAL) -> None:
    """Refuses names that are too long for the file system at ``root``, with the longest ``suffix`` that they have until files are complete.

    Raises:
        DestinationError: says which.
    """
    above = next(parent for parent in (root, *root.parents) if parent.exists())
    longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else LONGEST
    names = [file.path.rpartition("/")[2] + suffix for file in plan.files]
    names.append(state_name(plan.single))
    for name in names:
        if len(os.fsencode(name)) > longest:
            raise DestinationError(
                f"{root / name}: its name, until it is complete, has {len(os.fsencode(name))} bytes, and {longest} at most are allowed "
                "there: give DST, or the file in SRC, a shorter one"
            )


def remove_unfinished(plan: Plan, older: float = 0.0) -> None:
    """Removes what others left of a plan's files under names of their own and have not written to for ``older`` seconds."""
    root = Path(plan.root)
    names = {root / file.path for file in plan.files} | {root / STATE}
    for folder in {path.parent for path in names}:
        for path in folder.iterdir() if folder.is_dir() else ():
            whole = path.with_name(UNFINISHED.sub("", path.name))
            with suppress(FileNotFoundError):  # another was quicker
                if whole != path and whole in names and (not older or _age(path) >= older):
                    path.unlink()


def _age(path: Path) -> float:
    """Seconds since a file was written to, by the clock of the file system that it lies on, which may differ from ours; 0 if unknown."""
    probe = partial(path.with_name(STATE), new_suffix())
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _is_readable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.R_OK)


def _version(path: Path) -> Version:
    """Size, or -1 of what is no plain file, and what changes with its content and not with its name."""
    status = path.lstat()
    return Version(status.st_size if stat.S_ISREG(status.st_mode) else -1, str(status.st_mtime_ns))


def _read(path: Path, most: int) -> bytes | None:
    """The bytes of a file; None where there is none, and none of something else in its place."""
    try:
        return read_whole(path, most)
    except OSError as error:
        if error.errno in STRANGE:
            return b""
        if error.errno in _ABSENT:
            return None
        raise OSError(error.errno, error.strerror, str(path)) from error


def _link(draft: Path, path: Path) -> None:
    """Gives a draft its name, unless there is such a file."""
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        draft.replace(path)  # of two at once the later stays, and the other finds out when it looks


def _allocated(path: Path) -> int:
    """Bytes on the disk that removing ``path`` gives back."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        return 0
    return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
