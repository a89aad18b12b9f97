"""What a container says of itself: how its files are called and told, how they are read, and how new ones are laid out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Literal

from streamconv.formats import Contents, FileLayout
from streamconv.storage.folder import File, Folder, Location

HEAD = 512  # bytes at the beginning of a file by which it is told


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a file is told by: its path, the open file, its first `HEAD` bytes."""

    path: Location
    file: File
    head: bytes


@dataclass(frozen=True, slots=True)
class Names:
    """How a container's files are called, in directories and in messages.

    Attributes:
        noun: what a file is, with its article.
        suffixes: how its files end; the first is the one to write.
        stem: how names of new files start.
        choices: patterns of weight files where neither an index nor the single file is there; the first that fits any counts.
        others: a pattern of files with such a suffix that are no weights.
        folders: a pattern of folders in which such files may lie, where none lie in the directory itself.
        libraries: what libraries look for in a directory, in their order; by default the single file, then its index.
        other_index: the name of an index that another writer makes.
        unlisted: the name of a file that belongs to that index and is not named in it.
        weights: globs of what holds tensors or says where they are, for all folders; by default all with such a suffix, and their indexes.
        stems: how names of files start that a library looks for, by the library, if that is not any file with such a suffix.
        originals: how names of files start that libraries pass over where there are others.
        marker: the name of a file that says in which folder such files are; others may have a file of that name, too.
        nested: a pattern of such files' paths, below the folder with the marker.
        nested_series: those that are numbered: what stands before and after a number of two digits or more, from 00.
        replaced: a glob of the paths of those that a new checkpoint replaces.
        ranks: patterns of names of files that are ranks, with the number as ``rank``, how many there are as ``size`` if that is said, and
            what else differs between sets of them as ``set``.
        rank_folder: a pattern of names of folders that hold the file of one rank each, with the same groups as ``ranks``.
        rank_files: how the file in such a folder may be called; the first of these names that is there counts.
        asked_for: names by which a checkpoint is looked for on a server that cannot list; by default the index and the single file.
        series: numbered files that such a server is asked for: what stands before and after the number, as in ``nested_series``.
    """

    noun: str
    suffixes: tuple[str, ...]
    stem: str
    choices: tuple[str, ...]
    others: str = r"(?!)"
    folders: str = r"(?!)"
    libraries: tuple[str, ...] = ()
    other_index: str = ""
    unlisted: str = ""
    weights: tuple[str, ...] = ()
    stems: Mapping[str, str] = field(default_factory=dict)
    originals: str = ""
    marker: str = ""
    nested: str = r"(?!)"
    nested_series: tuple[tuple[str, str], ...] = ()
    replaced: str = ""
    ranks: tuple[str, ...] = ()
    rank_folder: str = r"(?!)"
    rank_files: tuple[str, ...] = ()
    asked_for: tuple[str, ...] = ()
    series: tuple[tuple[str, str], ...] = ()

    @property
    def single(self) -> str:
        return self.stem + self.suffixes[0]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    @property
    def entrances(self) -> tuple[str, ...]:
        """`libraries`, or what they are by default: the files that a library opens first."""
        return self.libraries or (self.single, self.index)

    @property
    def globs(self) -> tuple[str, ...]:
        """`weights`, or what they are by default."""
        if self.weights:
            return self.weights
        ends = ("", ".index.json", ".index.*.json")
        return tuple(f"*{suffix}{end}" for suffix, end in product(self.suffixes, ends))

    @property
    def probes(self) -> tuple[str, ...]:
        """`asked_for`, or what it is by default."""
        return self.asked_for or ((self.index, self.single) if self.suffixes else ())

    def is_index(self, name: str) -> bool:
        return name == self.other_index or name.endswith(tuple(f"{suffix}.index.json" for suffix in self.suffixes))

    def is_part(self, name: str) -> bool:
        """Whether what is called so in a directory says that it is of this kind."""
        if name.endswith(self.suffixes):
            return not re.fullmatch(self.others, name)
        return self.is_index(name) or re.fullmatch(self.folders, name) is not None

    def is_nested(self, path: str) -> bool:
        """Whether a path relative to a folder is that of a file in a folder of its own, which the marker may name."""
        return re.fullmatch(self.nested, path, re.DOTALL) is not None

    def replaces(self, path: str) -> bool:
        """Whether a new checkpoint replaces the file of that path, in a folder of its own."""
        depth = self.replaced.count("/")  # to fnmatch a slash is any character
        return path.count("/") == depth and fnmatchcase(path, self.replaced)

    def shard(self, name: str) -> re.Match[str] | None:
        """The parts of a file name with a number in it."""
        suffix = next((suffix for suffix in self.suffixes if name.endswith(suffix)), "")
        return re.fullmatch(r"(?P<stem>.*)-\d+-of-(?P<total>\d+)", name.removesuffix(suffix), re.DOTALL) if suffix else None


def _no_signature(_: Beginning) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Container:
    """A kind of files that checkpoints consist of.

    Attributes:
        name: the word of ``--format``.
        summary: what messages call its files, after "streamconv reads".
        names: how its files are called.
        read: the contents of a path: a file, an index or a directory. Keywords: ``files`` (a `Selection`, or names of the directory's
            files; None: it looks for them), ``by_rank`` (tensors are ``<file>/<name>``), ``explain`` (see `indexes.check_index`), and
            ``root``, if it ``nests``.
        lay_out: the files of a new checkpoint of some specs; None where they are read only. Keywords: ``max_shard_size`` (bytes of
            tensors in a file, or None), ``file`` (the name of the one file to make, or None), ``tied``, if ties are ``"shared"``, and
            those that it ``takes``.
        recognizes: whether a file's first bytes are those of this container.
        ties: how a file holds a tensor of two names: its data once under both ("shared"), once under one of them, with a word on the
            other in its metadata ("named"), or twice ("copied").
        takes: what else `lay_out` can be told: ``metadata`` (texts by key), ``align`` (bytes that data starts at multiples of), ``stem``
            and ``variant`` (what its files are called), ``index`` (what its index is called).
        has_own_metadata: what files say of themselves is of this container's own kind, and goes into no file of another one.
        nests: a file may hold its tensors below a key, the ``root`` of `read` and `lay_out`.
        holds: whether a folder, with files and folders of such names in it, is a checkpoint, where single names do not tell; `read` then
            finds its files itself.
        is_trained: it is what a trainer leaves, whose names may be those of what was around the model.
        settings: further keywords of `read` that ``--set`` gives, true or false, with what they mean.
        counts: the same, of keywords that are numbers.
        by_rank: a checkpoint is a folder with a file for each rank, which `read` finds, and tensors are always ``<file>/<name>``.
    """

    name: str
    summary: str
    names: Names
    read: Callable[..., Contents]
    lay_out: Callable[..., list[FileLayout]] | None = None
    recognizes: Callable[[Beginning], bool] = _no_signature
    ties: Literal["shared", "named", "copied"] = "copied"
    takes: frozenset[str] = frozenset()
    has_own_metadata: bool = False
    nests: bool = False
    holds: Callable[[Folder, Sequence[str]], bool] | None = None
    is_trained: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    by_rank: bool = False
