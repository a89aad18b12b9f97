"""MindSpore Transformers' Checkpoint 2.0: safetensors files of ranks, and ``metadata.json``, which says which box of which tensor each has.

``latest_checkpointed_iteration.txt`` names the folder ``iteration_NNNNNNNN``. One device writes no table: its file is the whole.
Facts: mindformers/checkpoint of MindSpore Transformers 1.9.0 and 2.1.0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.formats import AnyNode, Contents, FileLayout
from streamconv.formats import safetensors as safetensors_files
from streamconv.formats.container import Container, Names
from streamconv.formats.files import check_unicode, damaged, read_line, short, show
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.json_text import MAX_JSON, read_json
from streamconv.formats.selection import Selection
from streamconv.storage.folder import Folder, Location, read_each
from streamconv.trainers.leftovers import note_left_out
from streamconv.trainers.pieces import Piece, Replica, assemble, read_sizes

_LATEST = "latest_checkpointed_iteration.txt"
_TABLE, _COMMON = "metadata.json", "common.json"
_FILE = re.compile(r"(?:.*-)?(?P<kind>model|opt)-(?P<rank>\d{7})-(?P<world>\d{7})\.safetensors", re.DOTALL)
_OWN = "iteration_00000000"  # of a new checkpoint
KIND = Names("a checkpoint of MindSpore Transformers", (), "model", (), weights=("*model-*-*.safetensors", "*opt-*-*.safetensors"))


def holds(folder: Folder, names: Sequence[str]) -> bool:
    """Whether a folder has a model's files of ranks, or names the folder of an iteration that does."""
    return _find(folder, names) is not None


def _find(folder: Folder, names: Sequence[str]) -> Folder | None:
    if any(match["kind"] == "model" for match in map(_FILE.fullmatch, names) if match):
        return folder
    if _LATEST not in names:
        return None
    text = read_line(folder.file(_LATEST), KIND.noun)
    name = f"iteration_{int(text):08d}" if text.isascii() and text.isdigit() else ""
    if name in names and any(map(_FILE.fullmatch, folder.folder(name).list())):
        return folder.folder(name)
    return None


def read(
    path: Location,
    *,
    by_rank: bool = False,  # noqa: ARG001 - boxes of all ranks are one tensor
    files: Sequence[str] | Selection | None = None,  # noqa: ARG001 - found by their names
    explain: Explain = unexplained,  # noqa: ARG001 - there is no index
) -> Contents:
    """The model's tensors; the optimizer's lie in files of their own.

    Args:
        path: the folder of the run, or of an iteration.
        by_rank: of no effect.
        files: of no effect.
        explain: of no effect.

    Raises:
        FormatError: a file that is missing, or boxes that do not make a whole.
    """
    folder = _find(path.folder, path.folder.list())
    if folder is None:
        raise FormatError(f"{show(path)}: no model-*.safetensors of an iteration in it: give the folder of one")
    names = folder.list()
    matches = {name: match for name in sorted(names) for match in [_FILE.fullmatch(name)] if match}
    models = [name for name, match in matches.items() if match["kind"] == "model"]
    locations = [folder.file(name) for name in models]
    each = read_each(locations, KIND.noun, safetensors_files.read_file)
    tables = {name: table for name, (table, _) in zip(models, each, strict=True)}
    replicas: list[Replica] = []
    if _TABLE in names:
        entries = _assemble_all(folder, tables, replicas)
    elif len(models) == 1 and int(matches[models[0]]["world"]) == 1:
        entries = dict(tables[models[0]])
    else:
        world = int(matches[models[0]]["world"])
        raise FormatError(f"{show(folder.file(''))}: files of {world} ranks, and no {_TABLE}, which says what they hold: fetch it")
    check_unicode(folder.file(""), entries)
    others = [folder.file(name) for name in (_TABLE, _COMMON) if name in names]
    contents = Contents(CONTAINER.name, entries, locations, others, replicas=replicas)
    left = [name for name, match in matches.items() if match["kind"] == "opt"]
    if left:
        sizes = sum(folder.size(name) for name in left)
        contents.notes += note_left_out(len(left), sizes, (), what="files of the optimizer")
    return contents


def _assemble_all(folder: Folder, tables: Mapping[str, Mapping[str, AnyNode]], replicas: list[Replica]) -> dict[str, AnyNode]:
    """Every tensor of the table that lies in a model's files."""
    path = folder.file(_TABLE)
    said = read_json(path, MAX_JSON, "a table of contents")
    state, storage = (said.get(key) if isinstance(said, dict) else None for key in ("state_dict_metadata", "storage_data"))
    if not isinstance(state, dict) or not isinstance(storage, dict):
        raise damaged(path, "it has no state_dict_metadata, or no storage_data")
    entries: dict[str, AnyNode] = {}
    for name, entry in state.items():
        shape, boxes = _boxes(path, name, entry)
        pieces: list[Piece] = []
        for key, offsets, sizes in boxes:
            places = storage.get(str((name, key)))
            listed = [_file_of(place) for place in places] if isinstance(places, list) else []
            kinds = {match["kind"] for match in map(_FILE.fullmatch, listed) if match}
            if not kinds:
                raise damaged(path, f"its box at {list(offsets)} lies in no file", name)
            if kinds == {"opt"}:
                continue
            held = [tables[file][name] for file in listed if file in tables and name in tables[file]]
            if not held:
                what = f"its box at {list(offsets)} should lie in {', '.join(listed[:3])}"
                raise FormatError(f"{show(path)}: tensor {short.repr(name)}: {what}: fetch the files of all ranks")
            wrong = next((node.spec for node in held if node.spec.shape != sizes), None)
            if wrong is not None:
                raise damaged(path, f"its box at {list(offsets)} is of {list(sizes)}, and its file has {wrong}", name)
            pieces += [Piece(offsets, node) for node in held]
        if pieces:
            entries[name], same = assemble(path, name, TensorSpec(pieces[0].node.spec.dtype, shape), pieces)
            replicas += same
    if not entries:
        raise FormatError(f"{show(path)}: none of its tensors is a model's: fetch the files of all ranks")
    return entries


def _file_of(place: Any) -> str:
    name = str(place.get("file_name")) if isinstance(place, dict) else ""
    name = name.rpartition("/")[2]
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


_Numbers = tuple[int, ...]


def _boxes(path: Location, name: str, entry: Any) -> tuple[_Numbers, list[tuple[_Numbers, _Numbers, _Numbers]]]:
    """A tensor's shape, and of each of its boxes what it is called, where it begins and how large it is."""
    try:
        return _read_boxes(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"what it says of its boxes cannot be read ({type(error).__name__} {short.repr(str(error))})", name) from error


def _read_boxes(entry: Any) -> tuple[_Numbers, list[tuple[_Numbers, _Numbers, _Numbers]]]:
    shape = read_sizes(entry["global_shape"])
    chunks = [(read_sizes(chunk["global_offset"]), read_sizes(chunk["local_shape"])) for chunk in entry["chunk"]]
    cuts, layout = entry.get("axis_fragmentations"), entry.get("layout")
    if cuts is None:
        return shape, [(offsets, offsets, sizes) for offsets, sizes in chunks]
    if isinstance(layout, dict) and layout.get("interleaved_parallel"):
        raise ValueError("its parts are interleaved")
    parts = read_sizes(cuts)
    return shape, [(key, _offsets(key, sizes, shape, parts, chunks), sizes) for key, sizes in chunks]


def _offsets(key: _Numbers, sizes: _Numbers, shape: _Numbers, parts: _Numbers, chunks: Sequence[tuple[_Numbers, _Numbers]]) -> _Numbers:
    """Where a box begins: its ``global_offset`` is its number among all that a tensor is cut in, or says it of each axis."""
    count = math.prod(parts)
    if len(key) != 1 or (len(shape) == 1 and any(start >= count for (start,), _ in chunks)):
        return key
    if len(sizes) != len(shape) or [size * part for size, part in zip(sizes, parts, strict=True)] != list(shape) or key[0] >= count:
        raise ValueError(f"part {key[0]} of {list(sizes)}, of {list(shape)} cut in {list(parts)}")
    number, places = key[0], []
    for part in reversed(parts):
        number, place = divmod(number, part)
        places.append(place)
    return tuple(place * size for place, size in zip(reversed(places), sizes, strict=True))


def lay_out(specs: Mapping[str, TensorSpec], *, max_shard_size: int | None = None, file: str | None = None) -> list[FileLayout]:  # noqa: ARG001
    """The files of a checkpoint of one device; the one that names its folder comes last.

    Args:
        specs: the tensors, in tensor order.
        max_shard_size: of no effect: a device writes one file.
        file: there is no such checkpoint of one file.

    Raises:
        UsageError: one file, or a type that safetensors does not have.
    """
    if file is not None:
        raise UsageError(f"{file}: a checkpoint of MindSpore Transformers is a folder: give a directory")
    model = safetensors_files.lay_out(specs, max_shard_size=None, file=f"{_OWN}/model-0000000-0000001.safetensors", metadata={})
    common = json.dumps({"epoch_num": 0, "step_num": 0, "global_step": 0, "loss_scale": None, "global_batch_size": 1}).encode()
    texts = ((f"{_OWN}/{_COMMON}", common), (_LATEST, b"0"))
    return [*model, *(FileLayout(name, len(data), ((0, data),), {}) for name, data in texts)]


CONTAINER = Container(
    name="mindspore2",
    summary="MindSpore Transformers' checkpoints",
    names=KIND,
    read=read,
    lay_out=lay_out,
    holds=holds,
    is_trained=True,
)
