"""DST: what a path means as a destination, and whether it may be written."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from streamconv.checkpoint.opening import Checkpoint
from streamconv.engine.io import check_folder
from streamconv.errors import DestinationError, SpaceError, UsageError
from streamconv.formats.registry import DEFAULT, by_suffix, find_format
from streamconv.planning.plan import Plan
from streamconv.running.bucket import Bucket
from streamconv.running.directory import PARTIAL, Directory, partial
from streamconv.running.output import check_free, state_name
from streamconv.storage import is_url
from streamconv.storage.addresses import public
from streamconv.storage.filenames import LONGEST
from streamconv.storage.local import walk
from streamconv.storage.places import Identity, identify, identify_with_parents
from streamconv.storage.sinks import open_sink
from streamconv.text import did_you_mean
from streamconv.units import format_size

_FOREIGN = (
    ".gguf", ".ggml", ".onnx", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".npz", ".npy", ".pkl", ".pickle", ".pb", ".tflite", ".mlmodel",
    ".mlpackage", ".nemo", ".tar", ".zip", ".gz", ".json", ".yaml", ".yml", ".txt", ".html", ".index", ".model", ".th", ".t7", ".joblib",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """DST taken apart: the directory of the files, the one file's name if DST names one, and the container."""

    root: Path
    file: str | None
    format: str

    @classmethod
    def of(cls, dst: str | os.PathLike[str], format: str | None, default: str = DEFAULT) -> Target:  # noqa: A002
        path = Path(os.path.abspath(dst))  # noqa: PTH100 - links in DST are kept as the user wrote them
        is_one = not os.path.isdir(path)  # noqa: PTH112 - unlike Path.is_dir it never raises
        if found := _read_format(path, format, is_one=is_one):
            return cls(path.parent, path.name, found)
        return cls(path, None, format or default)

    @property
    def path(self) -> Path:
        return self.root / self.file if self.file else self.root

    @property
    def output(self) -> Directory:
        """What is at DST."""
        return Directory(self.root, self.file)

    def check(self, checkpoint: Checkpoint, *, overwrite: bool, resume: bool) -> None:
        """Refuses a DST that is, holds or lies in SRC, or that has something in it."""
        path = self.path
        src = checkpoint.location.local
        if src is not None:
            self._check_source(src, [Path(str(file)) for file in checkpoint.contents.files])
        if path.exists() and not path.is_dir() and not self.file:
            raise DestinationError(f"{path}: exists and is not a directory: give another DST")
        above = next((parent for parent in self.root.parents if parent.exists() or parent.is_symlink()), None)
        if above is not None and not above.is_dir() and not self.root.exists():
            raise DestinationError(f"{path}: {above} is not a directory: give another DST")
        if not overwrite and not resume:
            check_free(self.output)

    def _check_source(self, src: Path, files: Iterable[Path]) -> None:
        """Refuses a DST that is, holds or lies in SRC, by whatever mounts and links."""
        path, mine = self.path, identify(self.path)
        if mine is not None and mine == identify(src):
            raise DestinationError(f"{path}: DST is SRC: give another DST")
        if src.is_dir() and not _folders_in(src).isdisjoint(identify_with_parents(path)):
            raise DestinationError(f"{path}: DST lies inside SRC {src}: give a DST outside of it")
        if mine is not None and any(mine in identify_with_parents(file) for file in (src, *files)):
            raise DestinationError(f"{path}: SRC {src} lies inside DST: give another DST")


def _folders_in(folder: Path) -> set[Identity]:
    """A folder and those below it, but for hidden ones."""
    found = {identify(folder)}
    for here, folders, _ in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = [Path(str(here), name) for name in folders]
        found |= {identify(inner) for inner in inside if not inner.is_symlink()}
    return {known for known in found if known is not None}


@dataclass(frozen=True)
class RemoteTarget:
    """DST taken apart where it is a URL, as `Target` does; ``create_pr``: what is put there shall be a pull request."""

    root: str
    file: str | None
    format: str
    create_pr: bool = False

    @classmethod
    def of(cls, dst: str, format: str | None, default: str, *, create_pr: bool) -> RemoteTarget:  # noqa: A002
        url = public(dst).rstrip("/")
        path = PurePosixPath(url.partition("://")[2])
        at_root = len(path.parts) < (3 if url.startswith("hf://") else 2)
        if found := _read_format(path, format, is_one=not at_root):
            return cls(url.rpartition("/")[0], path.name, found, create_pr)
        return cls(url, None, format or default, create_pr)

    @property
    def path(self) -> str:
        return f"{self.root}/{self.file}" if self.file else self.root

    @property
    def output(self) -> Bucket:
        """What is at DST."""
        return Bucket(open_sink(self.root, create_pr=self.create_pr), self.file)

    def check(self, checkpoint: Checkpoint, *, overwrite: bool, resume: bool) -> None:
        """Refuses a DST that is, holds or lies in SRC, or that has something in it, as far as its store tells."""
        path, src, output = self.path, checkpoint.path, self.output
        if self.create_pr:
            return
        if path == src or output.sink.holds(src):
            raise DestinationError(f"{path}: DST is SRC: give another DST" + ", or --create-pr" * path.startswith("hf://"))
        if f"{path}/".startswith(f"{src}/"):
            raise DestinationError(f"{path}: DST lies inside SRC {src}: give a DST outside of it")
        if f"{src}/".startswith(f"{path}/"):
            raise DestinationError(f"{path}: SRC {src} lies inside DST: give another DST")
        if not overwrite and not resume:
            check_free(output)


def target_of(
    dst: str | os.PathLike[str],
    format: str | None,  # noqa: A002 - the word of the command line
    default: str = DEFAULT,
    *,
    create_pr: bool = False,
) -> Target | RemoteTarget:
    """DST taken apart.

    Raises:
        UsageError: it contradicts ``format``, or is a URL that cannot be written to.
    """
    if format is not None:
        find_format("--format", format)
    if is_url(dst) and not str(dst).startswith("file://"):
        return RemoteTarget.of(str(dst), format, default, create_pr=create_pr)
    if create_pr:
        raise UsageError(f"--create-pr: {dst} is no repository on the Hub: give hf://org/name")
    return Target.of(str(dst).removeprefix("file://"), format, default)


def output_of(path: str) -> Target | RemoteTarget | None:
    """The DST that a path names, if it is a folder, a URL, or a file that a run has begun; None if it is another file."""
    if os.path.isdir(path) or is_url(path):  # noqa: PTH112 - unlike Path.is_dir it never raises
        return target_of(path, None)
    if Path(path).suffix not in by_suffix():
        return None
    target = target_of(path, None)
    return target if target.output.is_begun() or target.output.load_earlier() is not None else None


def _read_format(path: PurePath, format: str | None, *, is_one: bool) -> str | None:  # noqa: A002
    """The container of the one file that a path names; None where it names a directory."""
    container = by_suffix().get(path.suffix) if is_one else None
    if container is None or container.lay_out is None:
        if is_one:
            _check_suffix(path)
        return None
    if format and format != container.name:
        raise UsageError(f"{path}: ends in {path.suffix}, which is not --format {format}")
    return container.name


def _check_suffix(path: PurePath) -> None:
    """Refuses a name that means a file, of a kind that is not written: it would become a directory."""
    suffix = path.suffix.lower()
    known = by_suffix()
    choices = [ending for ending, container in known.items() if container.lay_out]
    near = did_you_mean(suffix, choices) if re.fullmatch(r"\.[a-z]{2,}", suffix) and suffix not in known else ""
    if suffix in _FOREIGN or suffix in known or near:
        raise UsageError(
            f"{path}: {path.suffix} files are not written, and it would be a directory{near}; give a file in {', '.join(choices)}, "
            "or a directory of another name"
        )


def check_staging(plan: Plan) -> None:
    """Raises SpaceError unless the directory for temporary files has room for what of a plan is made there before it is uploaded."""
    folder = tempfile.gettempdir()
    check_names(plan, Path(folder))
    free = shutil.disk_usage(folder).free
    if plan.totals.disk_needed > free:
        needed = format_size(plan.totals.disk_needed)
        raise SpaceError(f"{folder}: no room: files of {needed} are made there, {format_size(free)} are free: set TMPDIR to another disk")


def check_folders(plan: Plan, root: Path) -> None:
    """Refuses a plan's files where a folder of theirs below ``root`` is a link or no folder.

    Raises:
        DestinationError: says which.
    """
    for folder in dict.fromkeys(folder for file in plan.files for folder in PurePosixPath(file.path).parents):
        path = root / folder
        if folder.name and os.path.lexists(path):
            check_folder(path)


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


def check_room(plan: Plan, root: Path, stale: Iterable[str] = ()) -> None:
    """Raises SpaceError unless the disk has room for a plan's files, once the ``stale`` ones are gone and those in their place."""
    existing = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    replaced = {name for file in plan.files for path in [root / file.path] for name in (path, partial(path))}
    present = sum(_allocated(path) for path in replaced.union(root / name for name in stale))
    if plan.totals.disk_needed > free + present:
        raise SpaceError(
            f"{root}: no room on the disk: the output needs {format_size(plan.totals.disk_needed)}, {format_size(free)} are free: "
            "free some, or give a DST on another disk"
        )


def _allocated(path: Path) -> int:
    """Bytes on the disk that removing ``path`` gives back."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    if not stat.S_ISREG(found.st_mode):
        return 0
    return getattr(found, "st_blocks", -(-found.st_size // 512)) * 512


def prepare(plan: Plan, root: Path, *, suffix: str = PARTIAL) -> None:
    """Makes DST a folder that can be written, or says why it cannot be."""
    try:
        check_folders(plan, root)
        check_names(plan, root, suffix)
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK | os.X_OK):
            raise DestinationError(f"{root}: cannot be written: make it writable or give another DST")
    except OSError as error:
        raise DestinationError(f"{root}: cannot be written: {error.strerror}; give another DST") from error
