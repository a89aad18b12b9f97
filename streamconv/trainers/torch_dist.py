"""Megatron Core's ``torch_dist``: a distributed checkpoint of torch with ``metadata.json`` and ``common.pt`` beside it.

What lies in `common.pt`, arguments and counts of a run, is not read; a new one is empty. Facts: megatron/core/dist_checkpointing of
megatron-core 0.16.1, which loads what is written here (``--dist-ckpt-strictness log_unexpected``: it holds no ``_extra_state``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.formats import Contents, FileLayout
from streamconv.formats.container import Container
from streamconv.storage.folder import Folder, Location
from streamconv.trainers import dcp, dcp_files

_COMMON, _ABOUT = "common.pt", "metadata.json"
_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


def holds(folder: Folder, names: Sequence[str]) -> bool:
    """Whether a folder is such a checkpoint, or names the folder of an iteration that is one."""
    inner = dcp.find_folder(folder, names)
    return inner is not None and inner.has(_COMMON) and inner.has(_ABOUT)


def read(path: Location, **keywords: Any) -> Contents:
    """See `dcp.read`."""
    contents = dcp.read(path, **keywords)
    contents.format = CONTAINER.name
    folder = contents.files[0].folder
    contents.others += [folder.file(name) for name in (_COMMON, _ABOUT)]
    return contents


def lay_out(
    specs: Mapping[str, TensorSpec], *, max_shard_size: int | None = None, file: str | None = None, root: str | None = None
) -> list[FileLayout]:
    """See `dcp_files.lay_out`; the two files beside it come before the table of contents."""
    *files, table = dcp_files.lay_out(specs, max_shard_size=max_shard_size, file=file, root=root)
    about = json.dumps(_BACKENDS).encode()
    common = dcp_files.zip_of_dict()
    beside = [FileLayout(name, len(data), ((0, data),), {}) for name, data in ((_ABOUT, about), (_COMMON, common))]
    return [*files, *beside, table]


CONTAINER = Container(
    name="torch_dist",
    summary="Megatron Core's checkpoints",
    names=replace(dcp.KIND, noun="a checkpoint of Megatron Core", suffixes=(), weights=(*dcp.KIND.weights, _COMMON)),
    read=read,
    lay_out=lay_out,
    holds=holds,
    is_trained=True,
    nests=True,
)
