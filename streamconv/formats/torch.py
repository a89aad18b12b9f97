"""PyTorch's own files (``.bin``, ``.pt``, ``.pth``): reads where their tensors lie, and lays out files as torch.save does.

A file is an uncompressed zip: a pickle that describes the tensors, and one entry of raw bytes for each storage. Before
torch 1.6 it was a row of pickles followed by the storages. Reading does not need torch (see `pickles`); laying out does.
"""

from __future__ import annotations

import io
import itertools
import math
import shlex
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from streamconv.digests import Checksum, combine, places_of
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import AnyNode, Contents, Extent, FileLayout, Source
from streamconv.formats.files import (
    Explain,
    Names,
    Opened,
    PlainFile,
    Table,
    check_index,
    check_unicode,
    countable,
    damaged,
    index_layout,
    index_name,
    lfs_pointer,
    merge,
    opened,
    pread,
    short,
    show,
    size_of,
    split_into_shards,
    unexplained,
    variant_stem,
)
from streamconv.formats.foreign import READS
from streamconv.formats.pickles import ATOMS, MAX_PICKLE, NAMES, VALUES, Odd, Storages, Tensor, Window, unpickle
from streamconv.formats.selection import Selection, find_files
from streamconv.graph import extents
from streamconv.interrupts import Unwinding
from streamconv.staging import staging
from streamconv.storage.remote import Location, RemoteFile, RemotePath, read_each
from streamconv.views import span, stored_view

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
)
INDEX = KIND.index
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
MAX_REPEATED = 1 << 40  # bytes that a view makes of fewer stored ones

_MAX_DIRECTORY = 64 << 20  # a zip's directory: about 700000 storages
_MAX_NAMES = 1 << 27
_ALIGNMENT = 64  # bytes: what the start of each entry's data is a multiple of (torch.serialization.config.save.storage_alignment)
_MAX_PADDING = 64 << 10
_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(slots=True)
class TorchContents(Contents):
    """A table of contents, the key below which the tensors were found ('' for none), and names of what else is there."""

    root: str = ""
    left_out: list[str] = field(default_factory=list)


# Files -----------------------------------------------------------------------------------------------------------


class _Bounded:
    """A file whose zip directory cannot make zipfile read as much as it likes."""

    def __init__(self, file: Opened) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            count = max(0, size_of(self._file) - self.tell())
        if count > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {count} bytes; at most {_MAX_DIRECTORY} are read")
        return self._file.read(count)


_Places = dict[str, tuple[int, int]]  # entry of a zip, or key of a storage -> start, nbytes


def _zip_records(path: Location, file: Opened) -> tuple[_Places, list[zipfile.ZipInfo], int]:
    """Where each entry's bytes lie, the entries in the order of the directory, and where that starts."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            infos, limit = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, ArithmeticError, struct.error, OSError) as error:
        raise damaged(path, f"its zip directory cannot be read: {short.repr(str(error))}") from error
    records: _Places = {}
    folder = infos[0].filename.partition("/")[0] if infos else ""
    end = 0
    known = _aligned_starts(infos, limit) if isinstance(file, RemoteFile) else {}
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = f"zip entry {short.repr(info.filename)}"
        name = info.filename.removeprefix(f"{folder}/")
        if name == info.filename or name in records or ".." in PurePosixPath(name).parts:
            raise damaged(path, f"{entry} is there twice or outside the folder {short.repr(folder)}")
        if info.compress_type or info.flag_bits & 0x41 or info.compress_size != info.file_size:
            raise FormatError(f"{show(path)}: {entry} is compressed or encrypted, torch.save stores it plain: {_rewrite(path)}")
        if info.header_offset in known:
            end = known[info.header_offset] + info.file_size
            records[name] = (known[info.header_offset], info.file_size)
            continue
        header = pread(file, 30, info.header_offset) if 0 <= info.header_offset < limit else b""
        if len(header) < 30 or header[:4] != b"PK\3\4" or info.header_offset < end or not (records or info.header_offset == 0):
            raise damaged(path, f"{entry} does not start at byte {info.header_offset}, as the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:]))
        end = start + info.file_size
        said = pread(file, start - info.header_offset - 30, info.header_offset + 30)
        if end > limit or not said.startswith(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")):
            raise damaged(path, f"{entry} of {info.file_size} bytes at {start} does not lie inside the {limit} bytes of data")
        records[name] = (start, info.file_size)
    return records, infos, limit


def _aligned_starts(infos: list[zipfile.ZipInfo], limit: int) -> dict[int, int]:
    """Where the bytes of entries start, by where their headers do, without a look at each header, which would take a request.

    torch aligns them, and puts an entry's header right behind the bytes of the one before (and a descriptor, if it writes one): where that
    comes out for all entries, it is so. Nothing is said of the first and the last, whose headers are near what is read anyhow.
    """
    infos = sorted(infos, key=lambda info: info.header_offset)
    starts = {}
    for info, after in itertools.pairwise(infos[1:]):
        ends = [after.header_offset - size for size in ((16, 24) if info.flag_bits & 8 else (0,))]
        found = [end - info.file_size for end in ends if (end - info.file_size) % _ALIGNMENT == 0]
        least = info.header_offset + 30 + len(info.orig_filename.encode())
        if len(found) != 1 or not 0 <= found[0] - least < _MAX_PADDING or after.header_offset > limit:
            return {}
        starts[info.header_offset] = found[0]
    return starts


def _open_zip(path: Location, file: Opened) -> tuple[Any, _Places]:
    """What the pickle describes, and where each storage lies."""
    records, _, _ = _zip_records(path, file)
    if "constants.pkl" in records:
        old, new = _names(path)
        code = f"import torch; torch.save(torch.jit.load({old!r}).state_dict(), {new!r})"
        raise FormatError(f"{show(path)}: a TorchScript program; take its tensors, if you trust it, with: python -c {shlex.quote(code)}")
    start, size = records.get("data.pkl", (0, -1))
    if size < 0 or size > MAX_PICKLE:
        raise damaged(path, f"expected a data.pkl of at most {MAX_PICKLE} bytes in the zip, found {max(size, 0)}")
    at, length = records.get("byteorder", (0, 0))
    if length and (order := pread(file, min(length, 16), at)) != b"little":
        raise FormatError(f"{show(path)}: its byte order is {order!r}, only little-endian files are read: {_rewrite(path)}")
    storages: Storages = {}
    tree = unpickle(path, Window(io.BytesIO(pread(file, size, start))), storages)
    places = {}
    for key, (count, dtype) in storages.items():
        nbytes = count * dtype.itemsize
        places[key] = records.get(f"data/{key}", (0, -1))
        if places[key][1] != nbytes:
            found = f"has {places[key][1]}" if places[key][1] >= 0 else "is not there"
            raise damaged(path, f"storage {short.repr(key)} takes {nbytes} bytes, its zip entry {found}")
    return tree, places


def _open_legacy(path: Location, file: Opened, size: int) -> tuple[Any, _Places]:
    """The same of a file from before torch 1.6: five pickles, then for each storage its count of elements and its bytes."""
    reader = io.BufferedReader(file)
    storages: Storages = {}
    window = Window(reader)
    magic, _, system, tree, keys = (unpickle(path, window, storages) for _ in range(5))
    listed = type(keys) is list and NAMES.issuperset(map(type, keys)) and len(keys) == len(storages)
    if magic != _MAGIC or not listed or {*map(str, keys)} != storages.keys():
        raise damaged(path, f"its list of storages is not that of its {len(storages)} storages: {short.repr(keys)}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise FormatError(f"{show(path)}: it is not little-endian, and only such files are read: {_rewrite(path)}")
    places, position = {}, reader.tell()
    reader.detach()
    last = len(keys) if isinstance(file, RemoteFile) else 1  # there, each look takes a request, and the last tells of all before
    for number, key in enumerate(map(str, keys), 1):
        count, dtype = storages[key]
        raw = pread(file, 8, position) if number >= last else count.to_bytes(8, "little")
        places[key] = (position + 8, count * dtype.itemsize)
        position = sum(places[key])
        if position > size or int.from_bytes(raw, "little") != count:
            found = f"the file of {size} bytes says {int.from_bytes(raw, 'little')} elements"
            raise damaged(path, f"storage {short.repr(key)}, {count} of {dtype}, should end at {position}; {found}")
    return tree, places


def wrote(path: Location) -> bool:
    """Whether a file begins as those of torch.save do, whatever it is called."""
    try:
        with opened(path, KIND.noun) as file:
            head = file.read(14)
    except StreamconvError:
        return False  # reading it says what is wrong
    return head.startswith(b"PK\3\4") or head[4:14] == _MAGIC.to_bytes(10, "little")


def _open(path: Location) -> tuple[Any, _Places]:
    with opened(path, KIND.noun) as file:
        head, size = pread(file, 512, 0), size_of(file)
        if head.startswith(b"PK\3\4"):
            return _open_zip(path, file)
        if head[2:4] == b"\x8a\x0a" and head[4:14] == _MAGIC.to_bytes(10, "little"):
            return _open_legacy(path, file, size)
    if head.startswith(b"version https://git-lfs"):
        raise lfs_pointer(path)
    if head[257:262] == b"ustar":
        raise FormatError(f"{show(path)}: torch's tar format from before 2017, which weights_only refuses: {_rewrite(path, safe=False)}")
    what = f"it has {size} bytes and is neither a zip nor torch's older format: it starts with {head[:8]!r}"
    raise FormatError(f"{show(path)}: {what}; {READS}: if torch.save wrote it, it is damaged: download it again")


# Tensors ---------------------------------------------------------------------------------------------------------


def _find_root(path: Location, tree: Any, root: str | None) -> tuple[Any, str, list[str]]:
    """The part of the tree that holds the tensors, the key it stands under, and the keys beside it."""
    if root is None:
        outer = tree if type(tree) is dict and not any(type(value) is Tensor for value in tree.values()) else {}
        root = next((key for key in WRAPPERS if type(outer.get(key)) is dict and _holds_tensors(path, outer[key])), "")
    beside: list[str] = []
    keys = [root] if type(tree) is dict and root in tree else root.split(".") if root else []
    for depth, key in enumerate(keys):
        if type(tree) is not dict or key not in tree:
            known = short.repr([str(key) for key in tree] if type(tree) is dict else type(tree).__name__)
            raise UsageError(f"{show(path)}: no key {short.repr(key)} of root {short.repr(root)}, found {known}: give one of those")
        beside += [".".join([*keys[:depth], str(other)]) for other in tree if other != key]
        tree = tree[key]
    return tree, root, beside


def _leaves(path: Location, tree: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and what they stand for, in order; a list of plain values counts as one."""
    left, waiting = _MAX_NAMES, [("", tree)]
    while waiting:
        name, node = waiting.pop()
        many = type(node) in (dict, list, tuple)
        left -= len(node) if many else 0
        if not many or (type(node) is not dict and ATOMS.issuperset(map(type, node))):
            yield name, node
            continue
        pairs = node.items() if type(node) is dict else enumerate(node)
        below = [(f"{name}.{key}" if name else str(key), value) for key, value in pairs]
        left -= sum(len(key) + 64 for key, _ in below)
        if left < 0:
            raise damaged(path, "its dicts and lists contain themselves or more than can be listed")
        waiting += reversed(below)


def _holds_tensors(path: Location, tree: Any) -> bool:
    return any(type(leaf) is Tensor for _, leaf in _leaves(path, tree))


def _source(path: Location, name: str, tensor: Tensor, place: tuple[int, int]) -> AnyNode:
    """Where a tensor's elements lie."""
    dtype, (start, nbytes) = tensor.dtype, place
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
        raise damaged(path, f"it repeats what is stored in {nbytes} bytes to {spec.nbytes}, at most {MAX_REPEATED} are made", name)
    return stored_view(spec, tensor.stride, str(path), start + offset)


def _read_file(path: Location, root: str | None) -> tuple[Table, str, list[str]]:
    """The tensors of one file in the order of their offsets, the root they were found under, and what is left out."""
    whole, places = _open(path)
    tree, root, left_out = _find_root(path, whole, root)
    entries: Table = {}
    for name, leaf in _leaves(path, tree):
        if type(leaf) is Odd and leaf.maker not in VALUES:
            raise FormatError(f"{show(path)}: tensor {short.repr(name)}: made by {leaf.maker}, not plain data: write the file without it")
        if type(leaf) is not Tensor:
            left_out.append(f"{root}.{name}" if root else name)
            continue
        if not name or name in entries:
            problem = f"two tensors are named {short.repr(name)}" if name else "it holds one tensor without a name"
            raise FormatError(f"{show(path)}: {problem}: save a dict of differently named tensors")
        entries[name] = _source(path, name, leaf, places[leaf.storage.key])
    if not entries:
        raise FormatError(f"{show(path)}: no tensor below root {root!r}, only {short.repr(left_out)}: give another file or root")
    check_unicode(path, entries)
    return dict(sorted(entries.items(), key=lambda item: next(extents(item[1])).offset)), root, left_out


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
        root: the key (dotted, if it lies deeper) of the dict of tensors, '' for the whole; by default one of `WRAPPERS` if it is
            there, holds tensors, and none stand beside it.
        files: names of the files of the directory to read, in this order, instead of looking for them.
        explain: see `check_index`.

    Raises:
        FormatError: damaged, hostile, incomplete or contradictory files; a tensor in two files without ``by_rank``.
        UsageError: the path or the root is not there or cannot be read.
    """
    path = path.absolute()
    chosen = find_files(path, KIND, files, by_rank=by_rank)
    tables, left_out, found = {}, [], ""
    each = read_each(chosen.files.values(), (KIND.noun, root), lambda file: _read_file(file, root))
    for name, read_one in zip(chosen.files, each, strict=True):
        tables[name], where, others = read_one
        found = found or where
        left_out += [f"{name}/{other}" if by_rank else other for other in others]
    notes = list(chosen.notes)
    if chosen.index:
        notes += check_index(chosen.index, chosen.weight_map, tables, explain)
    entries = merge(path, tables, by_rank=by_rank)
    contents = TorchContents("torch", entries, list(chosen.files.values()), [chosen.index] if chosen.index else [], notes=notes)
    contents.root, contents.left_out = found, left_out
    if found:
        contents.notes.append(f"the tensors are those below {found!r} (--set root=KEY takes others, --set root= all)")
    if left_out:
        contents.notes.append(f"{len(left_out)} values that are not among these tensors are left out: {short.repr(left_out)[1:-1]}")
    return contents


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
    everything = dict(specs) | {name: specs[kept] for kept, names in groups.items() for name in names if name not in specs}
    if file:
        shards = {file: list(everything)}
    else:
        names_of = {names[0]: names for names in groups.values()}
        sizes = {names[0]: specs[kept].nbytes for kept, names in groups.items()}
        split = split_into_shards(sizes, max_shard_size, variant_stem(stem, variant), KIND.suffixes[0])
        shards = {path: firsts + [other for first in firsts for other in names_of[first][1:]] for path, firsts in split.items()}
    layouts = [_lay_out_file(path, {name: everything[name] for name in names}, tied or {}, root) for path, names in shards.items()]
    if len(shards) == 1:
        return layouts
    return [*layouts, index_layout(index_name(stem, KIND.suffixes[0], variant), shards, (specs[kept] for kept in groups))]


def _group(specs: Mapping[str, TensorSpec], tied: Mapping[str, str]) -> dict[str, list[str]]:
    """Each tensor that has a storage, and all names of it in tensor order."""
    groups: dict[str, list[str]] = {}
    for name in (*specs, *(name for name in tied if name not in specs)):
        kept = tied.get(name, name)
        if kept not in specs or kept in tied or specs.get(name, specs[kept]) != specs[kept]:
            raise UsageError(f"tensor {short.repr(name)} cannot be tied to {short.repr(kept)}: give one of the same dtype and shape")
        groups.setdefault(kept, []).append(name)
    return groups


def _lay_out_file(path: str, specs: Mapping[str, TensorSpec], tied: Mapping[str, str], root: str | None) -> FileLayout:
    import torch  # noqa: F401 - outside of the block: an import does not go well with an exception in the middle of it

    with Unwinding(), staging() as folder:
        name = PurePosixPath(path).name
        skeleton = Path(folder, "out", name if name.isascii() else "archive")  # the file's stem is the zip's folder, if torch can say it
        skeleton.parent.mkdir()
        try:
            kept = _save_without_data(skeleton, folder / "data", specs, tied, root)
            with PlainFile(skeleton) as file:
                places, infos, limit = _zip_records(skeleton, file)
                size = size_of(file)
                stored = {name: places[f"data/{number}"] for number, name in enumerate(kept)}
                checksums = _checksums(file, limit, places, infos)
                filled = sorted([*stored.values(), *places_of(checksums)])
                gaps = zip([0, *map(sum, filled)], [*(start for start, _ in filled), size], strict=True)
                literals = tuple((start, pread(file, end - start, start)) for start, end in gaps if start < end)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{path}: its {sum(spec.nbytes for spec in specs.values())} bytes cannot be laid out as a sparse file in {folder}: "
                f"{short.repr(str(error))}; set TMPDIR to a directory where such files can be"
            ) from error
    slots = {name: stored[tied.get(name, name)][0] for name in specs}
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


def _checksums(file: Opened, limit: int, places: _Places, infos: list[zipfile.ZipInfo]) -> tuple[Checksum, ...]:
    """Where torch.save puts what depends on data: behind it, in the zip's directory, and in the hash of all CRCs.

    (A storage that itself starts with a data descriptor's mark would enter that hash twice; no reader looks at it.)
    """
    directory = pread(file, _MAX_DIRECTORY, limit)
    checksums: list[Checksum] = []
    tail: list[int] = []
    seed = position = 0
    for info in infos:
        name = info.filename.partition("/")[2]
        start, nbytes = places[name]
        positions = (start + nbytes + 4, limit + position + 16)  # in the data descriptor, and in the directory
        position += 46 + sum(struct.unpack_from("<3H", directory, position + 28))
        if not nbytes:
            continue  # has no descriptor, and torch's hash passes over it
        if name.startswith("data/"):
            checksums.append(Checksum("crc32", start, nbytes, positions))
        elif name == ".data/serialization_id":
            prefix = pread(file, nbytes - 20, start)
            checksums.append(Checksum("torch-id", start, nbytes, positions, seed, tuple(tail), prefix))
        elif checksums:
            tail.append(info.CRC)
        else:
            seed = combine(seed, info.CRC)
    return tuple(checksums)


# Messages --------------------------------------------------------------------------------------------------------


def _rewrite(path: Location, *, safe: bool = True) -> str:
    """The one command that makes a file which can be read."""
    old, new = _names(path)
    code = f"import torch; d = torch.load({old!r}, weights_only={safe}); torch.save(d, {new!r})"
    first = "download it and " if isinstance(path, RemotePath) else ""
    return f"{first}rewrite it{'' if safe else ', if you trust who made it,'} with: python -c {shlex.quote(code)}"


def _names(path: Location) -> tuple[str, str]:
    """What a command calls the file, and the one that it makes of it."""
    old = path.name if isinstance(path, RemotePath) else str(path)
    return old, f"{old.removesuffix(path.suffix)}.new{path.suffix}"
