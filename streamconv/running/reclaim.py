"""Giving a source's space back while it is converted, for a disk that holds one copy only.

Output files are made one after the other. When one is durable and has been compared with its sources, whatever no unfinished file reads
of the source files it came from is given back, their tables of contents first of all, so that nothing takes what is left for a
checkpoint; a file that nothing reads any more is deleted. From then on the plan is to be had from DST only.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from streamconv.engine.io import sync_directory
from streamconv.errors import DestinationError, SourceChanged
from streamconv.graph.node import sources
from streamconv.memory import BLOCK
from streamconv.planning.plan import Copy, FilePlan, Plan
from streamconv.planning.segments import source_files
from streamconv.storage import is_url
from streamconv.storage.local import walk
from streamconv.storage.places import Identity, identify

Range = tuple[int, int]
_FOLDERS = 1000  # of a checkpoint, at most; a file in somebody's home directory has more beside it
_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def find_reads(plan: Plan, file: FilePlan) -> dict[str, list[Range]]:
    """By source file, the byte ranges that an output file is made of; of what is computed, all of its tensors."""
    reads: dict[str, set[Range]] = {}
    for segment in file.segments:
        if isinstance(segment, Copy):
            reads.setdefault(plan.sources[segment.source].path, set()).add((segment.offset, segment.offset + segment.nbytes))
        else:
            for leaf in sources(plan.nodes[segment.node]):
                for extent in leaf.extents:
                    reads.setdefault(extent.path, set()).add((extent.offset, extent.offset + extent.nbytes))
    return {path: sorted(ranges) for path, ranges in reads.items()}


def find_gaps(ranges: Collection[Range], size: int) -> Iterator[Range]:
    """What the ``ranges`` of a file leave out."""
    at = 0
    for start, stop in sorted(ranges):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < size:
        yield at, size


class Reclaim:
    """The source files of a plan whose space is given back: those that tensors are read from, and no sidecar."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._reads = {file.path: find_reads(plan, file) for file in plan.files}
        compared = [plan.nodes[number] for check in plan.checks for number in (check.left, check.right)]
        of_tensors = set(source_files(compared)).union(*(self._reads[file.path] for file in plan.files if file.tensors))
        of_sidecars = set[str]().union(*(self._reads[file.path] for file in plan.files if not file.tensors))
        self.files = {source.path: source for source in plan.sources if source.path in of_tensors - of_sidecars}

    def check(self, finished: Collection[str] = ()) -> None:
        """Refuses sources whose space cannot be given back, or that others have, too, unless a ``finished`` file was made of them.

        Raises:
            DestinationError: says which and why.
        """
        if url := next(filter(is_url, self.files), None):
            raise DestinationError(f"{url}: is not on this machine, and nothing is deleted elsewhere: leave out --reclaim-source")
        mine = sorted(self.files.keys() - self.touched(finished))
        for path in mine:
            real, names = os.path.realpath(path), os.lstat(path).st_nlink
            why = None
            if real != os.path.abspath(path):  # noqa: PTH100 - links are looked for
                why = f"is reached through a link (it is {real}), and may be somebody else's, too"
            elif names > 1:
                why = f"has {names} names (hard links): its space would not come back"
            elif not os.access(path, os.W_OK) or not os.access(Path(path).parent, os.W_OK):
                why = "cannot be changed: make it and its folder writable"
            if why:
                raise DestinationError(f"--reclaim-source: {path} {why}; leave the option out, or give a copy of your own")
        self._check_alone({identify(Path(path)): path for path in mine})

    def _check_alone(self, mine: Mapping[Identity | None, str]) -> None:
        """Refuses files, by what they are, that are read, or are to be had beside them, by other names, too."""
        links = _links(sorted({Path(path).parent for path in mine.values()}))
        others = [Path(source.path) for source in self._plan.sources if source.path not in self.files and not is_url(source.path)]
        for other in (*others, *links):
            identity = identify(other)
            if identity is not None and identity in mine:
                raise DestinationError(
                    f"--reclaim-source: {other} leads to {mine[identity]}, which will be gone: leave the option out, or remove that"
                )

    def touched(self, finished: Collection[str]) -> set[str]:
        """The source files that may have been given back, in part or as a whole, once these output files are finished."""
        return {path for name in finished for path in self._reads.get(name, ()) if path in self.files}

    def release(self, finished: Collection[str], of: Collection[str]) -> None:
        """Gives back what only ``finished`` output files read of the source files that those in ``of`` read.

        Raises:
            OSError: the space cannot be given back.
        """
        everything = len(finished) == len(self._plan.files)
        for path in sorted(self.files if everything else self.touched(of)):
            needed = self._needed(path, finished)
            if not needed:
                Path(path).unlink(missing_ok=True)
                sync_directory(str(Path(path).parent))
            elif can_punch(Path(path).parent):
                punch(path, list(find_gaps(needed, self.files[path].size)))

    def disk_needed(self, finished: Collection[str] = ()) -> int:
        """Bytes of free space that making the unfinished files takes at most, what is given back meanwhile taken off."""
        done, used, most = set(finished), 0, 0
        device = next(p for p in (Path(self._plan.root), *Path(self._plan.root).parents) if p.exists()).stat().st_dev
        mine = [path for path in self.files if Path(path).exists() and Path(path).stat().st_dev == device]
        given_back = {path: self._given_back(path, done) if path in self.touched(done) else 0 for path in mine}
        for file in self._plan.files:
            if file.path in done:
                continue
            used += file.size
            most = max(most, used)
            done.add(file.path)
            for path in self.touched([file.path]).intersection(mine):
                now = self._given_back(path, done)
                used, given_back[path] = used - (now - given_back[path]), now
        return most

    def _needed(self, path: str, finished: Collection[str]) -> list[Range]:
        unfinished = (reads for name, reads in self._reads.items() if name not in finished)
        return list(itertools.chain.from_iterable(reads.get(path, ()) for reads in unfinished))

    def _given_back(self, path: str, finished: Collection[str]) -> int:
        source, needed = self.files[path], self._needed(path, finished)
        if not needed:
            return source.allocated
        if not can_punch(Path(path).parent):
            return 0
        gaps = find_gaps(needed, source.size)
        return min(source.allocated, sum(max(0, stop // BLOCK - -(-start // BLOCK)) * BLOCK for start, stop in gaps))


def _links(folders: Iterable[Path]) -> Iterator[Path]:
    """The links in these folders and below them, in the first `_FOLDERS` of each."""
    for folder in folders:
        for here, inner, names in itertools.islice(walk(folder), _FOLDERS):
            yield from (Path(str(here), name) for name in (*inner, *names) if Path(str(here), name).is_symlink())


_punching: dict[Path, bool] = {}


def can_punch(folder: Path) -> bool:
    """Whether files in a folder can be given holes."""
    if folder not in _punching:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(BLOCK))
                file.flush()
                _punch(file.fileno(), 0, BLOCK)
            _punching[folder] = True
        except OSError:
            _punching[folder] = False
    return _punching[folder]


def punch(path: str, ranges: Collection[Range]) -> None:
    """Makes ranges of a file holes.

    Raises:
        OSError: the file system cannot.
        SourceChanged: it is not there.
    """
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise SourceChanged(f"{path}: is gone, and not all of it has been converted: put it back and rerun with --resume") from error
    try:
        for start, stop in ranges:
            _punch(fd, start, stop - start)
        os.fsync(fd)
    finally:
        os.close(fd)


def _punch(fd: int, start: int, nbytes: int) -> None:
    if _libc is None:
        raise OSError(0, "no holes on this system")
    if _libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH, ctypes.c_int64(start), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
