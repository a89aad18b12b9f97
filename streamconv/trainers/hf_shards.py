"""safetensors files of ranks, as torch's `HuggingFaceStorageWriter` saves them before they are consolidated.

``shard-RANK-model-....safetensors`` hold boxes of tensors under their names; ``DCP_SHARDING_INFO`` of each file says where
these begin. How large the whole is follows from all of them. Facts: torch/distributed/checkpoint/hf_storage.py of torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.formats import AnyNode, Contents
from streamconv.formats import safetensors as safetensors_files
from streamconv.formats.container import Container, Names
from streamconv.formats.files import check_unicode, damaged, short, show
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.json_text import MAX_CONFIG, read_json
from streamconv.formats.selection import Selection
from streamconv.storage.folder import Folder, Location, read_each
from streamconv.trainers.pieces import Piece, Replica, assemble, read_sizes

_FILE = re.compile(r"shard-(?P<rank>\d{5,})-.+\.safetensors", re.DOTALL)
_INFO = "DCP_SHARDING_INFO"
_CONFIG = "config.json"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight")
KIND = Names("a rank's file of torch's writer for Hugging Face", (), "shard", (), weights=("shard-*-*.safetensors",))


def holds(folder: Folder, names: Sequence[str]) -> bool:
    """Whether a folder has files of ranks, and none that is consolidated."""
    shards = sorted(filter(_FILE.fullmatch, names))
    if not shards or any(name.endswith(".safetensors") and not _FILE.fullmatch(name) for name in names):
        return False
    try:
        return _INFO in safetensors_files.read_file(folder.file(shards[0]))[1]
    except FormatError:
        return True  # reading it says what is wrong


def read(
    path: Location,
    *,
    ranks: int | None = None,
    by_rank: bool = False,  # noqa: ARG001 - boxes of all ranks are one tensor
    files: Sequence[str] | Selection | None = None,  # noqa: ARG001 - found by their names
    explain: Explain = unexplained,  # noqa: ARG001 - there is no index
) -> Contents:
    """The whole tensors of a folder of ranks.

    Args:
        path: the folder.
        ranks: how many there are, since no file says it.
        by_rank: of no effect.
        files: of no effect.
        explain: of no effect.

    Raises:
        FormatError: a rank is missing, or boxes do not make a whole.
    """
    names = sorted(filter(_FILE.fullmatch, path.folder.list()))
    numbers = {int(name.split("-")[1]) for name in names}
    missing = sorted(set(range(1, max(*numbers, ranks or 1) + 1)) - numbers)
    if missing:
        raise FormatError(f"{show(path)}: no shard-{missing[0]:05d}-*.safetensors: fetch the files of all ranks")
    if ranks is not None and ranks < max(numbers):
        raise UsageError(f"--set ranks={ranks}: {show(path)} has files of {max(numbers)} ranks: say how many there are")
    locations = [path.folder.file(name) for name in names]
    pieces: dict[str, list[Piece]] = {}
    for location, (table, metadata) in zip(locations, read_each(locations, KIND.noun, safetensors_files.read_file), strict=True):
        offsets = _offsets(location, metadata.get(_INFO))
        for name, node in table.items():
            if len(offsets.get(name, ())) != len(node.spec.shape):
                raise damaged(location, f"its {_INFO} does not say where it begins", name)
            pieces.setdefault(name, []).append(Piece(offsets[name], node))
    entries: dict[str, AnyNode] = {}
    replicas: list[Replica] = []
    for name, boxes in pieces.items():
        ends = [[stop for _, stop in piece.box] for piece in boxes]
        spec = TensorSpec(boxes[0].node.spec.dtype, tuple(max(axis) for axis in zip(*ends, strict=True)))
        entries[name], same = assemble(path, name, spec, boxes)
        replicas += same
    check_unicode(path, entries)
    contents = Contents(CONTAINER.name, entries, locations, replicas=replicas)
    _check_vocabulary(path, entries)
    unsaid = "" if ranks else "; that there are no more of them no file says (--set ranks=N makes sure)"
    contents.notes.append(f"{len(numbers)} ranks: parts of {len(entries)} tensors are put together{unsaid}")
    return contents


def _check_vocabulary(path: Location, entries: Mapping[str, AnyNode]) -> None:
    """Raises FormatError where a config.json beside says more words than the embedding has rows: a rank with the last ones is missing."""
    if not path.folder.has(_CONFIG):
        return
    config = read_json(path.folder.file(_CONFIG), MAX_CONFIG, "a config")
    words = config.get("vocab_size") if isinstance(config, dict) else None
    for name, node in entries.items():
        if type(words) is int and name.endswith(_EMBEDDINGS) and node.spec.shape and node.spec.shape[0] < words:
            what = f"{short.repr(name)} has {node.spec.shape[0]} rows, and config.json says {words} words"
            raise FormatError(f"{show(path)}: {what}: fetch the files of all ranks")


def _offsets(path: Location, text: str | None) -> dict[str, tuple[int, ...]]:
    """Where each box of a file begins."""
    try:
        said: Any = msgspec.json.decode(text or "{}")
        return {name: read_sizes(info["saved_offsets"]) for name, info in said.items()}
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, f"its {_INFO} is {short.repr(text)}") from error


CONTAINER = Container(
    name="hf_shards",
    summary="torch's shards for Hugging Face",
    names=KIND,
    read=read,
    holds=holds,
    is_trained=True,
    counts={"ranks": "how many ranks wrote files, so that a missing last one is told"},
)
