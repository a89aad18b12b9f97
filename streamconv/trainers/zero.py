"""DeepSpeed's checkpoints: ZeRO stages 1 to 3, whose float32 masters lie in flat partitions of ranks, and universal checkpoints.

``latest`` names the folder ``global_stepN``. In stages 1 and 2 the partitions of a group, end to end, are its parameters in the order of
``param_shapes``; in stage 3 each parameter takes the same range of every rank's row. All of it is ranges of bytes. Facts:
deepspeed/utils/zero_to_fp32.py and deepspeed/checkpoint of DeepSpeed 0.19.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.formats import AnyNode, Contents, Extent, Source
from streamconv.formats.container import Container, Names
from streamconv.formats.files import check_unicode, countable, damaged, read_line, short, show
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.pickles import Tensor
from streamconv.formats.roots import measure_tensors
from streamconv.formats.sat import ITERATION_NAME
from streamconv.formats.selection import Selection
from streamconv.formats.torch import Places, locate_tensor, open_tree
from streamconv.graph.node import apply
from streamconv.graph.ops import Cast
from streamconv.storage.folder import Folder, Location, read_each
from streamconv.trainers.leftovers import note_left_out
from streamconv.trainers.pieces import Replica

_STEP = re.compile(r"global_step\d+(_universal)?")  # what it calls a tag itself
_MARKERS = ("latest_universal", "latest")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<slice>\d+)_optim_states\.pt")
_PARTS = re.compile(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<slice>\d+)_model_states\.pt")
_MODULE = re.compile(r"mp_rank_(?P<slice>\d+)_model_states\.pt")
_SLICE = re.compile(r"mp_rank_(?P<slice>\d+)_model_states")
_EXPERT = re.compile(r"(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_mp_rank_\d+_model_states\.pt")
_UNIVERSAL = "zero"  # the folder with one folder for each parameter
_MASTER = "fp32.pt"
_ALIGNED = 2  # elements for each rank that a group is padded to a multiple of
KIND = Names(
    "a checkpoint of DeepSpeed",
    (),
    "zero_pp_rank",
    (),
    weights=("*zero_pp_rank_*_states.pt", "mp_rank_*_model_states.pt", "latest", "latest_universal"),
)


def holds(folder: Folder, names: Sequence[str]) -> bool:
    """Whether a folder is such a checkpoint, or has a file that names one; SwissArmyTransformer has a ``latest``, too."""
    if any(_OPTIMIZER.fullmatch(name) or _PARTS.fullmatch(name) for name in names) or _is_universal(folder, names):
        return True
    for marker in _MARKERS:
        if marker not in names:
            continue
        tag = read_line(folder.file(marker), KIND.noun)
        if _STEP.fullmatch(tag) and not folder.has_folder(tag):
            return True  # reading it says that it is not there
        if not tag or "/" in tag or not folder.has_folder(tag):
            continue
        inner = folder.folder(tag)
        listed = inner.list()
        is_sharded = any(_OPTIMIZER.fullmatch(name) or _PARTS.fullmatch(name) for name in listed)
        is_named = not ITERATION_NAME.fullmatch(tag) and any(map(_MODULE.fullmatch, listed))
        if is_sharded or is_named or _is_universal(inner, listed):
            return True
    return False


def _is_universal(folder: Folder, names: Sequence[str]) -> bool:
    has_models = any(_MODULE.fullmatch(name) or _PARTS.fullmatch(name) for name in names)
    return _UNIVERSAL in names and has_models and folder.has_folder(_UNIVERSAL)


@dataclass(frozen=True, slots=True)
class _File:
    """A file's tree, and where its storages lie."""

    path: Location
    tree: dict[str, Any]
    places: Places

    def tensor(self, name: str, leaf: Any) -> AnyNode:
        if type(leaf) is not Tensor:
            raise damaged(self.path, f"expected a tensor, found {short.repr(leaf)}", name)
        return locate_tensor(self.path, name, leaf, self.places)

    def table(self, key: str) -> dict[str, Any]:
        """A dict of the file; an empty one where it is not there."""
        value = self.tree.get(key)
        return value if type(value) is dict else {}


def _open(path: Location) -> _File:
    tree, places = open_tree(path)
    if type(tree) is not dict:
        raise damaged(path, f"expected a dict, found {short.repr(tree)}")
    return _File(path, tree, places)


def _open_all(folder: Folder, names: Iterable[str]) -> list[_File]:
    return list(read_each([folder.file(name) for name in names], KIND.noun, _open))


def read(
    path: Location,
    *,
    master: bool = True,
    by_rank: bool = False,  # noqa: ARG001 - partitions of all ranks are one tensor
    files: Sequence[str] | Selection | None = None,  # noqa: ARG001 - found by their names
    explain: Explain = unexplained,  # noqa: ARG001 - there is no index
) -> Contents:
    """The model's tensors: the float32 masters, frozen parameters as they are, buffers.

    Args:
        path: the folder with ``latest``, or that of a step.
        master: else what the module has in its own dtype, in stages 0 to 2.
        by_rank: of no effect.
        files: of no effect.
        explain: of no effect.

    Raises:
        FormatError: files of ranks that are missing, or partitions that are not the parameters.
        UsageError: there is no such thing, or ``master`` is off in stage 3.
    """
    folder, marker = _find(path.folder)
    names = folder.list()
    is_universal = _UNIVERSAL in names and folder.has_folder(_UNIVERSAL) and master
    models = _model_files(folder, names, sliced=is_universal)
    experts = sorted(filter(_EXPERT.fullmatch, names))
    if experts and master:
        what = "experts in files of their own, as DeepSpeed-MoE has them, whose float32 parameters are not read"
        raise FormatError(f"{show(folder.file(''))}: {what}: take the module's own tensors with --set master=false")
    files_of = _open_all(folder, models)
    optimizers = {} if is_universal else _numbered(folder, names, _OPTIMIZER)
    left: list[Any] = []
    replicas: list[Replica] = []
    if not master:
        entries, used = _module(files_of[0]), [folder.file(name) for name in (*models, *experts)]
        _check_experts(folder, files_of[0], experts)
        entries |= _experts(_open_all(folder, experts), entries)
    elif is_universal:
        entries, used, replicas = _universal(folder, files_of)
    else:
        states = _open_all(folder, optimizers.values())
        entries = _masters(folder, files_of, states)
        used = [folder.file(name) for name in (*models, *optimizers.values())]
        left = [state.tree for state in states]
    if not entries:
        raise FormatError(f"{show(folder.file(''))}: there is no parameter in it")
    check_unicode(folder.file(""), entries)
    contents = Contents("zero", entries, used, [path.folder.file(marker)] if marker else [], replicas=replicas)
    count, nbytes = measure_tensors(left)
    taken = sum(node.spec.nbytes for node in entries.values() if node.spec.dtype.name == "float32")
    if left and nbytes > taken:
        contents.notes += note_left_out(count, nbytes - taken, ())
    if master and not _is_plain(entries, files_of[0]):
        contents.notes.append("parameters are the optimizer's float32 (--set master=false takes the module's own, in its dtype)")
    return contents


def _is_plain(entries: Mapping[str, AnyNode], model: _File) -> bool:
    """Whether what is read is what the module holds."""
    module = model.table("module")
    return all(type(module.get(name)) is Tensor and module[name].dtype == node.spec.dtype for name, node in entries.items())


def _find(folder: Folder) -> tuple[Folder, str]:
    """The folder of the step, and what names it."""
    names = folder.list()
    if any(pattern.fullmatch(name) for pattern in (_OPTIMIZER, _PARTS, _MODULE) for name in names):
        return folder, ""
    for marker in _MARKERS:
        if marker in names:
            tag = read_line(folder.file(marker), KIND.noun)
            if tag and "/" not in tag and folder.has_folder(tag):
                return folder.folder(tag), marker
            what = f"it names {short.repr(tag)}, which is not there"
            raise FormatError(f"{show(folder.file(marker))}: {what}: fetch that folder, or give the folder of another step")
    raise FormatError(f"{show(folder.file(''))}: no step of DeepSpeed in it: give the folder with latest, or that of a step")


def _model_files(folder: Folder, names: Sequence[str], *, sliced: bool) -> list[str]:
    """The files that say what parameters are called; with ``sliced`` also those of further slices and stages.

    Raises:
        FormatError: there is none, or some are missing.
    """
    if not sliced:
        models = [*(_numbered(folder, names, _MODULE) or _numbered(folder, names, _PARTS)).values()]
    else:
        by_slice: dict[int, list[str]] = {}
        pattern = _MODULE if any(map(_MODULE.fullmatch, names)) else _PARTS
        for name in sorted(names):
            match = pattern.fullmatch(name)
            if match:
                by_slice.setdefault(int(match["slice"]), []).append(name)
        missing = sorted(set(range(max(by_slice, default=-1) + 1)) - set(by_slice))
        if missing:
            raise FormatError(f"{show(folder.file(''))}: no *mp_rank_{missing[0]:02d}_model_states.pt: fetch the files of all ranks")
        models = [name for number in sorted(by_slice) for name in (by_slice[number] if len(by_slice) == 1 else by_slice[number][:1])]
    if not models:
        raise FormatError(f"{show(folder.file(''))}: no *_model_states.pt, which says what parameters are called: fetch it")
    return models


def _numbered(folder: Folder, names: Iterable[str], pattern: re.Pattern[str]) -> dict[int, str]:
    """Files of ranks by their numbers. Raises FormatError where some are missing, or are slices of tensors."""
    found: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if not match:
            continue
        if int(match["slice"]):
            what = f"{name} is a slice of tensors (tensor parallel), which nothing says how to join"
            raise FormatError(f"{show(folder.file(''))}: {what}: merge them with DeepSpeed's ds_to_universal, and give that folder")
        found[int(match.groupdict().get("rank") or 0)] = name
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        example = next(iter(found.values()))
        raise FormatError(
            f"{show(folder.file(''))}: the file of rank {missing[0]} beside {example} is not there: fetch the files of all ranks"
        )
    return {rank: found[rank] for rank in sorted(found)}


# What a module's file says ---------------------------------------------------------------------------------------


def _module(model: _File) -> dict[str, AnyNode]:
    """The module's own tensors, in its dtype."""
    entries = {name: model.tensor(name, leaf) for name, leaf in model.table("module").items()}
    if any(not node.spec.numel for node in entries.values()) and model.tree.get("param_shapes"):
        raise UsageError(f"{show(model.path)}: stage 3 keeps no module of its own: leave out --set master=false")
    return entries


def _check_experts(folder: Folder, model: _File, names: Sequence[str]) -> None:
    """Raises FormatError where a layer's experts are not all there: the model says how many each layer has."""
    numbers: dict[int, set[int]] = {}
    for match in map(_EXPERT.fullmatch, names):
        if match:
            numbers.setdefault(int(match["layer"] or 0), set()).add(int(match["expert"]))
    said = model.tree.get("num_experts")
    counts = said if type(said) is list and all(type(one) is int for one in said) else []
    for layer in range(max([*numbers, len(counts) - 1], default=-1) + 1):
        own = numbers.get(layer, set())
        count = counts[layer] if layer < len(counts) else max(own, default=0) + 1
        missing = next((number for number in range(min(count, len(own) + 1)) if number not in own), None)
        if missing is not None:
            raise FormatError(f"{show(folder.file(''))}: no file of expert {missing} of layer {layer}: fetch the files of all experts")


def _experts(files: Sequence[_File], module: Mapping[str, AnyNode]) -> dict[str, AnyNode]:
    """The tensors of experts, which have files of their own. Raises FormatError where one has been seen."""
    entries: dict[str, AnyNode] = {}
    for file in files:
        for name, leaf in file.tree.items():
            if name in entries or name in module:
                raise damaged(file.path, "another file has it, too", name)
            entries[name] = file.tensor(name, leaf)
    return entries


def _shapes(model: _File) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the parameters of each group, in order."""
    groups = model.tree.get("param_shapes")
    listed = groups if type(groups) is list else [groups]
    return [_shape_table(model, group) for group in listed]


def _shape_table(model: _File, table: Any) -> dict[str, tuple[int, ...]]:
    if type(table) is not dict:
        raise damaged(model.path, f"its param_shapes are {short.repr(table)}")
    shapes = {}
    for name, shape in table.items():
        if type(shape) is not tuple or not all(type(size) is int for size in shape) or not countable([*shape, 4]):
            raise damaged(model.path, f"its shape is {short.repr(shape)}", name)
        shapes[name] = shape
    return shapes


def _beside(models: Sequence[_File]) -> dict[str, AnyNode]:
    """Buffers, floating ones as float32, and frozen parameters as they are."""
    first = models[0]
    names = first.tree.get("buffer_names")
    entries: dict[str, AnyNode] = {}
    for name in names if type(names) is list else []:
        if type(name) is str and name in first.table("module"):
            node = first.tensor(name, first.table("module")[name])
            entries[name] = apply(Cast("float32"), node) if node.spec.dtype.floating and node.spec.dtype.name != "float32" else node
    for name, shape in _shape_table(first, first.tree.get("frozen_param_shapes") or {}).items():
        parts = [one.tensor(name, one.table("frozen_param_fragments").get(name)) for one in models]
        spec = TensorSpec(parts[0].spec.dtype, shape)
        if len(parts) == 1:
            if parts[0].spec.numel != spec.numel:
                raise damaged(first.path, f"it is frozen, of {list(shape)}, and its elements are {parts[0].spec}", name)
            entries[name] = parts[0]
        else:
            entries[name] = _join(first.path, name, spec, [(part, 0, part.spec.numel) for part in parts])
    return entries


def _with_aliases(models: Sequence[_File], entries: dict[str, AnyNode]) -> dict[str, AnyNode]:
    """The same with names of shared parameters, in the order of the module."""
    for model in models:
        for alias, name in model.table("shared_params").items():
            if type(name) is str and name in entries:
                entries.setdefault(alias, entries[name])
    order = models[0].table("module")
    ordered = {name: entries[name] for name in order if name in entries}
    return {**ordered, **{name: node for name, node in entries.items() if name not in ordered}}


# Partitions ------------------------------------------------------------------------------------------------------


def _masters(folder: Folder, models: Sequence[_File], states: Sequence[_File]) -> dict[str, AnyNode]:
    """All tensors, parameters from the partitions of the optimizer's states."""
    if not states:
        if _stage(models[0]) == 0:
            return _module(models[0])
        what = "no *_optim_states.pt, which hold the float32 parameters"
        raise FormatError(f"{show(folder.file(''))}: {what}: fetch them, or take the module's own with --set master=false")
    inner = [state.table("optimizer_state_dict") for state in states]
    _check_count(folder, models[0], inner, len(states))
    is_by_ranges = all(type(one.get("fp32_flat_groups")) is list for one in inner)
    if is_by_ranges and len(models) != len(states):
        raise FormatError(
            f"{show(folder.file(''))}: {len(models)} files of the model, and {len(states)} of the optimizer: fetch all of both"
        )
    entries = _beside(models)
    if is_by_ranges:
        entries |= _by_ranges(models[0], states, inner)
    elif all(type(one.get("single_partition_of_fp32_groups")) is list for one in inner):
        entries |= _by_groups(models[0], states, inner)
    else:
        what = f"an optimizer's state of DeepSpeed without partitions, {short.repr(list(inner[0]))}"
        raise FormatError(f"{show(states[0].path)}: {what}: its module can be taken with --set master=false")
    return _with_aliases(models, entries)


def _stage(model: _File) -> int:
    section = model.table("ds_config").get("zero_optimization")
    stage = section.get("stage", 0) if type(section) is dict else 0
    return stage if type(stage) is int else 0


def _check_count(folder: Folder, model: _File, states: Sequence[Mapping[str, Any]], count: int) -> None:
    """Raises FormatError where there are not as many files as ranks."""
    said = states[0].get("partition_count")
    most = max((one for one in said if type(one) is int), default=count) if type(said) is list and said else said
    world = most if type(most) is int else model.tree.get("dp_world_size")
    if type(world) is int and world != count:
        raise FormatError(f"{show(folder.file(''))}: {count} files of an optimizer's state, of {world} ranks: fetch the files of all ranks")


def _by_groups(model: _File, states: Sequence[_File], inner: Sequence[Mapping[str, Any]]) -> dict[str, AnyNode]:
    """Parameters of stages 1 and 2: of each group the ranks' partitions end to end."""
    entries: dict[str, AnyNode] = {}
    for number, shapes in enumerate(_shapes(model)):
        parts, starts, end = [], [], 0
        for state, one in zip(states, inner, strict=True):
            groups = one["single_partition_of_fp32_groups"]
            if number >= len(groups):
                raise damaged(state.path, f"it has {len(groups)} groups, and {model.path.name} has more")
            part = state.tensor(f"group {number}", groups[number])
            parts.append(part)
            starts.append(end)
            end += part.spec.numel
        paddings = _paddings(inner[0], number, len(shapes))
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            spec = TensorSpec(DTYPES["float32"], shape)
            ranges = list(_overlap(parts, starts, offset, spec.numel))
            _check_slices(states, inner, number, name, [(part, offset, spec.numel) for part in zip(starts, parts, strict=True)])
            entries[name] = _join(model.path, name, spec, ranges)
            offset += spec.numel + padding
        if not 0 <= end - offset < _ALIGNED * len(states):
            what = f"group {number} has {end} elements in all partitions, and its parameters take {offset}"
            raise FormatError(f"{show(model.path)}: {what}: the files are of several runs, or of a DeepSpeed that is not known")
    return entries


def _paddings(state: Mapping[str, Any], group: int, count: int) -> list[int]:
    """Elements behind each parameter of a group."""
    listed = state.get("param_alignment_paddings")
    own = listed[group] if type(listed) is list and group < len(listed) else None
    if type(own) is list and len(own) == count and all(type(one) is int and one >= 0 for one in own):
        return own
    return [0] * count


def _overlap(parts: Sequence[AnyNode], starts: Sequence[int], offset: int, count: int) -> Iterator[tuple[AnyNode, int, int]]:
    """Of partitions end to end those ranges that some elements are in: partition, first element, how many."""
    for part, start in zip(parts, starts, strict=True):
        first, last = max(offset, start), min(offset + count, start + part.spec.numel)
        if first < last:
            yield part, first - start, last - first


def _check_slices(
    states: Sequence[_File],
    inner: Sequence[Mapping[str, Any]],
    group: int,
    name: str,
    places: Sequence[tuple[tuple[int, AnyNode], int, int]],
) -> None:
    """Raises FormatError where a rank says itself that a parameter lies elsewhere in its partition."""
    for state, one, ((start, part), offset, count) in zip(states, inner, places, strict=True):
        tables = one.get("param_slice_mappings")
        table = tables[group] if type(tables) is list and group < len(tables) and type(tables[group]) is dict else {}
        said = table.get(name)
        if said is None:
            continue
        first, last = max(offset, start) - start, min(offset + count, start + part.spec.numel) - start
        if said.attribute("start") != first or said.attribute("numel") != last - first:
            what = f"{short.repr(name)} should lie at {first} of its partition, {last - first} elements, and it says otherwise"
            raise FormatError(f"{show(state.path)}: {what}: the files are of several runs, or of a DeepSpeed that is not known")


def _by_ranges(model: _File, states: Sequence[_File], inner: Sequence[Mapping[str, Any]]) -> dict[str, AnyNode]:
    """Parameters of stage 3: each takes the same range of every rank's row, which is the groups of that rank end to end."""
    rows = []
    for state, one in zip(states, inner, strict=True):
        parts, starts, end = [], [], 0
        for number, group in enumerate(one["fp32_flat_groups"]):
            part = state.tensor(f"group {number}", group)
            parts.append(part)
            starts.append(end)
            end += part.spec.numel
        rows.append((parts, starts, end))
    entries: dict[str, AnyNode] = {}
    offset = 0
    for shapes in _shapes(model):
        for name, shape in shapes.items():
            spec = TensorSpec(DTYPES["float32"], shape)
            own = -(-spec.numel // len(states))
            ranges = [one for parts, starts, _ in rows for one in _overlap(parts, starts, offset, own)]
            entries[name] = _join(model.path, name, spec, ranges)
            offset += own
    short_row = next((end for _, _, end in rows if end < offset), None)
    if short_row is not None:
        raise FormatError(
            f"{show(model.path)}: its parameters take {offset} elements of each rank, and one has {short_row}: fetch all files"
        )
    return entries


def _join(path: Location, name: str, spec: TensorSpec, ranges: Sequence[tuple[AnyNode, int, int]]) -> AnyNode:
    """A tensor of ranges of rows end to end; what is beyond its elements is padding."""
    left, extents = spec.nbytes, []
    itemsize = spec.dtype.itemsize
    for node, first, count in ranges:
        if not isinstance(node, Source) or node.spec.dtype != spec.dtype:
            raise FormatError(
                f"{show(path)}: {short.repr(name)} {spec}: a partition that it lies in is {node.spec}: expected a row of {spec.dtype}"
            )
        extent = node.extents[0]
        nbytes = min(left, count * itemsize)
        if nbytes:
            extents.append(Extent(extent.path, extent.offset + first * itemsize, nbytes))
        left -= nbytes
    if left:
        raise FormatError(
            f"{show(path)}: {short.repr(name)} {spec}: {left // itemsize} of its elements are in no partition: fetch all files"
        )
    return Source(spec, tuple(extents))


# Universal -------------------------------------------------------------------------------------------------------


def _universal(folder: Folder, models: Sequence[_File]) -> tuple[dict[str, AnyNode], list[Location], list[Replica]]:
    """All tensors of a universal checkpoint: a folder for each parameter; the rest is as in the files of the model."""
    below = folder.folder(_UNIVERSAL)
    is_sliced = len({match["slice"] for match in map(_SLICE.search, (model.path.name for model in models)) if match}) > 1
    shapes = {name: shape for model in (models if is_sliced else models[:1]) for group in _shapes(model) for name, shape in group.items()}
    missing = [name for name in shapes if not below.has(f"{name}/{_MASTER}")]
    if missing:
        raise FormatError(f"{show(folder.file(_UNIVERSAL))}: no {missing[0]}/{_MASTER}: fetch the folders of all parameters")
    replicas: list[Replica] = []
    entries = _beside_slices(models, replicas) if is_sliced else _beside(models)
    paths = [below.file(f"{name}/{_MASTER}") for name in shapes]
    opened = read_each(paths, KIND.noun, open_tree)
    for (name, shape), path, (tree, places) in zip(shapes.items(), paths, opened, strict=True):
        leaf = tree.get("param") if type(tree) is dict else tree
        if type(leaf) is not Tensor:
            raise damaged(path, f"expected a tensor, found {short.repr(tree)}", name)
        node = locate_tensor(path, name, leaf, places)
        is_whole = is_sliced and type(tree) is dict and len(node.spec.shape) == len(shape)  # and the shape that is said a slice's
        if node.spec.shape != shape and not is_whole:
            rows = len(shape) > 0 and len(node.spec.shape) == len(shape) and node.spec.shape[1:] == shape[1:]
            is_flat = node.spec.shape == (math.prod(shape),) and not is_sliced
            if not is_flat and not (rows and type(tree) is dict and "vocab_tensor" in tree and node.spec.shape[0] >= shape[0]):
                raise damaged(path, f"it is {node.spec}, and {list(shape)} by {models[0].path.name}", name)
            spec = TensorSpec(node.spec.dtype, shape)
            node = _join(path, name, spec, [(node, 0, spec.numel)])
        entries[name] = node
    return _with_aliases(models, entries), [*paths, *(model.path for model in models)], replicas


def _beside_slices(models: Sequence[_File], replicas: list[Replica]) -> dict[str, AnyNode]:
    """Buffers of slices and stages, which should be the same where they have one name. Raises FormatError for frozen parameters."""
    entries: dict[str, AnyNode] = {}
    for model in models:
        frozen = next(iter(model.table("frozen_param_shapes")), None)
        if frozen is not None:
            what = f"{short.repr(frozen)} is frozen, and in slices that nothing says how to join"
            raise FormatError(f"{show(model.path)}: {what}: save it with one model parallel rank")
        for name, node in _beside([model]).items():
            other = entries.setdefault(name, node)
            if other.spec != node.spec:
                raise damaged(model.path, f"it is {node.spec}, and {other.spec} in another slice", name)
            if other is not node:
                replicas.append((other, node, name))
    return entries


CONTAINER = Container(
    name="zero",
    summary="DeepSpeed's checkpoints",
    names=KIND,
    read=read,
    holds=holds,
    is_trained=True,
    settings={"master": "float32 parameters of the optimizer; false: the module's own"},
)
