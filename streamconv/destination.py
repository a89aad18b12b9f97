"""DST: what a path means as a destination, whether it may be written, and what has to go first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streamconv.checkpoint import CONTAINERS, FORMAT_OF, Checkpoint, is_weights
from streamconv.engine.journal import NAME as JOURNAL
from streamconv.engine.journal import Journal, journal_path
from streamconv.engine.local import partial
from streamconv.errors import DestinationError, SpaceError, UsageError
from streamconv.formats import sat
from streamconv.plan import Plan
from streamconv.units import format_size


@dataclass(frozen=True)
class Target:
    """DST taken apart: the directory of the files, the one file's name if DST names one, and the container."""

    root: Path
    file: str | None
    format: str

    @classmethod
    def of(cls, dst: str | os.PathLike[str], format: str | None, default: str = "safetensors") -> Target:  # noqa: A002
        path = Path(dst)
        if "://" in str(dst):
            raise UsageError(f"{dst}: URLs cannot be written yet: give a path")
        if format not in (None, *CONTAINERS):
            raise UsageError(f"--format {format}: unknown container; known are {', '.join(CONTAINERS)}")
        path = Path(os.path.abspath(path))  # noqa: PTH100 - links in DST are kept as the user wrote them
        by_suffix = FORMAT_OF.get(path.suffix)
        if by_suffix and not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir it never raises
            if format and format != by_suffix:
                raise UsageError(f"{path}: ends in {path.suffix}, which is not --format {format}")
            return cls(path.parent, path.name, by_suffix)
        return cls(path, None, format or default)

    @property
    def path(self) -> Path:
        return self.root / self.file if self.file else self.root

    def check_free(self) -> None:
        """Refuses a DST that has something in it."""
        path = self.path
        if journal_path(self.root, self.file).exists():
            raise DestinationError(f"{path}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite")
        self.check_empty()

    def check_empty(self) -> None:
        """Refuses a DST that has something in it beside a journal."""
        path = self.path
        mine = {JOURNAL, f"{JOURNAL}.new"}
        occupied = os.path.lexists(path) if self.file else path.is_dir() and any(entry.name not in mine for entry in path.iterdir())
        if occupied:
            raise DestinationError(f"{path}: already exists and is not empty: give another DST, or --overwrite, or --resume")

    def check(self, checkpoint: Checkpoint, *, overwrite: bool, resume: bool) -> None:
        """Refuses a DST that is, holds or lies in SRC, or that has something in it."""
        path, src = self.path, checkpoint.path
        mine, theirs = Path(os.path.realpath(path)), Path(os.path.realpath(src))
        if mine == theirs:
            raise DestinationError(f"{path}: DST is SRC: give another DST")
        if src.is_dir() and mine.is_relative_to(theirs):
            raise DestinationError(f"{path}: DST lies inside SRC {src}: give a DST outside of it")
        if theirs.is_relative_to(mine) or any(os.path.realpath(file).startswith(f"{mine}{os.sep}") for file in checkpoint.contents.files):
            raise DestinationError(f"{path}: SRC {src} lies inside DST: give another DST")
        if overwrite and resume:
            raise UsageError("--overwrite and --resume exclude each other: start afresh, or continue")
        if path.exists() and not path.is_dir() and not self.file:
            raise DestinationError(f"{path}: exists and is not a directory: give another DST")
        above = next((parent for parent in self.root.parents if parent.exists() or parent.is_symlink()), None)
        if above is not None and not above.is_dir() and not self.root.exists():
            raise DestinationError(f"{path}: {above} is not a directory: give another DST")
        if not overwrite and not resume:
            self.check_free()


def check_room(plan: Plan, root: Path, doomed: Iterable[Path]) -> None:
    """Raises SpaceError unless the disk has room for a plan's files, once the ``doomed`` ones are gone and those in their place."""
    existing = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    replaced = {name for file in plan.files for path in [root / file.path] for name in (path, partial(path))}
    present = sum(_allocated(path) for path in replaced.union(doomed))
    if plan.totals.disk_needed > free + present:
        raise SpaceError(
            f"{root}: no room on the disk: the output needs {format_size(plan.totals.disk_needed)}, {format_size(free)} are free: "
            "free some, or give a DST on another disk"
        )


def _allocated(path: Path) -> int:
    """Bytes on the disk that removing ``path`` gives back."""
    if path.is_symlink() or not path.is_file():
        return 0
    found = path.stat()
    return getattr(found, "st_blocks", -(-found.st_size // 512)) * 512


def old_files(root: Path, single: str | None) -> list[Path]:
    """What ``--overwrite`` removes: DST itself if it is one file, else the weight and index files in it, links to nowhere included.

    Weight files that an interrupted run left unfinished are among them.
    """
    if single:
        return [root / single]
    if not root.is_dir():
        return []
    found = (*root.iterdir(), *root.glob(sat.OWN), *root.glob(f"{sat.OWN}.partial"))
    return [path for path in found if is_weights(path.name.removesuffix(".partial")) and not path.is_dir()]


def prepare(plan: Plan, root: Path, *, overwrite: bool, resume: bool) -> None:
    """Makes DST a folder that can be written, or says why it cannot be."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not overwrite and not resume:
            Target(root, plan.single, plan.format).check_free()
        if not os.access(root, os.W_OK | os.X_OK):
            raise DestinationError(f"{root}: cannot be written: make it writable or give another DST")
    except OSError as error:
        raise DestinationError(f"{root}: cannot be written: {error.strerror}; give another DST") from error


def clear(plan: Plan, root: Path, journal: Journal) -> None:
    """Removes what an output replaces; what the run in ``journal`` has made itself stays."""
    own = {root / name for name in journal.finished} | {partial(root / name) for name in journal.durable}
    for path in old_files(root, plan.single):
        if path not in own:
            path.unlink(missing_ok=True)
