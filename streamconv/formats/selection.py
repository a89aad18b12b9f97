"""Which files of a directory are the checkpoint: as the library that loads it would have it, and refused where none has a rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from streamconv.errors import FormatError
from streamconv.formats import AnyNode, Contents
from streamconv.formats.container import Names
from streamconv.formats.files import merge, short, show, unreadable
from streamconv.formats.indexes import Explain, check_index, read_index
from streamconv.formats.signatures import holds_checkpoint, recognize
from streamconv.formats.unrelated import is_weights, kind_of
from streamconv.formats.variants import of_variant, variant_of
from streamconv.storage.folder import Location
from streamconv.text import one_line

_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json", re.DOTALL)
_TEXTS = re.compile(
    r".*\.(c|cfg|cpp|css|csv|git\w+|h|html|ini|ipynb|jinja|jpe?g|js|jsonl?|lock|log|md|mp4|pdf|png|pyc?|rst|sh|svg|toml|tsv|txt|wav|xml|ya?ml)",
    re.DOTALL | re.IGNORECASE,
)  # what is called so is not looked into
_UNNAMED = 64  # files that are looked into where none is called as weights are


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to read, by name; the index that names them and what it says; and what a user should know of the choice."""

    files: Mapping[str, Location]
    index: Location | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    variant: str | None = None


def gather(
    format: str,  # noqa: A002 - as Contents has it
    path: Location,
    selection: Selection,
    tables: Mapping[str, Mapping[str, AnyNode]],
    *,
    by_rank: bool,
    explain: Explain,
    metadata: Mapping[str, str] | None = None,
) -> Contents:
    """The contents of a checkpoint from the tensors of each of its files, which its index must name.

    Args:
        format: the container's name.
        path: what was opened, for messages.
        selection: the files.
        tables: their tensors, in order, by the file's name.
        by_rank: tensors are ``<file>/<name>``.
        explain: see `check_index`.
        metadata: of the files.

    Raises:
        FormatError: a tensor is in two files without ``by_rank``, or in none of those that an index names.
    """
    notes, index = list(selection.notes), selection.index
    if index:
        notes += check_index(index, selection.weight_map, tables, explain)
    entries = merge(path, tables, by_rank=by_rank)
    return Contents(format, entries, list(selection.files.values()), [index] if index else [], dict(metadata or {}), notes)


def is_index(name: str) -> bool:
    """Whether a file of this name says in which files tensors are: ``model.safetensors.index.json``, ``....index.fp16.json``."""
    return _INDEX.fullmatch(name) is not None


def find_files(
    path: Location,
    kind: Names,
    files: Sequence[str] | Selection | None = None,
    *,
    by_rank: bool = False,
    variant: str | None = None,
) -> Selection:
    """The files of a checkpoint.

    Args:
        path: a file, an index, or a directory with what libraries load, or with files that are clearly one checkpoint.
        kind: how they are called.
        files: names of the files of the directory to take instead, or a selection, which is returned as it is.
        by_rank: files repeat names, so that several belong together whatever they are called.
        variant: which variant of the weights to take, where it is there; without one, those that are of none come first.

    Raises:
        FormatError: nothing there, files that are missing, or several checkpoints of which no library's rule chooses one.
    """
    if isinstance(files, Selection):
        return files
    folder = path.folder
    if not path.is_folder:  # reading the file says what is wrong
        return _by_index(path, kind, ()) if is_index(path.name) else Selection({path.name: path})
    if files is not None:
        return _present(path, Selection({name: folder.file(name) for name in files}))
    everything = _names(path, kind)
    only_variant, names = choose_variant(path, everything, kind, variant)
    if only_variant:
        selection = _find_variant(path, names, kind, only_variant)
        if not variant:
            return replace(selection, notes=(f"only the variant {only_variant} of the weights is there: it is read",))
        return _with_note(selection, f"the variant {only_variant} is", everything)
    choice = next((name for name in kind.entrances if name in names), None) or _other_index(path, names, kind)
    if choice is None:
        weights = _choose(path, names, kind, by_rank=by_rank)
        selection = _present(path, Selection({name: folder.file(name) for name in weights}))
        subject = f"{listing(weights)} {'are' if len(weights) > 1 else 'is'}"
    elif kind.is_index(choice):
        selection, subject = _by_index(folder.file(choice), kind, names), f"{one_line(choice)} is"
    else:
        selection, subject = Selection({choice: folder.file(choice)}), f"{one_line(choice)} is"
    return _with_note(selection, subject, everything)


def choose_variant(path: Location, names: Sequence[str], kind: Names, request: str | None) -> tuple[str | None, list[str]]:
    """The variant to read, None for none, and the names among which its files are; ``request`` is the one that a user names, if any.

    Raises:
        FormatError: only variants are there, several of them, and no request chooses one.
    """
    files = of_variant(names, kind, request) if request else []
    if files:
        return request, files
    others = of_variant(names, kind, None)
    there = sorted({variant for name in names if (variant := variant_of(name, kind))})
    if not there or any(map(kind.is_part, others)):
        return None, others
    if len(there) > 1:
        raise FormatError(f"{show(path)}: only variants of the weights are there, {', '.join(there)}: choose one with --variant")
    return there[0], of_variant(names, kind, there[0])


def _find_variant(path: Location, names: Sequence[str], kind: Names, variant: str) -> Selection:
    """The files of a variant, which ``names`` are, by its index or by their numbers."""
    single = next((name for name in names if name.endswith(kind.suffixes) and "-of-" not in name), None)
    index = next((name for name in names if is_index(name)), None)
    if single or not index:
        files = [single] if single else one_checkpoint(path, names, kind)
        return Selection({name: path.folder.file(name) for name in files}, variant=variant)
    return replace(_by_index(path.folder.file(index), kind, names), variant=variant)


def _names(path: Location, kind: Names) -> list[str]:
    """The names in a directory, and those in the folders in which such files may lie."""
    folder = path.folder
    try:
        names = sorted(name for name in folder.list() if not name.startswith("."))
        folders = [name for name in names if re.fullmatch(kind.folders, name) and folder.has_folder(name)]
        nested = []
        for inner in sorted(folders, key=len):
            nested += [f"{inner}/{name}" for name in sorted(folder.folder(inner).list())]
        return names + nested
    except OSError as error:
        raise unreadable(path, error, kind.noun) from error


def _other_index(directory: Location, names: Iterable[str], kind: Names) -> str | None:
    """The one index that is called as none that libraries know."""
    indexes = list(filter(kind.is_index, names))
    if len(indexes) > 1:
        raise FormatError(f"{show(directory)}: several indexes, {short.repr(indexes)}, none of them {kind.index}: give the path of one")
    return indexes[0] if indexes else None


def _by_index(index: Location, kind: Names, names: Collection[str]) -> Selection:
    """The files that an index names."""
    weight_map = read_index(index, kind)
    files = _in_order(weight_map.values(), kind)
    if index.name == kind.other_index and kind.unlisted in names:
        files.append(kind.unlisted)
    return _present(index, Selection({name: index.folder.file(name) for name in files}, index, weight_map))


def _in_order(shards: Iterable[str], kind: Names) -> list[str]:
    """File names in the order of their numbers if all have one, else of their first appearance.

    A weight_map is usually sorted by tensor name, which would let ``model-00007-of-00009`` appear first.
    """
    names = list(dict.fromkeys(shards))
    return sorted(names) if all(map(kind.shard, names)) else names


def _present(where: Location, selection: Selection) -> Selection:
    absent = [name for name, file in selection.files.items() if not file.folder.has(file.relative)]
    if absent:
        count = f"{len(absent)} of {len(selection.files)} files are not there"
        raise FormatError(f"{show(where)}: {count}, such as {short.repr(absent[0])}: download them")
    return selection


def _choose(directory: Location, names: Sequence[str], kind: Names, *, by_rank: bool) -> list[str]:
    """The weight files of a directory in which nothing is called as libraries have it."""
    names = [name for name in names if not re.fullmatch(kind.others, name)]
    for pattern in kind.choices:
        files = [name for name in names if re.fullmatch(pattern, name, re.DOTALL)]
        if files:
            return files if by_rank else one_checkpoint(directory, files, kind)
    raise FormatError(f"{show(directory)}: no *{', *'.join(kind.suffixes)} file in it: give the path of a checkpoint")


def one_checkpoint(directory: Location, names: Sequence[str], kind: Names) -> list[str]:
    """Those of some files that are one checkpoint: a single one, numbered shards, or what lies in folders of ranks.

    Raises:
        FormatError: shards are missing, or there are several checkpoints.
    """
    _check_counts(directory, names, kind)
    groups = group_files(names, kind)
    if len(groups) > 1 and kind.originals:  # as transformers passes over those of Meta and Mistral
        others = {key: group for key, group in groups.items() if not key.startswith(kind.originals)}
        groups = others or groups
    if len(groups) > 1:
        checkpoints = {key: group for key, group in groups.items() if holds_checkpoint(directory.folder.file(group[0]))}
        groups = checkpoints or groups
    own = [key for key in groups if key.startswith(f"{kind.stem}-#-of-")]
    if len(own) == 1:
        groups = {own[0]: groups[own[0]]}
    if len(groups) > 1:
        choices = listing([group[0] if len(group) == 1 else f"{group[0]} (of {len(group)})" for group in groups.values()])
        raise FormatError(
            f"{show(directory)}: {len(groups)} checkpoints in one folder, and no index or name says which one counts: {choices}: "
            "give the path of one"
        )
    (checkpoint,) = groups.values()
    return checkpoint


def group_files(names: Sequence[str], kind: Names) -> dict[str, list[str]]:
    """Files that belong together by their names: shards of as many, or with numbers that follow each other from 0 or 1."""
    shards: dict[str, list[str]] = {}
    numbered: dict[str, dict[int, str]] = {}
    for name in names:
        if "/" in name:
            shards.setdefault("folders", []).append(name)
        elif match := kind.shard(name):
            shards.setdefault(f"{match['stem']}-#-of-{match['total']}", []).append(name)
        elif number := re.fullmatch(r"(.*?)(\d+)(\D*)", name, re.DOTALL):
            numbered.setdefault(f"{number[1]}#{number[3]}", {})[int(number[2])] = name
        else:
            shards[name] = [name]
    for key, files in numbered.items():
        first = min(files)
        if first < 2 and len(files) == max(files) - first + 1:
            shards[key] = [files[number] for number in sorted(files)]
        else:
            shards |= {name: [name] for name in files.values()}
    order = {name: position for position, name in enumerate(names)}
    return dict(sorted(shards.items(), key=lambda item: order[item[1][0]]))


def _check_counts(directory: Location, names: Iterable[str], kind: Names) -> None:
    counts = Counter((match["stem"], int(match["total"])) for match in map(kind.shard, names) if match)
    for (stem, total), count in counts.items():
        if count < total:
            raise FormatError(f"{show(directory)}: {count} of the {total} files {short.repr(stem)}-* are there: download the others")


def _with_note(selection: Selection, subject: str, names: Iterable[str]) -> Selection:
    """The same, with a word on the weights that are there and not read; what is no part of a model is told with what goes along."""
    own = {*selection.files, selection.index.name if selection.index else ""}
    rest = [name for name in names if name not in own and "/" not in name and is_weights(name) and not kind_of(name)]
    return replace(selection, notes=(*selection.notes, f"{subject} read; not read: {listing(rest)}")) if rest else selection


# Files that nothing is known of but their bytes ------------------------------------------------------------------------


def find_unnamed(directory: Location, names: Iterable[str]) -> list[str]:
    """Files that are weights by their first bytes, of a directory where none is called so.

    Raises:
        FormatError: there are none, and the first file of another format is named for what it is.
    """
    candidates = [name for name in sorted(names) if not name.startswith(".") and not _TEXTS.fullmatch(name)]
    foreign: FormatError | None = None
    weights = []
    for name in candidates[:_UNNAMED]:
        if directory.folder.has_folder(name):
            continue
        try:
            if recognize(directory.folder.file(name), texts=False):
                weights.append(name)
        except FormatError as error:
            foreign = foreign or error
    if not weights and foreign:
        raise foreign
    return weights


# Messages --------------------------------------------------------------------------------------------------------------


def listing(names: Sequence[str], most: int = 6) -> str:
    """Names of files in a line."""
    line = ", ".join(map(one_line, names[:most]))
    return line if len(names) <= most else f"{line} and {len(names) - most} more"
