"""Folders whose files are ranks of one model: each holds its part of the same tensors, under the same names.

Which files may be ranks, their names say; that they are, the names of their tensors. They are shown as ``<file>/<name>``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from streamconv.checkpoint.opening import Checkpoint, detect_format, open_checkpoint
from streamconv.diagnose.findings import Finding
from streamconv.errors import StreamconvError
from streamconv.formats.catalog import locate
from streamconv.formats.container import Container
from streamconv.formats.registry import by_suffix, containers
from streamconv.graph.node import AnyNode
from streamconv.notation.names import natural_key
from streamconv.storage.folder import AnyPath, Folder, Location

_LOOSE = r"(?P<set>(?:.*[._-])?)(?:rank|tp)[._-]?(?P<rank>\d{1,5})(?:[._-]of[._-](?P<size>\d{1,5}))?"  # as anybody's file may be called
_FEW = 3  # names in a message


@dataclass(frozen=True)
class RankSet:
    """Files of one model, in the order of their ranks. ``missing``: the numbers that are not there; ``size``: how many there should be."""

    files: tuple[str, ...]
    missing: tuple[int, ...]
    size: int

    def holds(self, tables: Mapping[str, Mapping[str, AnyNode]]) -> bool:
        """Whether these are ranks, by the tensors of those files that can be read: they repeat names, or there is none to compare with."""
        readable = {file: tables[file] for file in self.files if file in tables}
        return are_ranks(readable) or bool(self.missing) or len(readable) < min(2, len(self.files))

    @property
    def label(self) -> str:
        first, last = self.files[0], self.files[-1]
        return first if first == last else f"{first} to {last}"


def find_ranks(path: Location) -> list[RankSet]:
    """The sets of files of a folder, or of files in its folders, that are called as ranks are. Nothing where there is no such folder."""
    try:
        return read_names(_list_files(path.folder)) if path.is_folder else []
    except OSError:
        return []


def read_names(names: Iterable[str]) -> list[RankSet]:
    """The sets of ranks among files of these names."""
    loose = rf"{_LOOSE}(?:{'|'.join(map(re.escape, by_suffix()))})"
    kinds = [container.names for container in containers().values()]
    of_files = [*chain.from_iterable(kind.ranks for kind in kinds), loose]
    of_folders = [kind.rank_folder for kind in kinds]
    sets: dict[tuple[int, str, int], list[tuple[int, str]]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        patterns = enumerate(of_folders, len(of_files)) if folder else enumerate(of_files)
        for number, pattern in patterns:
            match = re.fullmatch(pattern, folder or file, re.DOTALL)
            if match:
                groups = match.groupdict()
                kind = "" if folder else groups.get("set") or ""
                sets.setdefault((number, kind, int(groups.get("size") or 0)), []).append((int(match["rank"]), name))
                break
    rank_sets = []
    for (number, _, size), members in sorted(sets.items()):
        numbers = {rank for rank, _ in members}
        count = max(size, max(numbers) + 1)
        if number == len(of_files) - 1 and ((not size and min(numbers) > 0) or len(numbers) < 2):
            continue  # rank16 may be that of an adapter
        files = tuple(name for _, name in sorted(members, key=lambda row: (row[0], natural_key(row[1]))))
        rank_sets.append(RankSet(files, tuple(sorted(set(range(count)) - numbers)), max(count, len(files))))
    return rank_sets


def _stage(file: str) -> str:
    """What tells ranks apart that hold parts of other tensors: the stage of a pipeline."""
    folder = file.rpartition("/")[0]
    container = _container_of(folder)
    match = re.fullmatch(container.names.rank_folder, folder) if container else None
    return match["set"] if match else ""


def _container_of(folder: str) -> Container | None:
    """The container of which ranks lie in a folder of that name."""
    return next((one for one in containers().values() if re.fullmatch(one.names.rank_folder, folder)), None)


def open_with_ranks(
    path: AnyPath, root: str | None = None, *, components: bool = True, variant: str | None = None
) -> tuple[Checkpoint, RankSet | None]:
    """A checkpoint as it lies: where its files are ranks, by rank; and which those are.

    Args:
        path: where it is.
        root: the key of the dict of tensors in a file that nests them.
        components: see `open_checkpoint`.
        variant: the same.

    Raises:
        FormatError: damaged or not a checkpoint.
        UsageError: not there, or not readable.
    """
    where = locate(path)
    try:
        checkpoint = open_checkpoint(where, root=root, components=components, variant=variant)
    except StreamconvError:
        for ranks in find_ranks(where):
            by_rank = _open_ranks(where, ranks, root)
            if by_rank is not None:
                return by_rank, ranks
        raise
    if not containers()[checkpoint.format].by_rank:
        return checkpoint, None
    files = dict.fromkeys(name.partition("/")[0] for name in checkpoint)
    return checkpoint, RankSet(tuple(files), (), len(files)) if len(files) > 1 else None


def _list_files(folder: Folder) -> list[str]:
    """Files of a folder, and those that trainers leave in folders of ranks, by their names."""
    files = []
    for name in sorted(folder.list(), key=natural_key):
        container = _container_of(name)
        if container is None:
            files.append(name)
        elif folder.has_folder(name):
            inside = set(folder.folder(name).list())
            files += [f"{name}/{file}" for file in container.names.rank_files if file in inside][:1]
    return files


def _open_ranks(path: Location, ranks: RankSet, root: str | None) -> Checkpoint | None:
    """A checkpoint by rank, None where these are no ranks: each has names of its own."""
    try:
        container = containers()[detect_format(path.folder.file(ranks.files[0]))]
        settings = {} if root is None else {"root": root}
        contents = container.read(path, by_rank=True, files=list(ranks.files), **settings)
    except StreamconvError:
        return None
    tables = by_file(contents.entries, ranks)
    return Checkpoint(path, contents) if ranks.holds(tables) else None


def by_file(entries: Mapping[str, AnyNode], ranks: RankSet) -> dict[str, dict[str, AnyNode]]:
    """Tensors called ``<file>/<name>``, by file."""
    tables: dict[str, dict[str, AnyNode]] = {file: {} for file in ranks.files}
    for name, entry in entries.items():
        depth = ranks.files[0].count("/") + 1
        *folders, rest = name.split("/", depth)
        tables.setdefault("/".join(folders), {})[rest] = entry
    return tables


def are_ranks(tables: Mapping[str, Mapping[str, AnyNode]]) -> bool:
    """Whether files repeat names, as ranks do; shards of one checkpoint never do."""
    counts = Counter(chain.from_iterable(tables.values()))
    return any(count > 1 for count in counts.values())


def check_ranks(tables: Mapping[str, Mapping[str, AnyNode]], ranks: RankSet, recipes: Callable[[], list[str]]) -> Iterator[Finding]:
    """What is wrong with a set of ranks, and what it is.

    Args:
        tables: the tensors of each file that can be read.
        ranks: which files those are.
        recipes: the names of those that make one model of it.
    """
    if ranks.missing:
        what = f"{len(ranks.files)} of {ranks.size} ranks are there, number {ranks.missing[0]} is not"
        yield Finding(what, ranks.label, "its part of every tensor is missing", "download it")
    differences = _compare_ranks(tables) if tables else []
    yield from differences
    if ranks.missing or differences or any(file not in tables for file in ranks.files):
        return
    merging = recipes()
    do = f"--recipe {merging[0]} merges them" if merging else "no recipe merges them; what wrote them may"
    yield Finding(f"{len(ranks.files)} ranks of one model", ranks.label, "each has its part of the tensors", do, problem=False)


def _compare_ranks(tables: Mapping[str, Mapping[str, AnyNode]]) -> list[Finding]:
    """Where ranks do not hold the same names, experts' numbers left aside, in the same dtypes."""
    stages: dict[str, list[str]] = {}
    for file in tables:
        stages.setdefault(_stage(file), []).append(file)
    findings: list[Finding] = []
    for files in stages.values():
        findings += _compare_files({file: tables[file] for file in files})
    return findings


def _compare_files(tables: Mapping[str, Mapping[str, AnyNode]]) -> Iterator[Finding]:
    """What files of ranks lack, or have more than most of them, and tensors whose dtypes differ."""
    kinds: dict[str, frozenset[tuple[str, int]]] = {}
    for file, table in tables.items():
        counts = Counter(re.sub(r"\d+", "0", name) for name in table)
        kinds[file] = frozenset(counts.items())
    usual = Counter(kinds.values()).most_common(1)[0][0]
    first = next(file for file, kind in kinds.items() if kind == usual)
    do = "get the files of all ranks from one place"
    for file, table in tables.items():
        absent = [name for name in tables[first] if name not in table] if kinds[file] != usual else []
        extra = [name for name in table if name not in tables[first]] if kinds[file] != usual else []
        if absent or extra:
            what = f"it lacks {_list(absent)}, which {first} has" if absent else f"it has {_list(extra)}, which {first} has not"
            yield Finding(what, file, "ranks of one model hold parts of the same tensors", do)
        for name, entry in table.items():
            if name in tables[first] and entry.spec.dtype != tables[first][name].spec.dtype:
                what = f"{name} is {entry.spec.dtype}, in {first} {tables[first][name].spec.dtype}"
                yield Finding(what, file, "parts of a tensor have one dtype", do)
                break


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
