"""A checkpoint's folder: which folders in it are components of the model, and which files go along with the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.errors import FormatError
from streamconv.formats.files import short, show, unreadable
from streamconv.formats.json_text import read_json
from streamconv.formats.registry import stems_of
from streamconv.formats.unrelated import UNSAID, is_weights, kind_of
from streamconv.storage.filenames import find_fault
from streamconv.storage.folder import Folder, Location

_MAX_LIST = 8 << 20  # bytes of a file that lists components
_MAX_COMPONENTS = 256
_ADAPTER = "adapter_config.json"  # PEFT's
_MODELS = ("config.json", _ADAPTER)  # a folder with weights and one of these is a model of its own
_POINTER, _POINTER_BEGINS = 1024, b"version https://git-lfs"  # bytes that one has at most, and its first
OTHER_FOLDERS = "models in folders that nothing names as components"


@dataclass(frozen=True)
class Beside:
    """What lies beside weights: ``files`` go along, sorted; what stays is in ``left`` by its kind. All are relative to the folder."""

    files: list[str]
    left: dict[str, list[str]]

    @property
    def note(self) -> str:
        """What a user should know of that which stays; "" for nothing."""
        kinds = [f"{shorten(names)} ({kind})" for kind, names in self.left.items() if kind not in UNSAID]
        return f"not part of the model, and left behind: {'; '.join(kinds)}" if kinds else ""


# Components ---------------------------------------------------------------------------------------------------------------


def _modules(table: Any) -> Iterator[Any]:
    """Folders of sentence-transformers' modules; "" is the folder itself."""
    for module in table:
        yield module["path"].rstrip("/")


def _pipeline(table: Any) -> Iterator[Any]:
    """Folders of diffusers' components, each with the library and class that load it."""
    for name, value in table.items():
        if isinstance(value, list) and len(value) > 1 and isinstance(value[1], str):
            yield name


def _routes(table: Any) -> Iterator[Any]:
    """Folders of the modules among which one of sentence-transformers chooses."""
    yield from table["types"]


LISTS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "modules.json": _modules,
    "router_config.json": _routes,
    "model_index.json": _pipeline,
    "modular_model_index.json": _pipeline,
}
"""Files that name folders as components of the model, and how they do. Components may have some of their own."""


def find_components(root: Folder) -> list[str]:
    """Folders below ``root`` that are components of the model, as a list in it says, "" for ``root`` itself; none without such a list.

    Raises:
        FormatError: a list that cannot be read, or that names what does not lie below the folder.
    """
    components: list[str] = []
    waiting = [""]
    while waiting:
        here = waiting.pop(0)
        folder = root.folder(here)
        there = _names_in(folder)
        for name, read in LISTS.items():
            if name not in there or not folder.has_file(name):
                continue
            for part in _read_list(folder.file(name), read):
                path = "/".join(filter(None, (here, part)))
                if path in components or not (path == here or root.has_folder(path)):
                    continue
                components.append(path)
                if path != here:
                    waiting.append(path)
                if len(components) > _MAX_COMPONENTS:
                    raise FormatError(f"{show(folder.file(name))}: names more than {_MAX_COMPONENTS} folders, which no model has: mend it")
    return components


def _read_list(path: Location, read: Callable[[Any], Iterator[Any]]) -> list[str]:
    table = read_json(path, _MAX_LIST, "a list of a model's components")
    try:
        parts = list(read(table))
    except (TypeError, AttributeError, LookupError) as error:
        what = short.repr(str(error))
        raise FormatError(
            f"{show(path)}: cannot be read as the list of a model's components ({type(error).__name__}: {what}): mend it"
        ) from error
    for part in parts:
        if not isinstance(part, str) or (part and find_fault(part)):
            raise FormatError(f"{show(path)}: names {short.repr(part)}, expected a folder below its own: mend it")
    return parts


def find_weighted(location: Location) -> list[str]:
    """Those of a folder's components that hold weights; none where the folder alone does."""
    if not location.is_folder:
        return []
    weighted = [part for part in find_components(location.folder) if _has_weights(location.folder.folder(part))]
    return weighted if any(weighted) else []


def _names_in(folder: Folder) -> Sequence[str]:
    try:
        return folder.list()
    except OSError as error:
        raise unreadable(folder.file(""), error, "a checkpoint") from error


def _has_weights(folder: Folder) -> bool:
    return any(is_weights(name) and not kind_of(name) for name in _names_in(folder))


# Files ---------------------------------------------------------------------------------------------------------------


def look_beside(root: Folder, own: Iterable[Location] = (), components: Iterable[str] = ()) -> Beside:
    """Every file below ``root`` that is no weights: what goes along, and what stays.

    Args:
        root: the checkpoint's folder.
        own: files that are read.
        components: folders that are such, so that nothing but weights stays behind in them.

    Raises:
        FormatError: a link to a file that is not there.
    """
    read = {file.below(root) for file in own}
    folders_read = set(components)
    inside = set(filter(None, folders_read))
    explained = inside if folders_read and "" not in folders_read else {*inside, ""}  # of these, what reads them says what it does not
    along: list[str] = []
    unclaimed: dict[str, list[str]] = {}

    def leave(kind: str, path: str) -> None:
        unclaimed.setdefault(kind, []).append(path)

    for here, folders, files in root.walk():
        above = f"{here}/" if here else ""
        kinds = {name: kind_of(name, folder=True) for name in folders if above + name not in inside}
        for name in sorted(filter(kinds.get, kinds)):
            if not any(path.startswith(f"{above}{name}/") for path in read):  # of one that is read, its reader says what it leaves
                leave(kinds[name], above + name)
        folders[:] = sorted(name for name in folders if not kinds.get(name))
        if here and here not in inside and _is_model(files):
            leave(OTHER_FOLDERS, here)
            folders[:] = []
            continue
        for name in sorted(files):
            path = above + name
            if path in read:
                continue
            kind = kind_of(name)
            if kind:
                leave(kind, path)
            elif is_weights(name):
                if here not in explained:
                    leave("weights that are not read", path)
            elif name == _ADAPTER and read and _is_unread_adapter(above, files, read):
                leave("an adapter that is not read", path)  # without its weights it would keep libraries from opening the model
            elif not root.has(path):
                what = "a link to a file that is not there: fetch the checkpoint again, or remove the link"
                raise FormatError(f"{show(root.file(path))}: {what}")
            else:
                along.append(path)
    return Beside(sorted(along), unclaimed)


def _is_unread_adapter(above: str, files: Iterable[str], read: Collection[str]) -> bool:
    """Whether a folder holds an adapter's weights, and others are read."""
    stems = stems_of(["peft"])
    own = [name for name in files if name.startswith(stems) and is_weights(name)]
    return bool(own) and not any(above + name in read for name in own)


def _is_model(files: Iterable[str]) -> bool:
    names = set(files)
    return any(config in names for config in _MODELS) and any(map(is_weights, names))


def find_pointers(root: Folder, names: Iterable[str]) -> list[str]:
    """Those of the files below a folder of this machine that are Git LFS pointers."""
    if root.local is None:  # servers give the files themselves
        return []
    pointers = []
    for name in names:
        path = root.local / name
        if path.is_file() and path.stat().st_size <= _POINTER:
            with path.open("rb") as file:
                if file.read(len(_POINTER_BEGINS)) == _POINTER_BEGINS:
                    pointers.append(name)
    return pointers


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Names in a line, and how many more there are."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"
