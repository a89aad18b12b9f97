"""PyTorch's own files (``.bin``, ``.pt``, ``.pth``): reads where their tensors lie, and lays out files as torch.save does.

A file is an uncompressed zip: a pickle that describes the tensors, and one entry of raw bytes for each storage. Before
torch 1.6 it was a row of pickles followed by the storages. Reading does not need torch (see `pickles`); laying out does.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from streamconv.digests import Checksum, combine, places_of
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.extras import require
from streamconv.formats import AnyNode, Contents, Extent, FileLayout, Source, torchscript
from streamconv.formats.container import Beginning, Container, Names
from streamconv.formats.files import (
    Table,
    check_unicode,
    countable,
    damaged,
    index_layout,
    index_name,
    lfs_pointer,
    merge,
    opened,
    short,
    show,
    split_into_shards,
    variant_stem,
)
from streamconv.formats.foreign import foreign, reads
from streamconv.formats.indexes import Explain, check_index, unexplained
from streamconv.formats.pickles import MAGIC, NAMES, Sharded, Storages, Tensor, is_legacy, unpickle
from streamconv.formats.roots import Weights, count_tensors, describe, describe_pickle, find_weights, kinds, maker_of, note_root
from streamconv.formats.selection import Selection, find_files
from streamconv.formats.unpickling import Budget
from streamconv.formats.zips import (
    MAX_DIRECTORY,
    Archive,
    FileRange,
    find_program,
    first_entry,
    is_zip,
    names,
    open_section,
    read_archive,
    rezip,
)
from streamconv.graph.node import extents
from streamconv.graph.views import span, stored_view
from streamconv.interrupts import Unwinding
from streamconv.storage.folder import File, Location, read_each
from streamconv.storage.local import LocalFile, LocalFolder
from streamconv.storage.staging import staging

KIND = Names(
    "a file that torch.save wrote",
    (".bin", ".pt", ".pth"),
    "pytorch_model",
    (r"pytorch_model.*\.bin", r"consolidated.*\.pth", r".*\.(pth|pt|bin)"),
    r"training_args\.bin|(optimizer|scheduler|scaler|sampler)(_\d+)?\.(pt|bin)|rng_state.*\.pth|random_states_\d+\.pkl",
    libraries=(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",  # of transformers
        "diffusion_pytorch_model.bin.index.json",
        "diffusion_pytorch_model.bin",  # of diffusers
        "adapter_model.bin",  # of PEFT
    ),
    weights=(  # .bin is anything
        "*.pth", "*.pt", "pytorch_model*.bin", "adapter_model*.bin", "consolidated*.bin", "diffusion_pytorch_model*.bin",
        "open_clip_pytorch_model*.bin", "pytorch_lora_weights*.bin", "*.bin.index.json", "*.pt.index.json", "*.pth.index.json",
        "*.bin.index.*.json",
    ),
    stems={
        "transformers": "pytorch_model",
        "diffusers": "diffusion_pytorch_model",
        "diffusers-lora": "pytorch_lora_weights",
        "diffusers-embeds": "learned_embeds",
        "peft": "adapter_model",
        "open_clip": "open_clip_pytorch_model",
    },
    originals="consolidated",
    asked_for=("pytorch_model.bin.index.json", "pytorch_model.bin", "consolidated.00.pth", "consolidated.pth"),
    series=(("consolidated.", ".pth"), ("consolidated.", ".pt")),
    ranks=(
        r"consolidated\.(?P<rank>\d{1,5})(?P<set>\.(?:pth|pt))",  # of Meta
        r"mp_rank_(?P<rank>\d{1,5})(?P<set>_model_states)?\.pt",  # of DeepSpeed
    ),
    rank_folder=r"(?:mp|tp)_rank_(?P<rank>\d{1,5})(?P<set>(?:_\w*\d+)?)",  # Megatron's: what follows is the stage of its pipeline
    rank_files=("model_optim_rng.pt", "model_rng.pt", "model_states.pt"),
)  # fmt: skip
INDEX = KIND.index
MAX_REPEATED = 1 << 40  # bytes that a view makes of fewer stored ones

MAX_PICKLE = 256 << 20  # bytes of a pickle that is compressed
_MAX_LISTED = 64 << 20  # bytes of a zip whose entries are looked at to tell what it is
_ENTRY = re.compile(r"\.data|\.format_version|\.storage_alignment|byteorder|code|constants\.pkl|data|data\.pkl|extra|version")
_TAR = {"pickle", "storages", "sys_info", "tensors"}


@dataclass(slots=True)
class TorchContents(Contents):
    """A table of contents, the key below which the tensors were found ('' for none), and names of what else is there."""

    root: str = ""
    left_out: list[str] = field(default_factory=list)


# Files -----------------------------------------------------------------------------------------------------------


def recognizes(beginning: Beginning) -> bool:
    """Whether a file begins as those of torch.save do; a tar from before 2017, of which the reader says what to do, is one, too."""
    head = beginning.head
    if is_zip(head):
        return _is_ours(beginning.path, first_entry(beginning.file, head))
    is_tar = head[257:262] == b"ustar" and head[:100].partition(b"\0")[0].decode("latin-1").rstrip("/") in _TAR
    return is_legacy(head) or is_tar


def _is_ours(path: Location, first: str) -> bool:
    """Whether a zip with such a first entry is torch's, or may be for all that can be seen: what is wrong in it says the reader."""
    inside = first.split("/")
    if find_program(first):
        return False
    if len(inside) > 1 and _ENTRY.fullmatch(inside[1]):
        return True
    if path.local is None or path.size > _MAX_LISTED:
        return True
    try:
        with zipfile.ZipFile(path.local) as archive:
            return any(name.endswith(("/data.pkl", "/constants.pkl")) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError):
        return True  # such as one that ends early


Places = dict[str, tuple[int, int]]
"""Of each storage of a file, by its key, where it starts and how many bytes it has."""


def open_item(path: Location, file: File, start: int, nbytes: int) -> tuple[Any, Places]:
    """`open_tree` of a zip that lies in a range of an open file."""
    tree, places = _open_zip(path, FileRange(file, start, nbytes))
    return tree, {key: (start + first, size) for key, (first, size) in places.items()}


def _open_zip(path: Location, file: File) -> tuple[Any, Places]:
    """What the pickle describes, and where each storage lies."""
    archive = read_archive(path, file)
    storages: Storages = {}
    tree = unpickle(path, archive.open("data.pkl", MAX_PICKLE), storages, Budget())
    scripted = "constants.pkl" in archive.entries
    if "byteorder" in archive.entries and (order := archive.read("byteorder", 16)) != b"little":
        raise FormatError(f"{show(path)}: its byte order is {order!r}, only little-endian files are read: {_rewrite(path, safe=False)}")
    places = {}
    for key, (count, dtype) in storages.items():
        entry, nbytes = archive.entries.get(f"data/{key}"), count * dtype.itemsize
        if entry and entry.deflated:
            raise FormatError(f"{show(path)}: storage {short.repr(key)} is compressed, torch.save stores it plain: {rezip(path)}")
        if not entry or entry.nbytes != nbytes:
            actual = f"has {entry.nbytes}" if entry else "is not there"
            raise damaged(path, f"storage {short.repr(key)} takes {nbytes} bytes, its zip entry {actual}")
        places[key] = (entry.start, nbytes)
    return (torchscript.as_module(archive, tree) if scripted else tree), places


def _open_legacy(path: Location, file: File, size: int) -> tuple[Any, Places]:
    """The same of a file from before torch 1.6: five pickles, then for each storage its count of elements and its bytes."""
    reader = open_section(file, 0, size)
    storages: Storages = {}
    budget = Budget()
    magic, _, system, tree, keys = (unpickle(path, reader, storages, budget) for _ in range(5))
    matches = type(keys) is list and NAMES.issuperset(map(type, keys)) and len(keys) == len(storages)
    if magic != MAGIC or not matches or {*map(str, keys)} != storages.keys():
        raise damaged(path, f"its list of storages is not that of its {len(storages)} storages: {short.repr(keys)}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise FormatError(f"{show(path)}: it is not little-endian, and only such files are read: {_rewrite(path, safe=False)}")
    places, position = {}, reader.tell()
    last = len(keys) if file.is_remote else 1  # there, each look takes a request, and the last tells of all before
    for number, key in enumerate(map(str, keys), 1):
        count, dtype = storages[key]
        raw = file.pread(8, position) if number >= last else count.to_bytes(8, "little")
        places[key] = (position + 8, count * dtype.itemsize)
        position = sum(places[key])
        if position > size or int.from_bytes(raw, "little") != count:
            actual = f"the file of {size} bytes says {int.from_bytes(raw, 'little')} elements"
            raise damaged(path, f"storage {short.repr(key)}, {count} of {dtype}, should end at {position}; {actual}")
    return tree, places


def open_tree(path: Location) -> tuple[Any, Places]:
    """What a file's pickle describes, and where each of its storages lies.

    Raises:
        FormatError: it is damaged, or no file that torch.save wrote.
        UsageError: it cannot be read.
    """
    with opened(path, KIND.noun) as file:
        head, size = file.pread(512, 0), file.size
        if is_zip(head):
            return _open_zip(path, file)
        if is_legacy(head):
            return _open_legacy(path, file, size)
        if head[:1] == b"\x80":
            raise foreign(path, describe_pickle(path, file, size), "pickle")
    if head.startswith(b"version https://git-lfs"):
        raise lfs_pointer(path)
    if head[257:262] == b"ustar":
        raise FormatError(f"{show(path)}: torch's tar format from before 2017, which weights_only refuses: {_rewrite(path, safe=False)}")
    what = f"it has {size} bytes and is neither a zip nor torch's older format: it starts with {head[:8]!r}"
    raise FormatError(f"{show(path)}: {what}; {reads()}: if torch.save wrote it, it is damaged: download it again")


# Tensors ---------------------------------------------------------------------------------------------------------


def locate_tensor(path: Location, name: str, tensor: Tensor, places: Places) -> AnyNode:
    """Where a tensor's elements lie, by the places of the file's storages.

    Raises:
        FormatError: not in its storage, or it is of a kind that is not read.
    """
    dtype, (start, nbytes) = tensor.dtype, places[tensor.storage.key]
    if dtype.name not in DTYPES or tensor.lazy:
        what = "conjugated or negated lazily" if dtype.name in DTYPES else f"of type {dtype.name}"
        raise FormatError(f"{show(path)}: tensor {short.repr(name)}: it is {what}, which is not read: write the file without it")
    if not countable([*tensor.shape, dtype.itemsize]):
        raise damaged(path, f"its shape {short.repr(tensor.shape)} has 2**63 bytes or more", name)
    spec, offset = TensorSpec(dtype, tensor.shape), tensor.storage.shift + tensor.offset * dtype.itemsize
    if not spec.numel:
        return Source(spec, (Extent(str(path), start, 0),))
    end = offset + span(tensor.shape, tensor.stride) * dtype.itemsize
    if end > nbytes:
        raise damaged(path, f"{spec}, strides {short.repr(tensor.stride)}, ends at byte {end} of a storage of {nbytes}", name)
    if spec.nbytes > max(MAX_REPEATED, nbytes):
        problem = f"a view that repeats {nbytes} stored bytes until it has {spec.nbytes}, of at most {MAX_REPEATED}: save what it repeats"
        raise FormatError(f"{show(path)}: tensor {short.repr(name)}: {problem}")
    return stored_view(spec, tensor.stride, str(path), start + offset)


def pick_tensors(path: Location, weights: Weights) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The tensors among weights, whole or parts of ranks, and what else there is, with its keys.

    Raises:
        FormatError: one that is not plain data, that has no name, or that of another one.
    """
    named: dict[str, Any] = {}
    others: list[tuple[str, Any]] = []
    for name, leaf in weights.named:
        if type(leaf) not in (Tensor, Sharded):
            maker = maker_of(leaf)
            if maker is not None:
                raise FormatError(f"{show(path)}: tensor {short.repr(name)}: made by {maker}, not plain data: write the file without it")
            others.append((".".join([*weights.keys, name]), leaf))
            continue
        if not name or name in named:
            problem = f"two tensors are named {short.repr(name)}" if name else "it holds one tensor without a name"
            raise FormatError(f"{show(path)}: {problem}: save a dict of differently named tensors")
        named[name] = leaf
    return named, others


@dataclass(frozen=True, slots=True)
class _Read:
    """What one file gives: tensors in the order of their offsets, the root they were found under, and what is left out."""

    entries: Table
    root: str
    left_out: list[str]
    kinds: list[str]  # classes of objects among it
    tensors: int  # that are among it


def _read_file(path: Location, root: str | None) -> _Read:
    """The tensors of one file: those under a root, or where the weights are."""
    whole, places = open_tree(path)
    weights = find_weights(path, whole, root)
    named, skipped = pick_tensors(path, weights)
    part = next((name for name, leaf in named.items() if type(leaf) is Sharded), None)
    if part is not None:
        raise FormatError(f"{show(path)}: {short.repr(part)} is one rank's part of a tensor: give the folder with the files of all ranks")
    entries: Table = {name: locate_tensor(path, name, leaf, places) for name, leaf in named.items()}
    if not entries:
        raise FormatError(f"{show(path)}: no tensor below root {weights.root!r}, found {describe(weights.tree)}: give another file or root")
    check_unicode(path, entries)
    entries = dict(sorted(entries.items(), key=lambda item: next(extents(item[1])).offset))
    left_out = [*weights.left_out, *skipped]
    parts = [part for _, part in left_out]
    return _Read(entries, weights.root, [name for name, _ in left_out], kinds(parts), count_tensors(parts))


# Directories -----------------------------------------------------------------------------------------------------


def read(
    path: Location,
    *,
    by_rank: bool = False,
    root: str | None = None,
    files: Sequence[str] | Selection | None = None,
    explain: Explain = unexplained,
) -> TorchContents:
    """The contents of a file, of the files that an index names, or of a directory, in the order of the libraries: see `selection`.

    Args:
        path: a file that torch.save wrote, an index or a directory.
        by_rank: present each tensor as ``<file>/<name>``, for files of ranks, which repeat names.
        root: the key (dotted, if it lies deeper) of the dict of tensors, '' for the whole; by default where the weights are (`roots`).
        files: names of the files of the directory to read, in this order, instead of looking for them.
        explain: see `check_index`.

    Raises:
        FormatError: damaged, hostile, incomplete or contradictory files; a tensor in two files without ``by_rank``.
        UsageError: the path or the root is not there or cannot be read.
    """
    selection = find_files(path, KIND, files, by_rank=by_rank)
    each = read_each(selection.files.values(), (KIND.noun, root), lambda file: _read_file(file, root))
    all_read = dict(zip(selection.files, each, strict=True))
    tables = {name: one.entries for name, one in all_read.items()}
    below = next(filter(None, (one.root for one in all_read.values())), "")
    left_out = []
    for name, one in all_read.items():
        left_out += [f"{name}/{other}" if by_rank else other for other in one.left_out]
    notes = list(selection.notes)
    if selection.index:
        notes += check_index(selection.index, selection.weight_map, tables, explain)
    entries = merge(path, tables, by_rank=by_rank)
    contents = TorchContents("torch", entries, list(selection.files.values()), [selection.index] if selection.index else [], notes=notes)
    contents.root, contents.left_out = below, left_out
    contents.notes += note_root(below)
    if left_out:
        contents.notes.append(_left_out_note(left_out, all_read.values()))
    return contents


def _left_out_note(left_out: list[str], files: Iterable[_Read]) -> str:
    kinds = sorted(set(itertools.chain.from_iterable(one.kinds for one in files)))
    count = sum(one.tensors for one in files)
    contents = [f"{count} tensors"] if count else []
    if kinds:
        line = ", ".join(short.repr(kind)[1:-1] for kind in kinds[:6])
        contents.append(f"objects of {line}{', ...' if len(kinds) > 6 else ''}")
    among = f"; among them {' and '.join(contents)}" if contents else ""
    return f"{len(left_out)} values that are not among these tensors are left out: {short.repr(left_out)[1:-1]}{among}"


# Writing ---------------------------------------------------------------------------------------------------------


def lay_out(
    specs: Mapping[str, TensorSpec],
    *,
    max_shard_size: int | None,
    file: str | None = None,
    tied: Mapping[str, str] | None = None,
    root: str | None = None,
    stem: str = KIND.stem,
    variant: str | None = None,
) -> list[FileLayout]:
    """The files of a checkpoint, with paths relative to it and with checksums; the index, if any, comes last.

    Filled and patched, a file is byte for byte what torch.save makes of a dict of these names and contiguous tensors.

    Args:
        specs: the tensors, in tensor order.
        max_shard_size: as huggingface_hub counts it: tied tensors once, all in the file of the first.
        file: the name of the one file to make, whatever its size.
        tied: names that share the storage of another, and its name; their slot is its. Those not among ``specs`` come last.
        root: the (dotted) key to put the dict of tensors under.
        stem: how the files' names start.
        variant: of which variant of the weights they say that they are, after the stem.

    Raises:
        UsageError: a dtype that torch does not have, a tie that does not fit, or no room to lay the file out.
    """
    groups = _group(specs, tied or {})
    everything = dict(specs)
    for owner, group in groups.items():
        everything |= {name: specs[owner] for name in group if name not in specs}
    if file:
        shards = {file: list(everything)}
    else:
        names_of = {names[0]: names for names in groups.values()}
        nbytes_of = {names[0]: specs[owner].nbytes for owner, names in groups.items()}
        shards = split_into_shards(nbytes_of, max_shard_size, variant_stem(stem, variant), KIND.suffixes[0])
        for shard in shards.values():
            for first in list(shard):
                shard.extend(names_of[first][1:])
    layouts = []
    for path, shard in shards.items():
        table = {name: everything[name] for name in shard}
        layouts.append(_lay_out_file(path, table, tied or {}, root))
    if len(shards) == 1:
        return layouts
    return [*layouts, index_layout(index_name(stem, KIND.suffixes[0], variant), shards, [specs[owner] for owner in groups])]


def _group(specs: Mapping[str, TensorSpec], tied: Mapping[str, str]) -> dict[str, list[str]]:
    """Each tensor that has a storage, and all names of it in tensor order."""
    groups: dict[str, list[str]] = {}
    for name in (*specs, *(name for name in tied if name not in specs)):
        owner = tied.get(name, name)
        if owner not in specs or owner in tied or specs.get(name, specs[owner]) != specs[owner]:
            raise UsageError(f"tensor {short.repr(name)} cannot be tied to {short.repr(owner)}: give one of the same dtype and shape")
        groups.setdefault(owner, []).append(name)
    return groups


def _lay_out_file(path: str, specs: Mapping[str, TensorSpec], tied: Mapping[str, str], root: str | None) -> FileLayout:
    require("torch", f"{path}: a file as torch.save writes it")  # ahead of the block: an exception amid an import does it no good
    with Unwinding(), staging() as folder:
        name = PurePosixPath(path).name
        skeleton = Path(folder, "out", name if name.isascii() else "archive")  # the file's stem is the zip's folder, if torch can say it
        skeleton.parent.mkdir()
        try:
            storages = _save_without_data(skeleton, folder / "data", specs, tied, root)
            with LocalFile(skeleton) as file:
                archive = read_archive(LocalFolder(skeleton.parent).file(skeleton.name), file)
                size = file.size
                ranges = {name: _place(archive, f"data/{number}") for number, name in enumerate(storages)}
                checksums = _checksums(archive)
                filling = sorted([*ranges.values(), *places_of(checksums)])
                gaps = zip([0, *map(sum, filling)], [*(start for start, _ in filling), size], strict=True)
                literals = tuple((start, file.pread(end - start, start)) for start, end in gaps if start < end)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{path}: its {sum(spec.nbytes for spec in specs.values())} bytes cannot be laid out as a sparse file in {folder}: "
                f"{short.repr(str(error))}; set TMPDIR to a directory where such files can be"
            ) from error
    slots = {name: ranges[tied.get(name, name)][0] for name in specs}
    return FileLayout(path, size, literals, slots, checksums)


def _save_without_data(target: Path, data: Path, specs: Mapping[str, TensorSpec], tied: Mapping[str, str], root: str | None) -> list[str]:
    """Saves tensors over a sparse file, all but their data; returns the names of the storages in the order of their keys."""
    import torch

    names = list(dict.fromkeys(tied.get(name, name) for name in specs))
    ends = list(itertools.accumulate(-(-specs[name].nbytes // 64) * 64 for name in names))
    whole = torch.UntypedStorage.from_file(str(data), True, ends[-1]) if ends and ends[-1] else None  # noqa: FBT003 - no keywords there
    storages = {}
    for name, end in zip(names, ends, strict=True):
        nbytes = specs[name].nbytes
        start = end - -(-nbytes // 64) * 64
        storages[name] = whole[start : start + nbytes] if whole is not None and nbytes else torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    tensors: dict[str, Any] = {}
    for name, spec in specs.items():
        dtype = getattr(torch, spec.dtype.name, None)
        if dtype is None:
            raise UsageError(f"tensor {short.repr(name)}: torch has no type for {spec.dtype.name}: cast it or leave it out")
        tensors[name] = torch.empty(0, dtype=dtype).set_(storages[tied.get(name, name)], 0, spec.shape, _strides(spec.shape))
    for key in reversed(root.split(".") if root else []):
        tensors = {key: tensors}
    with torch.serialization.skip_data():
        torch.save(tensors, target)
    return names


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Those of a contiguous tensor, as torch counts them."""
    return [math.prod(size or 1 for size in shape[axis + 1 :]) for axis in range(len(shape))]


def _place(archive: Archive, name: str) -> tuple[int, int]:
    return archive.entries[name].start, archive.entries[name].nbytes


def _checksums(archive: Archive) -> tuple[Checksum, ...]:
    """Where torch.save puts what depends on data: behind it, in the zip's directory, and in the hash of all CRCs.

    (A storage that itself starts with a data descriptor's mark would enter that hash twice; no reader looks at it.)
    """
    file, limit = archive.file, archive.limit
    directory = file.pread(MAX_DIRECTORY, limit)
    checksums: list[Checksum] = []
    tail: list[int] = []
    seed = position = 0
    for info in archive.infos:
        name = info.filename.partition("/")[2]
        start, nbytes = _place(archive, name)
        positions = (start + nbytes + 4, limit + position + 16)  # in the data descriptor, and in the directory
        position += 46 + sum(struct.unpack_from("<3H", directory, position + 28))
        if not nbytes:
            continue  # has no descriptor, and torch's hash passes over it
        if name.startswith("data/"):
            checksums.append(Checksum("crc32", start, nbytes, positions))
        elif name == ".data/serialization_id":
            prefix = file.pread(nbytes - 20, start)
            checksums.append(Checksum("torch-id", start, nbytes, positions, seed, tuple(tail), prefix))
        elif checksums:
            tail.append(info.CRC)
        else:
            seed = combine(seed, info.CRC)
    return tuple(checksums)


CONTAINER = Container(
    name="torch",
    summary="what torch.save wrote",
    names=KIND,
    read=read,
    lay_out=lay_out,
    recognizes=recognizes,
    ties="shared",
    takes=frozenset({"stem", "variant"}),
    nests=True,
)


# Messages --------------------------------------------------------------------------------------------------------


def _rewrite(path: Location, *, safe: bool = True) -> str:
    """The one command that makes a file which can be read."""
    old, new = names(path)
    code = f"import torch; d = torch.load({old!r}, weights_only={safe}); torch.save(d, {new!r})"
    first = "" if path.local else "download it and "
    return f"{first}rewrite it{'' if safe else ', if you trust who made it,'} with: python -c {shlex.quote(code)}"
