"""DST: what a path means as a destination, whether it may be written, and what has to go first."""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from streamconv.checkpoint.opening import Checkpoint
from streamconv.checkpoint.stems import has_stems
from streamconv.engine.io import check_folder
from streamconv.errors import DestinationError, SpaceError, UsageError
from streamconv.formats.container import Names
from streamconv.formats.registry import DEFAULT, by_suffix, containers, find_format
from streamconv.formats.unrelated import is_weights
from streamconv.planning.plan import Plan
from streamconv.running.journal import DRAFT, IN_PARTS, Journal, journal_path, read_journal
from streamconv.running.journal import NAME as JOURNAL
from streamconv.running.local import PARTIAL, partial
from streamconv.running.parts import UNFINISHED
from streamconv.storage import is_url
from streamconv.storage.addresses import public
from streamconv.storage.filenames import LONGEST
from streamconv.storage.places import Identity, identify, identify_with_parents
from streamconv.storage.remote import walk
from streamconv.storage.sinks import Sink, open_sink
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

    def check_free(self) -> None:
        """Refuses a DST that has something in it."""
        path, journal = self.path, journal_path(self.root, self.file)
        if read_journal(journal)[0].get("parts"):
            raise DestinationError(f"{path}: {IN_PARTS}, or start afresh with --overwrite")
        if journal.exists():
            raise DestinationError(f"{path}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite")
        self.check_empty()

    def check_empty(self) -> None:
        """Refuses a DST that has something in it beside a journal or a claim."""
        path = self.path
        occupied = (
            os.path.lexists(path) if self.file else path.is_dir() and any(not entry.name.startswith(JOURNAL) for entry in path.iterdir())
        )
        if occupied:
            raise DestinationError(f"{path}: already exists and is not empty: give another DST, or --overwrite, or --resume")

    def check(self, checkpoint: Checkpoint, *, overwrite: bool, resume: bool) -> None:
        """Refuses a DST that is, holds or lies in SRC, or that has something in it."""
        path = self.path
        if isinstance(checkpoint.path, Path):
            self._check_source(checkpoint.path, [Path(str(file)) for file in checkpoint.contents.files])
        if path.exists() and not path.is_dir() and not self.file:
            raise DestinationError(f"{path}: exists and is not a directory: give another DST")
        above = next((parent for parent in self.root.parents if parent.exists() or parent.is_symlink()), None)
        if above is not None and not above.is_dir() and not self.root.exists():
            raise DestinationError(f"{path}: {above} is not a directory: give another DST")
        if not overwrite and not resume:
            self.check_free()

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

    def check(self, checkpoint: Checkpoint, *, overwrite: bool, resume: bool) -> None:
        """Refuses a DST that is, holds or lies in SRC, or that has something in it, as far as its store tells."""
        path, src, sink = self.path, str(checkpoint.path), open_sink(self.root, create_pr=self.create_pr)
        if self.create_pr:
            return
        if path == src or sink.holds(src):
            raise DestinationError(f"{path}: DST is SRC: give another DST" + ", or --create-pr" * path.startswith("hf://"))
        if f"{path}/".startswith(f"{src}/"):
            raise DestinationError(f"{path}: DST lies inside SRC {src}: give a DST outside of it")
        if f"{src}/".startswith(f"{path}/"):
            raise DestinationError(f"{path}: SRC {src} lies inside DST: give another DST")
        if not overwrite and not resume:
            if sink.load_state(journal_path(Path(), self.file).name):
                raise DestinationError(f"{path}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite")
            _check_empty(sink, self.file)


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


def _check_empty(sink: Sink, single: str | None) -> None:
    there = [name for name in sink.list() if (name == single if single else not name.startswith(JOURNAL))]
    if there:
        raise DestinationError(f"{sink.url}: holds {there[0]} already: give another DST, or --overwrite, or --resume")


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
    names.append(journal_path(Path(), plan.single).name + (DRAFT if suffix == PARTIAL else suffix))
    for name in names:
        if len(os.fsencode(name)) > longest:
            raise DestinationError(
                f"{root / name}: its name, until it is complete, has {len(os.fsencode(name))} bytes, and {longest} at most are allowed "
                "there: give DST, or the file in SRC, a shorter one"
            )


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
    try:
        found = path.lstat()
    except OSError:
        return 0
    if not stat.S_ISREG(found.st_mode):
        return 0
    return getattr(found, "st_blocks", -(-found.st_size // 512)) * 512


def old_files(plan: Plan, root: Path) -> list[Path]:
    """What ``--overwrite`` removes: DST itself if it is one file, else the weight and index files in it, links to nowhere included.

    Weight files that an interrupted run left unfinished are among them, and those in folders of components that a plan makes.
    """
    if plan.single:
        return [root / plan.single]
    if not root.is_dir():
        return []
    folders = component_folders(plan)
    below = [f"*/{PurePosixPath(names.replaced).name}" for names in _nesting()] + [f"{glob.escape(folder)}/*" for folder in folders]
    inside = (path for pattern in below for path in root.glob(pattern) if not path.parent.is_symlink())
    names = {path.relative_to(root).as_posix(): path for path in (*root.iterdir(), *inside) if not path.is_dir()}
    return [path for name, path in names.items() if is_old(name, names, folders)]


def component_folders(plan: Plan) -> set[str]:
    """Folders below DST that hold a component of the model each, such as a pipeline's ``unet``."""
    if not has_stems(plan.format):
        return set()
    return {PurePosixPath(file.path).parent.as_posix() for file in plan.files if file.tensors} - {"."}


def old_names(plan: Plan, sink: Sink | None) -> list[str]:
    """`old_files` of a plan's DST, which may be a sink, relative to its root."""
    if sink:
        there = sink.list()
        folders = component_folders(plan)
        return [name for name in there if (name == plan.single if plan.single else is_old(name, there, folders))]
    return [path.relative_to(plan.root).as_posix() for path in old_files(plan, Path(plan.root))]


def is_old(name: str, there: Collection[str], folders: Collection[str]) -> bool:
    """Whether a file, by its name relative to DST, is what an output replaces: no weights of other models in folders of their own.

    ``folders`` are those of components.

    A file that says where others are, such as ``latest``, is where such are ``there``: others have files of that name, too.
    """
    whole = UNFINISHED.sub("", name).removesuffix(PARTIAL)
    for names in _nesting():
        if name == names.marker:
            return any(map(names.is_nested, there))
    folder, _, file = whole.rpartition("/")
    ours = UNFINISHED.search(name) or (is_weights(file) and not file.endswith(PARTIAL))
    return (folder in {"", *folders} and bool(ours)) or any(names.replaces(whole) for names in _nesting())


def _nesting() -> list[Names]:
    """The names of containers whose files lie in folders of their own."""
    return [container.names for container in containers().values() if container.names.marker]


def outdated(plan: Plan, put: Collection[str], there: Iterable[str]) -> list[str]:
    """The old weight and index files that a pull request removes, together with the last of a plan's files: those of the plan's container.

    Loaders would take them for parts of the output. Other containers stay.

    Args:
        plan: of the output.
        put: files that are put there; there is nothing to remove yet if the plan's last one is not among them.
        there: files of the repository, or of a folder in it.
    """
    made, kind = {file.path for file in plan.files}, containers()[plan.format].names
    if plan.single or plan.files[-1].path not in put:
        return []
    names = list(there)
    folders = component_folders(plan)
    old = (name for name in names if is_old(name, names, folders) and (kind.is_part(name) or kind.replaces(name)))
    return [name for name in old if name not in made]


def check_empty(plan: Plan, sink: Sink | None) -> None:
    """Refuses a plan's DST, which may be a sink, if it has something in it."""
    if not sink:
        Target(Path(plan.root), plan.single, plan.format).check_empty()
    else:
        _check_empty(sink, plan.single)


def prepare(plan: Plan, root: Path, *, overwrite: bool, resume: bool) -> None:
    """Makes DST a folder that can be written, or says why it cannot be."""
    try:
        check_folders(plan, root)
        check_names(plan, root)
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
    for path in old_files(plan, root):
        if path not in own:
            path.unlink(missing_ok=True)
