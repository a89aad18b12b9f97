"""A path to a mapping of names to stored tensors, whatever the container, plus its sidecar files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import PurePath
from typing import Any

from streamconv.checkpoint.components import Beside, find_components, find_weighted, look_beside
from streamconv.checkpoint.entries import TensorEntry
from streamconv.checkpoint.ties import Choice, explain_absent, find_ties, says_tie
from streamconv.errors import FormatError, UsageError
from streamconv.formats import Contents
from streamconv.formats.catalog import locate
from streamconv.formats.container import Names
from streamconv.formats.files import show, unreadable
from streamconv.formats.foreign import reads
from streamconv.formats.indexes import read_index
from streamconv.formats.json_text import MAX_CONFIG, read_json
from streamconv.formats.registry import DEFAULT, by_suffix, containers
from streamconv.formats.selection import Selection, find_files, find_unnamed, is_index, one_checkpoint
from streamconv.formats.signatures import holds_checkpoint, recognize
from streamconv.formats.variants import check_variant, of_variant, variant_of
from streamconv.notation.names import natural_key, nearest, select
from streamconv.notation.names import parse as parse_names
from streamconv.notebook import SHOWN, table
from streamconv.stage import begin
from streamconv.storage import hub_cache
from streamconv.storage.folder import AnyPath, Folder, Location
from streamconv.storage.locations import as_given
from streamconv.text import one_line
from streamconv.units import format_size

CONFIG = "config.json"


class MissingTensor(KeyError):
    """The error for a name that a checkpoint has no tensor of: the nearest ones are looked for when somebody reads it."""

    def __init__(self, name: object, checkpoint: Checkpoint) -> None:
        super().__init__(name)
        self._name, self._checkpoint = name, checkpoint

    def __str__(self) -> str:
        near = nearest(self._name, self._checkpoint, 2) if isinstance(self._name, str) else []
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"{one_line(self._checkpoint.path)}: no tensor {self._name!r} among {len(self._checkpoint)}{hint}"


class Checkpoint(Mapping[str, TensorEntry]):
    """An open checkpoint. Only headers have been read; iteration is in tensor order.

    >>> checkpoint = streamconv.open("model")
    >>> list(checkpoint)
    ['layers.0.b', 'layers.1.b', 'w']
    >>> list(checkpoint.keys("layers.{i}.b"))
    ['layers.0.b', 'layers.1.b']
    >>> checkpoint["layers.1.b"].shape
    (2,)
    """

    def __init__(
        self,
        location: Location,
        contents: Contents,
        config: str = CONFIG,
        components: Mapping[str, Contents] | None = None,
        variant: str | None = None,
        configs: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """``contents``: of all components; these by folder, where there are others than the checkpoint's own, "".

        ``configs``: of components whose tensors are not as their files say any more, by folder.
        """
        self.location = location
        self.contents = contents
        self.components = {"": contents} if components is None else components
        self.variant = variant
        self._config = config
        self._configs = configs or {}

    def __getitem__(self, name: str) -> TensorEntry:
        if name not in self.contents.entries:
            raise MissingTensor(name, self)
        return TensorEntry(name, self.contents.entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self.contents.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents.entries)

    def __len__(self) -> int:
        return len(self.contents.entries)

    def keys(self, pattern: str | None = None) -> KeysView[str]:
        """The tensors' names: all, or those that a pattern or glob matches, or have ``pattern`` in them if it is neither."""
        return super().keys() if pattern is None else dict.fromkeys(select(pattern, self)).keys()

    def __repr__(self) -> str:
        return f"<Checkpoint {one_line(self.path)}: {self.format}, {len(self)} tensors>"

    def _repr_html_(self) -> str:
        rows = ((name, entry.dtype, list(entry.shape), format_size(entry.nbytes)) for name, entry in islice(self.items(), SHOWN))
        size = format_size(sum(node.spec.nbytes for node in self.contents.entries.values()))
        title = f"{self.path}: {self.format}, {len(self)} tensors, {size}"
        return table(title, ["name", "dtype", "shape", "size"], rows, more=max(0, len(self) - SHOWN))

    @property
    def path(self) -> str:
        """Where it is: a path of this machine, or a URL without secrets."""
        return str(self.location)

    @property
    def folder(self) -> Folder:
        """The folder that it is, or that its one file lies in."""
        return self.location.folder

    @property
    def format(self) -> str:
        """The name of the container that its files are of, such as ``safetensors``; of components that of the first."""
        return self.contents.format

    @property
    def metadata(self) -> dict[str, str]:
        """The texts by key that its files' headers hold beside the tensors; empty where there are none."""
        return self.contents.metadata

    @cached_property
    def ties(self) -> dict[str, str]:
        """Names that stand for the data of another tensor, and the name of that.

        Where files can hold a tensor under two names both are entries, and which is the other's their names tell (see `ties.find_ties`);
        where they cannot, one is left out and their metadata says so.
        """
        return self.find_ties(lambda _: lambda _: None)

    def find_ties(self, choice: Callable[[Mapping[str, Any]], Choice]) -> dict[str, str]:
        """The same, where ``choice`` of a model's config chooses what names do not tell."""
        tied: dict[str, str] = {}
        for folder, contents in self.components.items():
            try:
                config = self.config_of(folder)
            except FormatError:
                config = {}
            own = ties(contents, config, choice(config))
            tied |= {prefixed(folder, name): prefixed(folder, stored) for name, stored in own.items()}
        return tied

    def config_of(self, folder: str) -> dict[str, Any]:
        """The config of a component. Raises as `config` does."""
        if not folder:
            return self.config
        return self._configs[folder] if folder in self._configs else read_config(self.folder.folder(folder))

    @property
    def others(self) -> Checkpoint:
        """Its components without its own."""
        return self.select([folder for folder in self.components if folder])

    def component_of(self, name: str) -> tuple[str, str]:
        """The component that a tensor is of, and what it is called there."""
        if self._folders == [""]:
            return "", name
        folder = next((folder for folder in self._folders if not folder or name.startswith(f"{folder}/")), "")
        return folder, name.removeprefix(f"{folder}/") if folder else name

    @cached_property
    def _folders(self) -> list[str]:
        """Those that lie in others first."""
        return sorted(self.components, reverse=True)

    def select(self, folders: Collection[str]) -> Checkpoint:
        """The checkpoint with some of its components only."""
        components = {folder: contents for folder, contents in self.components.items() if folder in folders}
        return self.replace(components, self._configs)

    def replace(self, components: Mapping[str, Contents], configs: Mapping[str, dict[str, Any]]) -> Checkpoint:
        """A checkpoint of these components in its place, with these configs where not those of its files."""
        return Checkpoint(self.location, join_components(components), self._config, components, self.variant, configs)

    def with_contents(self, contents: Contents) -> Checkpoint:
        """The same checkpoint with these contents of its own; other components stay."""
        return self.replace({**self.components, "": contents}, self._configs)

    @cached_property
    def sidecars(self) -> list[str]:
        """Paths, relative to the checkpoint, of the files beside the weights; none for a single file."""
        return self.beside.files

    @cached_property
    def beside(self) -> Beside:
        """What lies in the checkpoint's folder beside what is read; nothing for a single file."""
        if not self.location.is_folder:
            return Beside([], {})
        return look_beside(self.folder, (*self.contents.files, *self.contents.others), find_components(self.folder))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json, or what it has instead (beside it, for a single file; or in its files), or an empty dict.

        Raises:
            FormatError: it is not a JSON object.
        """
        if "" in self._configs:
            return self._configs[""]
        own = self.components.get("")
        return read_config(self.folder, self._config) or (own.config if own else {})


def read_config(folder: Folder, name: str = CONFIG) -> dict[str, Any]:
    """``config.json`` of a folder, or what is called ``name``, or an empty dict.

    Raises:
        FormatError: it is not a JSON object.
    """
    if not folder.has(name):
        return {}
    path = folder.file(name)
    config = read_json(path, MAX_CONFIG, "a config")
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected a JSON object, found a {type(config).__name__}; mend it")
    return config


def open_checkpoint(
    path: AnyPath,
    *,
    by_rank: bool = False,
    root: str | None = None,
    ranks: Sequence[str] = (),
    files: Sequence[str] = (),
    config: str = CONFIG,
    components: bool = True,
    variant: str | None = None,
    settings: Mapping[str, bool | int] | None = None,
) -> Checkpoint:
    """Opens a checkpoint: one file, or a directory with or without index, with its components in folders. No tensor data is read.

    Args:
        path: where it is, on this machine or behind a URL.
        by_rank: the files repeat names, as ranks do; tensors are presented as ``<file>/<name>``.
        root: the key of the dict of tensors in a file that nests them.
        ranks: patterns of file names; those that the first one with any matches are read instead, by rank.
        files: the same for files that do not repeat names, where there are none by rank.
        config: the name of the file with the model's config.
        components: whether folders that a list names as such are read, too; their tensors are ``<folder>/<name>``.
        variant: which variant of the weights is read (``model.VARIANT.safetensors``); of components without it, those of none.
        settings: what a container can be told beside, by name (see `Container.settings`).

    Raises:
        FormatError: damaged or not a checkpoint.
        UsageError: not there, or not readable.

    >>> checkpoint = streamconv.open("model")
    >>> checkpoint.format, len(checkpoint), checkpoint["w"].shape
    ('safetensors', 3, (2, 3))
    >>> checkpoint["w"][1].tolist()
    [3.0, 4.0, 5.0]
    """
    if variant is not None:
        check_variant(variant)
    where, notes = find_checkpoint(path)
    begin("reading headers")
    folders = find_weighted(where) if components else []
    if folders:

        def open_component(folder: str) -> Contents:
            own: dict[str, Any] = {} if folder else {"by_rank": by_rank, "root": root, "ranks": ranks, "files": files}
            return open_checkpoint(where.folder.folder(folder).file(""), components=False, variant=variant, **own).contents

        opened = {folder: open_component(folder) for folder in folders}
        joined = join_components(opened)
        joined.notes[:0] = notes
        _check_has(where, opened, variant)
        return Checkpoint(where, joined, config, opened, variant)
    names, ranked = choose_files(where, ranks, files)
    by_rank = by_rank or ranked
    name, selection = _choose(where, names, by_rank=by_rank, variant=variant)
    container = containers()[name]
    if root is not None and not container.nests:
        raise UsageError(f"--set root={root}: {path} is a {name} checkpoint, whose tensors are not nested: leave it out")
    options: dict[str, Any] = dict(settings or {})
    if unknown := next((key for key in options if key not in container.settings and key not in container.counts), None):
        raise UsageError(f"--set {unknown}: {path} is a {name} checkpoint, of which that cannot be chosen: leave it out")
    if root is not None:
        options["root"] = root
    if selection is not None:
        options["files"] = selection
    location = where.folder.file("") if is_index(where.name) else where

    def explain(tensor: str, present: Collection[str]) -> str | None:
        return explain_absent(tensor, present, untied=_is_untied(location))

    contents = container.read(where, by_rank=by_rank, explain=explain, **options)
    contents.notes[:0] = notes
    if components:
        _check_has(where, {"": contents}, variant)
    return Checkpoint(location, contents, config, variant=variant)


def _check_has(path: Location, components: Mapping[str, Contents], variant: str | None) -> None:
    """Raises UsageError where a variant is asked for, and no component has it."""
    if not variant:
        return
    variants: set[str | None] = set()
    for contents in components.values():
        kind = containers()[contents.format].names
        variants.update(variant_of(file.name, kind) for file in contents.files)
    if variant not in variants:
        raise UsageError(f"--variant {variant}: {show(path)} has no weights called so, as in model.{variant}.safetensors: leave it out")


def find_checkpoint(source_path: AnyPath) -> tuple[Location, list[str]]:
    """Where a checkpoint is: the path, or the snapshot that a folder of the Hub's cache stands for, with a note that says so.

    Raises:
        UsageError: it is not there, or not readable.
    """
    location = locate(source_path)
    path = location.local
    if path is None:
        return location, []
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        remedy = f"give the path of a checkpoint's file or its directory{hub_cache.hint(str(source_path))}"
        raise UsageError(f"{one_line(as_given(source_path, location))}: no such file or directory: {remedy}") from None
    except (OSError, ValueError) as error:
        raise unreadable(location, error, "a checkpoint") from error
    snapshot = hub_cache.find_snapshot(path) if location.is_folder else None
    if snapshot is None:
        return location, []
    return locate(snapshot), [f"{show(location)} is the Hub's cache: its snapshot {one_line(snapshot.name)} is read"]


def _is_untied(location: Location) -> bool:
    """Whether the config.json of a folder says that the head is not the embedding."""
    try:
        config = read_config(location.folder) if location.is_folder else {}
    except FormatError:
        return False
    text = config.get("text_config")
    return config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None) is False


def _choose(path: Location, chosen: Sequence[str], *, by_rank: bool, variant: str | None) -> tuple[str, Selection | None]:
    """The container of a checkpoint, and its files; None for a container that finds them itself.

    Args:
        path: a file, an index or a directory.
        chosen: names of the directory's files that a recipe asks for.
        by_rank: see `find_files`.
        variant: the same.
    """
    if not path.is_folder and not is_index(path.name):
        return container_of(path), Selection({path.name: path})
    name = detect_format(path, variant)
    if not chosen and path.is_folder and (containers()[name].by_rank or containers()[name].holds):
        return name, None
    kind = containers()[name].names
    if chosen:
        selection = find_files(path, kind, chosen)
    elif path.is_folder and not any(map(kind.is_part, path.folder.list())):
        names = one_checkpoint(path, find_unnamed(path, path.folder.list()), kind)
        selection = find_files(path, kind, names)
    else:
        selection = find_files(path, kind, by_rank=by_rank, variant=variant)
    first = next(iter(selection.files.values()))
    return container_of(first), selection


def choose_files(path: Location, ranks: Sequence[str], files: Sequence[str]) -> tuple[list[str], bool]:
    """The files of a directory that a pattern matches, in the order of their numbers, and whether they are ranks."""
    if not path.is_folder:
        return [], any(parse_names(pattern).match(path.name) is not None for pattern in ranks)
    try:
        names = sorted(path.folder.list(), key=natural_key)
    except OSError as error:
        raise unreadable(path, error, "a checkpoint") from error
    weights = [name for name in names if PurePath(name).suffix in by_suffix()]
    for pattern in (*ranks, *files):
        if pattern in names and pattern.endswith(".index.json"):
            index = path.folder.file(pattern)
            weight_map = read_index(index, containers()[_format_of_index(index)].names)
            return sorted(set(weight_map.values()), key=natural_key), False
        matching = [name for name in weights if parse_names(pattern).match(name) is not None]
        if matching:
            return matching, pattern in ranks
    return [], False


def container_of(path: Location) -> str:
    """The container of a file: by its first bytes, else by its suffix.

    Raises:
        FormatError: it is something else, or nothing says what it is.
        UsageError: it cannot be read.
    """
    by_name = by_suffix().get(path.suffix)
    if by_name and by_name.holds:  # a file of such a folder stands for it
        return by_name.name
    name = recognize(path) or (by_name.name if by_name else None)
    if name is None:
        raise FormatError(f"{show(path)}: neither its first bytes nor its name say what it is; {reads()}: give another file")
    return name


def detect_format(path: Location, variant: str | None = None) -> str:
    """The container that a path holds: by a file's first bytes, or by what is in a directory, of a variant first if one is asked for.

    Raises:
        FormatError: there is none.
        UsageError: it cannot be read.
    """
    if not path.is_folder:
        return _format_of_index(path) if is_index(path.name) else container_of(path)
    try:
        everything = path.folder.list()
    except OSError as error:
        raise unreadable(path, error, "a checkpoint") from error
    for name, container in containers().items():
        if container.holds and container.holds(path.folder, everything):
            return name
    names = [name for name in everything if not name.startswith(".")]
    for wanted in dict.fromkeys((variant, None)):
        parts = {name: _parts(names, container.names, wanted) for name, container in containers().items()}
        if any(parts.values()):
            break
    else:
        parts = {name: list(filter(container.names.is_part, names)) for name, container in containers().items()}
    formats = [name for name in parts if parts[name]]
    if len(formats) > 1:  # a suffix alone says little: .bin is anything
        formats = [name for name in formats if _is_certain(path, containers()[name].names, parts[name])] or formats
    if formats:
        return formats[0]
    unnamed = find_unnamed(path, names)
    if unnamed:
        return container_of(path.folder.file(unnamed[0]))
    raise FormatError(f"{show(path)}: no *{', *'.join(by_suffix())} file in it: give the path of a checkpoint")


def _parts(names: Iterable[str], kind: Names, variant: str | None) -> list[str]:
    """What is called as files of a kind, of that variant or of none."""
    files = of_variant(names, kind, variant)
    return [name for name in files if kind.is_part(name) or (variant and name.endswith(".json"))]


def _is_certain(directory: Location, kind: Names, names: Sequence[str]) -> bool:
    """Whether files of these names are of a kind: by a name that libraries give, or by the first bytes of one."""
    by_name = any(name in kind.entrances or kind.is_index(name) or not name.endswith(kind.suffixes) for name in names)
    return by_name or any(holds_checkpoint(directory.folder.file(name)) for name in names)


def _format_of_index(path: Location) -> str:
    """The container whose files an index names: by its own name, else by theirs."""
    for name, container in containers().items():
        if any(f"{suffix}.index." in path.name for suffix in container.names.suffixes):
            return name
    for name, container in containers().items():
        if container.names.suffixes:
            with suppress(FormatError):
                read_index(path, container.names)
                return name
    read_index(path, containers()[DEFAULT].names)  # which says what is wrong
    return DEFAULT


def prefixed(folder: str, name: str) -> str:
    """What a component's tensor is called in the whole checkpoint."""
    return f"{folder}/{name}" if folder else name


def join_components(components: Mapping[str, Contents]) -> Contents:
    """The contents of components, by folder, as one; the format and the metadata are those of the first."""
    first = next(iter(components.values()), Contents(DEFAULT, {}, []))
    if list(components) == [""]:
        return first
    joined = Contents(first.format, {}, [], metadata=first.metadata)
    for folder, contents in components.items():
        joined.entries.update((prefixed(folder, name), entry) for name, entry in contents.entries.items())
        joined.files.extend(contents.files)
        joined.others.extend(contents.others)
        joined.notes.extend(f"{folder}: {note}" if folder else note for note in contents.notes)
    return joined


def ties(contents: Contents, config: Mapping[str, Any] | None = None, choose: Choice = lambda _: None) -> dict[str, str]:
    """See `Checkpoint.ties`; ``choose`` as `find_ties` takes it."""
    entries = contents.entries
    if containers()[contents.format].ties == "named":
        texts = contents.metadata.items()
        return {name: stored for name, stored in texts if name not in entries and stored in entries and says_tie(name, stored)}
    classes = (config or {}).get("architectures")
    return find_ties(entries, str(classes[0]) if isinstance(classes, list) and classes else "", choose)
