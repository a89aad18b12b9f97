"""A file for each rank, with the rank's own parts of sharded tensors, as FSDP, verl and Accelerate leave them.

``model_world_size_{N}_rank_{R}.pt`` is verl's, ``pytorch_model_fsdp_{M}_rank{R}.bin`` Accelerate's; others are told by what is in them.
Each file says itself where its parts belong (see `placements`); what is whole in all of them is taken from the first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError
from streamconv.formats import AnyNode, Contents, Source
from streamconv.formats.container import Container, Names
from streamconv.formats.files import check_unicode, opened, short, show
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.pickles import Sharded, Tensor
from streamconv.formats.roots import count_tensors, find_weights, note_root
from streamconv.formats.selection import Selection
from streamconv.formats.torch import Places, locate_tensor, open_tree, pick_tensors
from streamconv.storage.folder import Folder, Location, read_each
from streamconv.trainers.leftovers import note_left_out
from streamconv.trainers.pieces import Piece, Replica, assemble
from streamconv.trainers.placements import Unplaced, local_parts

_OWN = (
    re.compile(r"model_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt"),
    re.compile(r"pytorch_model_fsdp(?:_\d+)?_rank_?(?P<rank>\d+)\.bin"),
)
_ANY = re.compile(r".*?rank_?(?P<rank>\d+).*\.(?:pt|pth|bin)", re.DOTALL)
_OTHERS = re.compile(r"(?:.*_)?(?:mp|tp|pp|zero_pp)_rank_.*|optim.*|extra_state_.*|.*_optim.*|rng.*|random.*", re.DOTALL)
_FLAT = "_flat_param"  # FSDP1's parameters in one row, which nothing says the shapes of
_BESIDE = "huggingface"  # verl's folder of config and tokenizer
_LARGEST_MAP = 1 << 20  # ranks of a mesh
KIND = Names("a rank's file of FSDP", (), "model_world_size", (), weights=("model_world_size_*_rank_*.pt", "pytorch_model_fsdp*_rank*.bin"))


def holds(folder: Folder, names: Sequence[str]) -> bool:
    """Whether a folder has such files: by their names, or by what is in the first of those that are numbered by rank."""
    if any(pattern.fullmatch(name) for pattern in _OWN for name in names):
        return True
    numbered = sorted(name for name in names if _ANY.fullmatch(name) and not _OTHERS.fullmatch(name))
    if not numbered or any(name.endswith(".safetensors") for name in names):
        return False
    try:
        tree, _ = open_tree(folder.file(numbered[0]))
    except FormatError:
        return False
    return _has_sharded(tree, 4)


def _has_sharded(node: Any, depth: int) -> bool:
    if type(node) is Sharded:
        return True
    return type(node) is dict and depth > 0 and any(_has_sharded(value, depth - 1) for value in node.values())


def _rank_files(folder: Folder, names: Sequence[str]) -> dict[int, str]:
    """The files of a folder by their ranks. Raises FormatError where some are missing, or are of several runs."""
    own = [match for pattern in _OWN for match in map(pattern.fullmatch, names) if match]
    others = [match for match in map(_ANY.fullmatch, names) if match and not _OTHERS.fullmatch(match.string)]
    sets: dict[tuple[str, str], dict[int, re.Match[str]]] = {}
    for match in own or others:
        name = match.string
        around = name[: match.start("rank")], name[match.end("rank") :]
        other = sets.setdefault(around, {}).setdefault(int(match["rank"]), match)
        if other is not match:
            raise FormatError(
                f"{show(folder.file(''))}: {other.string} and {name} are both of rank {int(match['rank'])}: leave one of them"
            )
    if len(sets) > 1:
        firsts = ", ".join(min(match.string for match in files.values()) for files in sets.values())
        raise FormatError(f"{show(folder.file(''))}: files of several runs or models, such as {firsts}: move all but one set elsewhere")
    (files,) = sets.values()
    said = next(iter(files.values())).groupdict().get("world")
    world = int(said) if said else max(files) + 1
    missing = sorted(set(range(world)) - set(files))
    if missing or len(files) > world:
        what = f"the file of rank {missing[0]} is not there" if missing else f"there are {len(files)} files"
        raise FormatError(f"{show(folder.file(''))}: {what}, of {world} ranks: fetch the files of all ranks")
    return {rank: files[rank].string for rank in sorted(files)}


@dataclass(frozen=True, slots=True)
class _Rank:
    """What a rank's file holds: its leaves by name, where its storages lie, the root, how many tensors are left out."""

    path: Location
    named: Mapping[str, Any]
    places: Places
    root: str
    left_out: int


def _read_rank(path: Location, root: str | None) -> _Rank:
    tree, places = open_tree(path)
    weights = find_weights(path, tree, root)
    named, _ = pick_tensors(path, weights)
    return _Rank(path, named, places, weights.root, count_tensors(part for _, part in weights.left_out))


def _read_numbers(rank: _Rank, tensor: Tensor) -> list[int]:
    """A small tensor of integers, as it lies in the file."""
    node = locate_tensor(rank.path, "a mesh", tensor, rank.places)
    kind = {"int32": "i", "int64": "q"}.get(tensor.dtype.name)
    if kind is None or not isinstance(node, Source) or node.spec.numel > _LARGEST_MAP:
        raise Unplaced(f"has a mesh of {node.spec}")
    numbers: list[int] = []
    with opened(rank.path, KIND.noun) as file:
        for extent in node.extents:
            raw = file.pread(extent.nbytes, extent.offset)
            numbers += struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw)
    return numbers


def read(
    path: Location,
    *,
    root: str | None = None,
    by_rank: bool = False,  # noqa: ARG001 - parts of all ranks are one tensor
    files: Sequence[str] | Selection | None = None,  # noqa: ARG001 - found by their numbers
    explain: Explain = unexplained,  # noqa: ARG001 - there is no index
) -> Contents:
    """The whole tensors of a folder of ranks, in the dtypes that are stored.

    Args:
        path: the folder.
        root: the key of the dict of tensors in each file; by default where the weights are (see `roots`).
        by_rank: of no effect.
        files: of no effect.
        explain: of no effect.

    Raises:
        FormatError: a rank is missing, or parts do not make a whole.
    """
    ranks = _rank_files(path.folder, path.folder.list())
    locations = [path.folder.file(name) for name in ranks.values()]
    read_ranks = dict(zip(ranks, read_each(locations, (KIND.noun, root), lambda file: _read_rank(file, root)), strict=True))
    first = next(iter(read_ranks.values()))
    names = dict.fromkeys(name for one in read_ranks.values() for name in one.named)
    entries: dict[str, AnyNode] = {}
    replicas: list[Replica] = []
    for name in names:
        if name.rpartition(".")[2] == _FLAT:
            what = f"{short.repr(name)} is FSDP's own row of all parameters, which says nothing of their shapes"
            raise FormatError(f"{show(path)}: {what}: save a full or a sharded state dict instead of a local one")
        entries[name], same = _assemble(path, name, read_ranks)
        replicas += same
    check_unicode(path, entries)
    contents = Contents("fsdp", entries, locations, replicas=replicas)
    if path.folder.has(f"{_BESIDE}/config.json"):
        contents.beside = _BESIDE
    contents.notes += note_root(first.root)
    contents.notes.append(f"{len(ranks)} ranks: parts of {len(entries)} tensors are put together")
    left_out = sum(one.left_out for one in read_ranks.values())
    if left_out:
        contents.notes += note_left_out(left_out, None, (), nests=True)
    return contents


def _assemble(path: Location, name: str, ranks: Mapping[int, _Rank]) -> tuple[AnyNode, list[Replica]]:
    """A tensor of the parts that ranks have."""
    pieces: list[Piece] = []
    spec: TensorSpec | None = None
    for number, rank in ranks.items():
        leaf = rank.named.get(name)
        if leaf is None:
            raise FormatError(
                f"{show(rank.path)}: {short.repr(name)} is in files of other ranks, and not in this one: they are of several runs"
            )
        if leaf.dtype.name not in DTYPES:
            raise FormatError(f"{show(rank.path)}: tensor {short.repr(name)} is of type {leaf.dtype.name}, which is not read")
        own = TensorSpec(leaf.dtype, leaf.shape)
        if spec is not None and own != spec:
            raise FormatError(f"{show(rank.path)}: {short.repr(name)} is {own}, and {spec} by other ranks: they are of several runs")
        spec = own
        try:
            parts = local_parts(leaf, number, partial(_read_numbers, rank)) if type(leaf) is Sharded else [((0,) * len(leaf.shape), leaf)]
        except Unplaced as error:
            raise FormatError(f"{show(rank.path)}: {short.repr(name)} {error}") from error
        for offsets, tensor in parts:
            pieces.append(Piece(offsets, locate_tensor(rank.path, name, tensor, rank.places)))
    assert spec is not None
    return assemble(path, name, spec, pieces)


CONTAINER = Container(name="fsdp", summary="files of FSDP's ranks", names=KIND, read=read, holds=holds, nests=True, is_trained=True)
