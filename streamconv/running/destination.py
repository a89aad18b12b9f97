"""DST: what a path means as a destination, and whether it may be written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from streamconv.checkpoint.opening import Checkpoint
from streamconv.errors import DestinationError, UsageError
from streamconv.formats.registry import DEFAULT, by_suffix, find_format
from streamconv.running.bucket import Bucket
from streamconv.running.directory import Directory
from streamconv.running.output import check_free
from streamconv.storage import is_url
from streamconv.storage.addresses import public
from streamconv.storage.local import walk
from streamconv.storage.places import Identity, identify, identify_with_parents
from streamconv.storage.sinks import open_sink
from streamconv.text import did_you_mean

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
        if container := _read_format(path, format, is_one=is_one):
            return cls(path.parent, path.name, container)
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
    identities = {identify(folder)}
    for here, folders, _ in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = [Path(str(here), name) for name in folders]
        identities |= {identify(inner) for inner in inside if not inner.is_symlink()}
    return {known for known in identities if known is not None}


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
    if format is None:
        find_format("the recipe's format", default)
    else:
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
    container = by_suffix().get(Path(path).suffix)
    if container is None or container.lay_out is None:
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
