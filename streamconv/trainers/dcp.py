"""torch's distributed checkpoints (DCP): ``.metadata`` says in which ranges of ``__RANK_N.distcp`` the boxes of each tensor lie.

Each box is a file of its own that torch.save wrote, one behind the other; where their elements lie is read of each, since strides are kept.
torchtitan, Accelerate, Megatron Core and others write such folders, with the state of their optimizers in the same files. Facts:
torch/distributed/checkpoint of torch 2.4 to 2.14. Nothing of a pickle is run (see `unpickling`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from streamconv.dtypes import DTYPES, DType, TensorSpec
from streamconv.errors import FormatError
from streamconv.formats import AnyNode, Contents
from streamconv.formats.container import Container, Names
from streamconv.formats.files import check_unicode, countable, damaged, opened, read_line, short, show
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.pickles import Located, Storage, Tensor, unpickle
from streamconv.formats.roots import find_weights, is_trainers, note_root
from streamconv.formats.selection import Selection
from streamconv.formats.torch import locate_tensor, open_item
from streamconv.formats.unpickling import Budget, Global, Inert, Refused
from streamconv.formats.zips import open_section
from streamconv.graph.moves import packed_strides
from streamconv.storage.filenames import find_fault
from streamconv.storage.folder import Folder, Location
from streamconv.trainers.dcp_files import lay_out
from streamconv.trainers.leftovers import note_left_out
from streamconv.trainers.pieces import Piece, Replica, assemble, read_sizes
from streamconv.trainers.records import TableMachine, find_asked, open_table

METADATA = ".metadata"
_RECORDS = (
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
)
_RANKED = re.compile(r"__(?P<rank>\d+)\.metadata")  # of a save without coordination: each rank's own
_ITERATION = "latest_checkpointed_iteration.txt"  # Megatron's, above the folders of iterations
_ITERATIONS = re.compile(r"iter_\d{7}")
_INNER = "pytorch_model_fsdp_0"  # Accelerate's, in the folder of a checkpoint
_SPLIT = re.compile(r"(optimizer|optim|chained_\d+|rng_state|rerun_state_machine_state)[./](.*)", re.DOTALL)
_EXTRA = re.compile(r"(?:.*\.)?_extra_state(?:/.*)?", re.DOTALL)
KIND = Names(
    "a distributed checkpoint of torch",
    (".distcp",),
    "__0_0",
    (r".*\.distcp",),
    weights=("*.distcp", METADATA, "__*.metadata"),
)


@dataclass(frozen=True, slots=True)
class _Item:
    """Where a box lies: a file of the folder, and a range of it."""

    file: str
    offset: int
    nbytes: int


@dataclass(slots=True)
class _Stored:
    """A tensor by the table of contents: what it is, and where each of its boxes begins and how large it is."""

    spec: TensorSpec
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


# Folders ---------------------------------------------------------------------------------------------------------


def holds(folder: Folder, names: Sequence[str]) -> bool:
    """Whether a folder is such a checkpoint, or names the folder in it that is one."""
    if any(map(_is_own, names)):
        return True
    return find_folder(folder, names) is not None or (_ITERATION in names and any(map(_ITERATIONS.fullmatch, names)))


def find_folder(folder: Folder, names: Sequence[str]) -> Folder | None:
    """The folder with the files of a save: the given one, of such names, or one that it names; None: neither is one."""
    if any(map(_is_own, names)):
        return folder
    for name in (_INNER, *_iteration(folder, names)):
        if name in names and any(map(_is_own, folder.folder(name).list())):
            return folder.folder(name)
    return None


def _is_own(name: str) -> bool:
    return name in (METADATA, f"{METADATA}.tmp") or name.endswith(".distcp")


def _iteration(folder: Folder, names: Sequence[str]) -> Iterator[str]:
    """The folder that Megatron's file names."""
    if _ITERATION not in names:
        return
    text = read_line(folder.file(_ITERATION), KIND.noun)
    yield f"iter_{int(text):07d}" if text.isascii() and text.isdigit() else text


# The table of contents -------------------------------------------------------------------------------------------


_Key = tuple[str, tuple[int, ...]]


@dataclass(slots=True)
class _Table:
    """What ``.metadata`` says.

    Attributes:
        tensors: by name.
        objects: names of what is no tensor.
        paths: the keys of the dicts that a name is made of, where they are known.
        items: where each box lies, by the name and its offsets.
        replicas: further places of boxes that several ranks saved.
    """

    tensors: dict[str, _Stored]
    objects: list[str]
    paths: Mapping[str, Any]
    items: dict[_Key, _Item]
    replicas: dict[_Key, list[_Item]] = field(default_factory=dict)


def _find_tables(folder: Folder, names: Sequence[str]) -> list[Location]:
    """The file with the table of contents, or those with each rank's. Raises FormatError where there is none, or ranks are missing."""
    if METADATA in names:
        return [folder.file(METADATA)]
    ranked = {int(match["rank"]): match.string for match in map(_RANKED.fullmatch, names) if match}
    if not ranked:
        what = f"no {METADATA}, which is written last: the save was not finished, or the file was not fetched"
        raise FormatError(f"{show(folder.file(''))}: {what}: fetch it, or take an earlier checkpoint")
    missing = sorted(set(range(max(ranked) + 1)) - set(ranked))
    if missing or len(ranked) != sum(_RANKED.fullmatch(name) is not None for name in names):
        what = f"no __{missing[0]}.metadata" if missing else "two files of one rank's table"
        raise FormatError(f"{show(folder.file(''))}: {what}, and each rank wrote its own: fetch the files of all ranks")
    return [folder.file(ranked[rank]) for rank in sorted(ranked)]


def _join_tables(paths: Sequence[Location]) -> _Table:
    """The tables of all ranks as one: each says the whole shapes, and its own boxes."""
    whole = _read_table(paths[0])
    for path in paths[1:]:
        own = _read_table(path)
        for name, stored in own.tensors.items():
            there = whole.tensors.setdefault(name, _Stored(stored.spec))
            if there.spec != stored.spec:
                what = f"{short.repr(name)} is {stored.spec}, and {there.spec} by {paths[0].name}"
                raise FormatError(f"{show(path)}: {what}: the files are of several runs")
            there.chunks += [box for box in stored.chunks if (name, box[0]) not in whole.items]
        for key, item in own.items.items():
            if whole.items.setdefault(key, item) is not item:
                whole.replicas.setdefault(key, []).append(item)
        whole.objects = [*dict.fromkeys([*whole.objects, *own.objects])]
        whole.paths = {**own.paths, **whole.paths}
    return whole


def _read_table(path: Location) -> _Table:
    tree = _unpickle(path)
    state, storage = _attribute(path, tree, "state_dict_metadata", dict), _attribute(path, tree, "storage_data", dict)
    tensors: dict[str, _Stored] = {}
    objects: list[str] = []
    for name, entry in state.items():
        if type(entry) is Inert and entry.kind.endswith(".TensorStorageMetadata"):
            tensors[name] = _stored(path, name, entry)
        else:
            objects.append(name)
    items: dict[_Key, _Item] = {}
    while storage:
        _, place = storage.popitem()  # a table has very many
        if type(place) is not Located:
            raise damaged(path, "its table of storage has keys that are no indexes, or values that say nothing of files")
        name = place.name
        if type(name) is str and name in tensors:
            try:
                offsets = read_sizes(place.offsets) if place.offsets is not None else (0,) * len(tensors[name].spec.shape)
            except ValueError as error:
                raise damaged(path, f"where a box of it begins: {error}", name) from error
            items.setdefault((name, offsets), _item(path, name, place))
    planner = tree.attribute("planner_data")
    return _Table(tensors, objects, planner if type(planner) is dict else {}, items)


def _unpickle(path: Location) -> Any:
    """What a table describes: see `records`."""
    with opened(path, KIND.noun) as file:
        budget = Budget()
        try:
            asked = find_asked(file, budget)
        except Refused as error:
            raise damaged(path, str(error)) from error
        if asked is None:
            return unpickle(path, open_section(file, 0, file.size), {}, budget)
        return unpickle(path, open_table(file), {}, budget, partial(TableMachine, kinds=_RECORDS, asked=asked))


def _attribute(path: Location, node: Any, name: str, kind: type[Any]) -> Any:
    value = node.attribute(name) if type(node) is Inert else None
    if type(value) is not kind:
        raise damaged(path, f"its {name} is {short.repr(value)}")
    return value


def _stored(path: Location, name: str, entry: Inert) -> _Stored:
    properties, chunks = entry.attribute("properties"), _attribute(path, entry, "chunks", list)
    first = properties.state[0] if type(properties) is Inert and type(properties.state) is tuple and properties.state else None
    if first is None and type(properties) is Inert:
        first = properties.attribute("dtype")
    dtype = DTYPES.get(first.name.removeprefix("torch.")) if type(first) is Global else None
    if dtype is None:
        raise FormatError(f"{show(path)}: tensor {short.repr(name)} is of type {short.repr(first)}, which is not read: leave it out")
    try:
        shape = read_sizes(entry.attribute("size"))
        boxes = [(read_sizes(one.attribute("offsets")), read_sizes(one.attribute("sizes"))) for one in chunks]
    except (ValueError, AttributeError) as error:
        raise damaged(path, f"its boxes: {error}", name) from error
    if not countable([*shape, dtype.itemsize]):
        raise damaged(path, f"its shape {short.repr(shape)} has 2**63 bytes or more", name)
    chunks.clear()
    return _Stored(TensorSpec(dtype, shape), boxes)


def _item(path: Location, name: str, place: Located) -> _Item:
    file, offset, nbytes = place.file, place.start, place.nbytes
    if type(file) is not str or type(offset) is not int or type(nbytes) is not int or min(offset, nbytes) < 0:
        raise damaged(path, f"where a box of it lies: {short.repr((file, offset, nbytes))}", name)
    if find_fault(file):
        raise FormatError(
            f"{show(path)}: {short.repr(name)} lies in {short.repr(file)}, which is not below its folder: do not trust this file"
        )
    if place.transforms:
        what = f"{short.repr(name)} is stored by way of {short.repr(place.transforms)}"
        raise FormatError(f"{show(path)}: {what}, which is not read: save the checkpoint without it")
    return _Item(file, offset, nbytes)


# Tensors ---------------------------------------------------------------------------------------------------------


def read(
    path: Location,
    *,
    root: str | None = None,
    by_rank: bool = False,  # noqa: ARG001 - boxes of all ranks are one tensor
    files: Sequence[str] | Selection | None = None,  # noqa: ARG001 - the table of contents names them
    explain: Explain = unexplained,  # noqa: ARG001 - the same
) -> Contents:
    """The model's tensors of a folder; of what its table says is a trainer's the bytes are noted.

    Args:
        path: the folder, or one that holds it as Accelerate and Megatron have it.
        root: the key of the dict of tensors, dotted if it lies deeper; '' for all; by default where the weights are (see `roots`).
        by_rank: of no effect.
        files: of no effect.
        explain: of no effect.

    Raises:
        FormatError: an unfinished save, a missing file, boxes that leave holes, overlap or are not what the table says.
        UsageError: the folder or the root is not there, or cannot be read.
    """
    names = path.folder.list()
    folder = find_folder(path.folder, names)
    if folder is None:
        named = next(_iteration(path.folder, names), "")
        what = f"{_ITERATION} names {short.repr(named)}, in which there is no checkpoint" if named else "there is no checkpoint in it"
        raise FormatError(f"{show(path.folder.file(''))}: {what}: fetch its files, or give the folder of another iteration")
    table_files = _find_tables(folder, folder.list())
    table_file, table = table_files[0], _join_tables(table_files)
    weights = find_weights(table_file, _tree(table), root)
    chosen = {
        name: leaf.storage.key for name, leaf in weights.named if type(leaf) is Tensor and not (root is None and _EXTRA.fullmatch(name))
    }
    left = [stored.spec.nbytes for name, stored in table.tensors.items() if name not in set(chosen.values())]
    pieces = _read_pieces(folder, table_file, table, set(chosen.values()))
    entries: dict[str, AnyNode] = {}
    replicas: list[Replica] = []
    for name, stored_name in chosen.items():
        entries[name], same = assemble(table_file, name, table.tensors[stored_name].spec, pieces[stored_name])
        replicas += same
    if not entries:
        raise FormatError(f"{show(table_file)}: no tensor below root {weights.root!r}: give another root")
    check_unicode(table_file, entries)
    listed = dict.fromkeys(item.file for item in table.items.values())
    contents = Contents("dcp", entries, [folder.file(name) for name in sorted(listed)], table_files, replicas=replicas)
    contents.notes += note_root(weights.root)
    contents.notes += note_left_out(len(left), sum(left), table.objects, nests=True)
    return contents


def _tree(table: _Table) -> dict[str, Any]:
    """The dicts that names are made of, with a tensor for each that is one."""
    tree: dict[str, Any] = {}
    for name, stored in table.tensors.items():
        leaf = Tensor(
            Storage(name, stored.spec.dtype), stored.spec.dtype, 0, stored.spec.shape, packed_strides(stored.spec.shape), lazy=False
        )
        _insert(tree, _keys(name, table.paths), leaf)
    for name in table.objects:
        _insert(tree, _keys(name, table.paths), Inert("an object"))
    return tree


def _keys(name: str, paths: Mapping[str, Any]) -> list[str]:
    """The keys of dicts that a name is made of; where nothing says them, a trainer's own are told from the rest."""
    path = paths.get(name)
    if type(path) is tuple and path and all(type(key) in (str, int) for key in path):
        keys = [str(key) for key in path]
        if len(keys) > 1:
            return keys
    split = _SPLIT.fullmatch(name)
    if split:
        return [split[1], split[2]]
    first, _, rest = name.partition(".")
    return [first, rest] if rest and is_trainers(first) else [name]


def _insert(tree: dict[str, Any], keys: Sequence[str], leaf: Any) -> None:
    for key in keys[:-1]:
        inner = tree.setdefault(key, {})
        if type(inner) is not dict:
            tree[".".join(keys)] = leaf
            return
        tree = inner
    tree[keys[-1]] = leaf


def _read_pieces(folder: Folder, path: Location, table: _Table, names: set[str]) -> dict[str, list[Piece]]:
    """The boxes of some tensors, each file opened once."""
    wanted: dict[str, list[tuple[int, int, str, tuple[int, ...], tuple[int, ...]]]] = {}
    pieces: dict[str, list[Piece]] = {name: [] for name in names}
    for name in table.tensors:
        if name not in names:
            continue
        for offsets, sizes in table.tensors[name].chunks:
            if 0 in sizes:
                continue
            item = table.items.get((name, offsets))
            if item is None:
                raise damaged(path, f"its box at {list(offsets)} lies in no file", name)
            for one in (item, *table.replicas.get((name, offsets), ())):
                wanted.setdefault(one.file, []).append((one.offset, one.nbytes, name, offsets, sizes))
    for file_name, items in sorted(wanted.items()):
        where = folder.file(file_name)
        if not folder.has(file_name):
            raise FormatError(f"{show(where)}: not there, and {short.repr(items[0][2])} lies in it: fetch the files of all ranks")
        with opened(where, KIND.noun) as file:
            size = file.size
            for offset, nbytes, name, offsets, sizes in sorted(items):
                if offset + nbytes > size:
                    raise damaged(where, f"it has {size} bytes, and {nbytes} at {offset} are to be a box of it", name)
                tensor, places = open_item(where, file, offset, nbytes)
                spec = table.tensors[name].spec
                if type(tensor) is not Tensor or tensor.shape != sizes or tensor.dtype != spec.dtype:
                    found = f"{tensor.dtype.name}{list(tensor.shape)}" if type(tensor) is Tensor else short.repr(tensor)
                    raise damaged(where, f"its box at {list(offsets)} is {_named(spec.dtype, sizes)} by {METADATA}, found {found}", name)
                pieces[name].append(Piece(offsets, locate_tensor(where, name, tensor, places)))
    return pieces


def _named(dtype: DType, sizes: Sequence[int]) -> str:
    return f"{dtype.name}{list(sizes)}"


CONTAINER = Container(
    name="dcp",
    summary="torch's distributed checkpoints",
    names=KIND,
    read=read,
    lay_out=lay_out,
    holds=holds,
    is_trained=True,
    nests=True,
)
