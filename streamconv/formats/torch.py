"""PyTorch's own files (``.bin``, ``.pt``, ``.pth``): reads where their tensors lie, and lays out files as torch.save does.

A file is an uncompressed zip: a pickle that describes the tensors, and one entry of raw bytes for each storage. Before
torch 1.6 it was a row of pickles followed by the storages. The pickle is read by a machine that builds inert records
from a fixed table of names: it imports nothing, calls nothing that the file names, and reading does not need torch.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from streamconv.dtypes import DTYPES, DType, TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import Contents, Extent, FileLayout, Source
from streamconv.formats import safetensors as sibling

SUFFIXES = (".bin", ".pt", ".pth")
SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
MAX_EXTENTS = 4096  # runs of one strided tensor; each is a read of its own

_MAX_PICKLE = 256 << 20
_MAX_READS = 1 << 24  # of a pickle: about 300000 tensors; each read can make one object
_MAX_DIRECTORY = 64 << 20  # a zip's directory: about 700000 storages
_MAX_NAMES = 1 << 27
_MAGIC = 0x1950A86A20F9469CFC6C
_OTHERS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)(_\d+)?\.(pt|bin)|rng_state.*\.pth")
_CHOICES = (r"pytorch_model.*\.bin", r"consolidated.*\.pth", r".*\.pth", r".*\.pt", r".*\.bin")
_SHARD = re.compile(r"(?P<stem>.*)-\d+-of-(?P<total>\d+)\.(bin|pt|pth)", re.DOTALL)
_short, _show = sibling._short, sibling._show


@dataclass(slots=True)
class TorchContents(Contents):
    """A table of contents, the key below which the tensors were found ('' for none), and names of what else is there."""

    root: str = ""
    left_out: list[str] = field(default_factory=list)


# The pickle ------------------------------------------------------------------------------------------------------

_UTILS = "torch._utils._rebuild_"
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip
_FOREIGN = {"complex128": 128, "complex32": 32, "qint8": 8, "quint8": 8, "qint32": 32, "quint4x2": 8, "quint2x4": 8, "float4_e2m1fn_x2": 8}
_TYPES = {name: dtype for name, dtype in DTYPES.items() if dtype.bits >= 8} | {name: DType(name, bits) for name, bits in _FOREIGN.items()}
_STORAGE_TYPES = {f"{module}.{kind}Storage": _TYPES[name] for kind, name in _STORAGES.items() for module in ("torch", "torch.cuda")}
_STORAGE_TYPES["torch.storage.UntypedStorage"] = _TYPES["uint8"]
_DENSE = {f"{_UTILS}tensor", f"{_UTILS}tensor_v2", f"{_UTILS}tensor_v3"}
_WRAPPED = {f"{_UTILS}parameter", f"{_UTILS}parameter_with_state", "torch.nn.parameter.Parameter"}
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_ODD = "qtensor sparse_tensor meta_tensor_no_storage nested_tensor wrapper_subclass device_tensor_from_numpy device_tensor_from_cpu_tensor"
_ODD_TENSORS = {_UTILS + name for name in _ODD.split()}
_VALUES = {"collections.Counter", "torch.device", "torch.serialization._get_layout", "_codecs.encode"}
_VALUES |= {"builtins.bytearray", "builtins.set", "builtins.complex", "torch.per_tensor_affine", "torch.per_tensor_symmetric"}
_VALUES |= {f"torch.per_channel_{kind}" for kind in ("affine", "symmetric", "affine_float_qparams")}
GLOBALS = {"collections.OrderedDict", "torch.Size", "torch.Tensor", _FROM_TYPE, *(f"torch.{name}" for name in _TYPES)}
GLOBALS |= _VALUES | _ODD_TENSORS | _WRAPPED | _DENSE | _STORAGE_TYPES.keys()
_OPCODES = b"\x80.c(N\x88\x89]})tu\x85\x86\x87KMJ\x8aGUXQhjqrseba\x81R"  # what torch's weights_only loading knows
_ATOMS = {str, int, float, bool, bytes, type(None)}
_NAMES = {str, int}


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle mentions. It is not looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Odd:
    """What a call would have made, were it made: a value, or a tensor that is not plain bytes."""

    maker: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: DType
    shift: int = 0  # bytes from the storage's start, for the views of old files


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    lazy: bool  # conjugated or negated when it is read, not in the file


_Storages = dict[str, tuple[int, DType]]  # key -> elements, and of which type


class _Refused(Exception):
    """What a pickle asks for and does not get."""


class _Window:
    """A file of which an unpickler may read so much and no more."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file, self.left, self.reads = file, _MAX_PICKLE, _MAX_READS

    def read(self, count: int) -> bytes:
        self.left -= count
        self.spend(1)
        if len(data := self.file.read(count)) < count:
            raise EOFError
        return data

    def spend(self, objects: int) -> None:
        self.reads -= objects
        if self.left < 0 or self.reads < 0:
            raise _Refused(f"it takes more than {_MAX_PICKLE} bytes or {_MAX_READS} steps")

    def readline(self) -> bytes:
        return self.file.readline(1024)


class _Unpickler(pickle._Unpickler):
    """Builds dicts, lists, tuples, atoms and the records above; everything else is refused."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}

    def __init__(self, window: _Window, storages: _Storages) -> None:
        super().__init__(window, encoding="utf-8", errors="surrogateescape")
        self.window, self.storages = window, storages

    def find_class(self, module: str, name: str) -> _Global:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in GLOBALS:
            raise _Refused(f"it asks for {_short.repr(full)[1:-1]}, which no tensor needs; nothing of it was run")
        return _Global(full)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel, *view = pid
        dtype = _STORAGE_TYPES.get(storage.name) if type(storage) is _Global else None
        if kind != "storage" or dtype is None or type(numel) is not int or numel < 0 or type(key) not in _NAMES:
            raise _Refused(f"it describes a storage as {_short.repr(pid)}")
        known, first = self.storages.setdefault(str(key), (numel, dtype))
        if known * first.itemsize != numel * dtype.itemsize:
            raise _Refused(f"it gives storage {_short.repr(key)} two sizes, {known} {first} and {numel} {dtype}")
        shift = view[0][1] if view and view[0] else 0
        if type(shift) is not int or shift < 0:
            raise _Refused(f"it describes a storage as {_short.repr(pid)}")
        return _Storage(str(key), dtype, shift * dtype.itemsize)

    def _call(self, made: Any, args: Any) -> Any:
        """What stands for the result of a call."""
        if type(made) is not _Global or type(args) is not tuple:
            raise _Refused(f"it calls {_short.repr(made)}")
        name = made.name
        if name == _FROM_TYPE:
            plain = args[1].name in _WRAPPED | {"torch.Tensor"}
            return self._call(args[0], args[2]) if plain else _Odd(args[1].name)
        if name in _DENSE:
            return self._tensor(args, version=name)
        if name in _WRAPPED:
            return args[0]
        if name == "torch.Size":
            self.window.spend(len(args[0]))
            return tuple(args[0])
        if name == "collections.OrderedDict":
            self.window.spend(len(args[0]) if args else 0)
            return {_key(key): value for key, value in (args[0] if args else ())}
        if name in _VALUES or name in _ODD_TENSORS:
            return _Odd(name)
        raise _Refused(f"it calls {name}, which no tensor needs; nothing of it was run")

    def _tensor(self, args: tuple[Any, ...], version: str) -> _Tensor:
        storage, offset, shape, stride = args[:4]
        third = version == f"{_UTILS}tensor_v3"
        dtype = _TYPES[args[6].name.removeprefix("torch.")] if third else storage.dtype
        metadata = args[7:8] if third else args[6:7]
        self.window.spend(len(shape) + len(stride))
        sizes = (offset, *shape, *stride)
        if type(storage) is not _Storage or {*map(type, sizes)} != {int} or min(sizes) < 0 or len(shape) != len(stride):
            raise _Refused(f"it describes a tensor as {_short.repr(args)}")
        lazy = any(facts.get("conj") or facts.get("neg") for facts in metadata if facts)
        return _Tensor(storage, dtype, offset, tuple(shape), tuple(stride), lazy)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _build(self) -> None:
        self.stack.pop()  # attributes of what was made: none of them is a tensor's data

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._fill(items[::2], items[1::2])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key], [value])

    def _fill(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            target.update(zip(map(_key, keys), values, strict=True))
        elif type(target) is not _Odd:
            raise _Refused(f"it puts items into {_short.repr(target)}")

    dispatch |= {b"R"[0]: _reduce, b"\x81"[0]: _reduce, b"b"[0]: _build, b"u"[0]: _set_items, b"s"[0]: _set_item}


def _key(key: Any) -> Any:
    """A dict's key: nothing whose hash could be made deep."""
    if type(key) in _ATOMS or (type(key) is tuple and _ATOMS.issuperset(map(type, key))):
        return key
    raise _Refused(f"it has a dict whose key is a {type(key).__name__}")


def _unpickle(path: Path, window: _Window, storages: _Storages) -> Any:
    try:
        return _Unpickler(window, storages).load()
    except _Refused as error:
        raise FormatError(f"{_show(path)}: its pickle is refused: {error}; do not load this file unless you trust who made it") from error
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        problem = f"its pickle is not one that weights_only loading can read: {type(error).__name__} {_short.repr(str(error))}"
        raise sibling._damaged(path, problem) from error


# Files -----------------------------------------------------------------------------------------------------------


class _BoundedFile(io.FileIO):
    """A file whose zip directory cannot make zipfile read as much as it likes."""

    def read(self, count: int | None = -1) -> bytes:
        if count is None or count < 0:
            count = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if count > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {count} bytes; at most {_MAX_DIRECTORY} are read")
        return super().read(count)


_Places = dict[str, tuple[int, int]]  # entry of a zip, or key of a storage -> start, nbytes


def _zip_records(path: Path, file: _BoundedFile) -> tuple[_Places, list[zipfile.ZipInfo], int]:
    """Where each entry's bytes lie, the entries in the order of the directory, and where that starts."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos, limit = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, ArithmeticError, struct.error, OSError) as error:
        raise sibling._damaged(path, f"its zip directory cannot be read: {_short.repr(str(error))}") from error
    records: _Places = {}
    folder = infos[0].filename.partition("/")[0] if infos else ""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = f"zip entry {_short.repr(info.filename)}"
        name = info.filename.removeprefix(f"{folder}/")
        if name == info.filename or name in records or ".." in PurePosixPath(name).parts:
            raise sibling._damaged(path, f"{entry} is there twice or outside the folder {_short.repr(folder)}")
        if info.compress_type or info.flag_bits & 0x41 or info.compress_size != info.file_size:
            raise FormatError(f"{_show(path)}: {entry} is compressed or encrypted, torch.save stores it plain: {_rewrite(path)}")
        header = os.pread(file.fileno(), 30, info.header_offset) if 0 <= info.header_offset < limit else b""
        if len(header) < 30 or header[:4] != b"PK\3\4" or info.header_offset < end or not (records or info.header_offset == 0):
            raise sibling._damaged(path, f"{entry} does not start at byte {info.header_offset}, as the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:]))
        end = start + info.file_size
        said = os.pread(file.fileno(), start - info.header_offset - 30, info.header_offset + 30)
        if end > limit or not said.startswith(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")):
            raise sibling._damaged(
                path, f"{entry} of {info.file_size} bytes from byte {start} does not lie inside the {limit} bytes of data"
            )
        records[name] = (start, info.file_size)
    return records, infos, limit


def _open_zip(path: Path, file: _BoundedFile) -> tuple[Any, _Places]:
    """What the pickle describes, and where each storage lies."""
    records, _, _ = _zip_records(path, file)
    if "constants.pkl" in records:
        code = f"import torch; torch.save(torch.jit.load({str(path)!r}).state_dict(), {_new(path)!r})"
        raise FormatError(f"{_show(path)}: a TorchScript program; take its tensors, if you trust it, with: python -c {shlex.quote(code)}")
    start, size = records.get("data.pkl", (0, -1))
    if size < 0 or size > _MAX_PICKLE:
        raise sibling._damaged(path, f"expected a data.pkl of at most {_MAX_PICKLE} bytes in the zip, found {max(size, 0)}")
    at, length = records.get("byteorder", (0, 0))
    if length and (order := os.pread(file.fileno(), min(length, 16), at)) != b"little":
        raise FormatError(f"{_show(path)}: its byte order is {order!r}, only little-endian files are read: {_rewrite(path)}")
    storages: _Storages = {}
    tree = _unpickle(path, _Window(io.BytesIO(os.pread(file.fileno(), size, start))), storages)
    places = {}
    for key, (count, dtype) in storages.items():
        nbytes = count * dtype.itemsize
        places[key] = records.get(f"data/{key}", (0, -1))
        if places[key][1] != nbytes:
            found = f"has {places[key][1]}" if places[key][1] >= 0 else "is not there"
            raise sibling._damaged(path, f"storage {_short.repr(key)} takes {nbytes} bytes, its zip entry {found}")
    return tree, places


def _open_legacy(path: Path, file: _BoundedFile, size: int) -> tuple[Any, _Places]:
    """The same of a file from before torch 1.6: five pickles, then for each storage its count of elements and its bytes."""
    reader = io.BufferedReader(file)
    storages: _Storages = {}
    window = _Window(reader)
    magic, _, system, tree, keys = (_unpickle(path, window, storages) for _ in range(5))
    listed = type(keys) is list and _NAMES.issuperset(map(type, keys)) and len(keys) == len(storages)
    if magic != _MAGIC or not listed or {*map(str, keys)} != storages.keys():
        raise sibling._damaged(path, f"its list of storages is not that of its {len(storages)} storages: {_short.repr(keys)}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise FormatError(f"{_show(path)}: it is not little-endian, and only such files are read: {_rewrite(path)}")
    places, position = {}, reader.tell()
    reader.detach()
    for key in map(str, keys):
        raw = os.pread(file.fileno(), 8, position)
        count, dtype = storages[key]
        places[key] = (position + 8, count * dtype.itemsize)
        position = sum(places[key])
        if position > size or int.from_bytes(raw, "little") != count:
            found = f"the file of {size} bytes says {int.from_bytes(raw, 'little')} elements"
            raise sibling._damaged(path, f"storage {_short.repr(key)}, {count} of {dtype}, should end at {position}; {found}")
    return tree, places


def _open(path: Path) -> tuple[Any, _Places]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would wait for its writer
            raise FormatError(f"{_show(path)}: not a regular file; expected one that torch.save wrote: give the path of one")
        with _BoundedFile(path) as file:
            head, size = os.pread(file.fileno(), 512, 0), os.fstat(file.fileno()).st_size
            if head.startswith(b"PK\3\4"):
                return _open_zip(path, file)
            if head[2:4] == b"\x8a\x0a" and head[4:14] == _MAGIC.to_bytes(10, "little"):
                return _open_legacy(path, file, size)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(f"{_show(path)}: a Git LFS pointer, not the file it stands for: fetch that, for instance with git lfs pull")
    if head[257:262] == b"ustar":
        raise FormatError(f"{_show(path)}: torch's tar format from before 2017, which weights_only refuses: {_rewrite(path, safe=False)}")
    raise sibling._damaged(path, f"it has {size} bytes and is neither a zip nor torch's older format: it starts with {head[:8]!r}")


# Tensors ---------------------------------------------------------------------------------------------------------


def _find_root(path: Path, tree: Any, root: str | None) -> tuple[Any, str, list[str]]:
    """The part of the tree that holds the tensors, the key it stands under, and the keys beside it."""
    if root is None:
        outer = tree if type(tree) is dict and not any(type(value) is _Tensor for value in tree.values()) else {}
        root = next((key for key in WRAPPERS if type(outer.get(key)) is dict and _holds_tensors(path, outer[key])), "")
    beside: list[str] = []
    keys = [root] if type(tree) is dict and root in tree else root.split(".") if root else []
    for depth, key in enumerate(keys):
        if type(tree) is not dict or key not in tree:
            known = _short.repr([str(key) for key in tree] if type(tree) is dict else type(tree).__name__)
            raise UsageError(f"{_show(path)}: no key {_short.repr(key)} of root {_short.repr(root)}, found {known}: give one of those")
        beside += [".".join([*keys[:depth], str(other)]) for other in tree if other != key]
        tree = tree[key]
    return tree, root, beside


def _leaves(path: Path, tree: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and what they stand for, in order; a list of plain values counts as one."""
    left, waiting = _MAX_NAMES, [("", tree)]
    while waiting:
        name, node = waiting.pop()
        many = type(node) in (dict, list, tuple)
        left -= len(node) if many else 0
        if not many or (type(node) is not dict and _ATOMS.issuperset(map(type, node))):
            yield name, node
            continue
        pairs = node.items() if type(node) is dict else enumerate(node)
        below = [(f"{name}.{key}" if name else str(key), value) for key, value in pairs]
        left -= sum(len(key) + 64 for key, _ in below)
        if left < 0:
            raise sibling._damaged(path, "its dicts and lists contain themselves or more than can be listed")
        waiting += reversed(below)


def _holds_tensors(path: Path, tree: Any) -> bool:
    return any(type(leaf) is _Tensor for _, leaf in _leaves(path, tree))


def _source(path: Path, name: str, tensor: _Tensor, place: tuple[int, int], root: str) -> Source:
    """Where a tensor's elements lie, in row-major order."""
    dtype, (start, nbytes) = tensor.dtype, place
    if dtype.name not in DTYPES or tensor.lazy:
        what = "conjugated or negated lazily" if dtype.name in DTYPES else f"of type {dtype.name}"
        raise FormatError(f"{_show(path)}: tensor {_short.repr(name)}: it is {what}, which is not read: write the file without it")
    if not sibling._countable(list(tensor.shape)):
        raise sibling._damaged(path, f"its shape {_short.repr(tensor.shape)} has 2**63 elements or more", name)
    spec, offset = TensorSpec(dtype, tensor.shape), tensor.storage.shift + tensor.offset * dtype.itemsize
    if not spec.numel:
        return Source(spec, (Extent(str(path), start, 0),))
    axes = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride, strict=True) if size > 1]
    end = offset + (sum((size - 1) * stride for size, stride in axes) + 1) * dtype.itemsize
    if end > nbytes:
        problem = f"{spec} of strides {_short.repr(tensor.stride)} ends at byte {end} of a storage of {nbytes}"
        raise sibling._damaged(path, problem, name)
    run = 1
    while axes and axes[-1][1] == run:
        run *= axes.pop()[0]
    if spec.numel // run > MAX_EXTENTS:
        tensors = f"d[{root!r}]" if root else "d"
        raise FormatError(
            f"{_show(path)}: tensor {_short.repr(name)}: {spec} lies in {spec.numel // run} pieces, at most {MAX_EXTENTS} are read: "
            + _rewrite(path, f"{{k: v.contiguous() if torch.is_tensor(v) else v for k, v in {tensors}.items()}}")
        )
    pieces = [(start + offset + first * dtype.itemsize, run * dtype.itemsize) for first in _starts(axes)]
    return Source(spec, tuple(Extent(str(path), *piece) for piece in _join(pieces)))


def _starts(axes: list[tuple[int, int]]) -> list[int]:
    starts = [0]
    for size, stride in axes:
        starts = [first + step * stride for first in starts for step in range(size)]
    return starts


def _join(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces that follow each other become one."""
    joined = pieces[:1]
    for start, nbytes in pieces[1:]:
        if sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + nbytes)
        else:
            joined.append((start, nbytes))
    return joined


def _read_file(path: Path, root: str | None) -> tuple[dict[str, Source], str, list[str]]:
    """The tensors of one file in the order of their offsets, the root they were found under, and what is left out."""
    whole, places = _open(path)
    tree, root, left_out = _find_root(path, whole, root)
    entries: dict[str, Source] = {}
    for name, leaf in _leaves(path, tree):
        if type(leaf) is _Odd and leaf.maker not in _VALUES:
            raise FormatError(f"{_show(path)}: tensor {_short.repr(name)}: made by {leaf.maker}, not plain data: write the file without it")
        if type(leaf) is not _Tensor:
            left_out.append(f"{root}.{name}" if root else name)
            continue
        if not name or name in entries:
            problem = f"two tensors are named {_short.repr(name)}" if name else "it holds one tensor without a name"
            raise FormatError(f"{_show(path)}: {problem}: save a dict of differently named tensors")
        entries[name] = _source(path, name, leaf, places[leaf.storage.key], root)
    if not entries:
        raise FormatError(f"{_show(path)}: no tensor below root {root!r}, only {_short.repr(left_out)}: give another file or root")
    sibling._check_unicode(path, entries)
    return dict(sorted(entries.items(), key=lambda item: item[1].extents[0].offset)), root, left_out


# Directories -----------------------------------------------------------------------------------------------------


def read(path: Path, *, by_rank: bool = False, root: str | None = None, files: Sequence[str] | None = None) -> TorchContents:
    """The contents of a file, or of a directory by its index, else ``pytorch_model*.bin``, else its ``.pth``, ``.pt`` or ``.bin``.

    Args:
        path: a file that torch.save wrote, or a directory.
        by_rank: present each tensor as ``<file>/<name>``, for files of ranks, which repeat names.
        root: the key (dotted, if it lies deeper) of the dict of tensors, '' for the whole; by default one of `WRAPPERS` if it is
            there, holds tensors, and none stand beside it.
        files: names of the files of the directory to read, in this order, instead of looking for them.

    Raises:
        FormatError: damaged, hostile, incomplete or contradictory files; a tensor in two files without ``by_rank``.
        UsageError: the path or the root is not there or cannot be read.
    """
    path = path.absolute()
    index: Path | None = None
    weight_map: dict[str, str] = {}
    if path.is_dir():
        names = sibling._list_directory(path)
        if files is None and (index := _find_index(path, names)):
            weight_map = _read_index(index)
            files = list(dict.fromkeys(weight_map.values()))
            files = sorted(files) if all(map(_SHARD.fullmatch, files)) else files
        paths = {name: path / name for name in (_choose_files(path, names) if files is None else files)}
        sibling._check_present(index or path, paths)
    else:
        paths = {path.name: path}
    tables, left_out, found = {}, [], ""
    for name, file in paths.items():
        tables[name], where, others = _read_file(file, root)
        found = found or where
        left_out += [f"{name}/{other}" if by_rank else other for other in others]
    if index:
        sibling._check_index(index, weight_map, tables)
    entries = sibling._merge(path, tables, by_rank=by_rank)
    contents = TorchContents("torch", entries, list(paths.values()), [index] if index else [])
    contents.root, contents.left_out = found, left_out
    return contents


def ties(contents: Contents) -> dict[str, str]:
    """For tensors that are one and the same data, the names to leave out and for each the one that stays.

    The first in alphabetical order stays, as with the safetensors library and huggingface_hub.
    """
    kept: dict[tuple[TensorSpec, tuple[Extent, ...]], str] = {}
    tied = {}
    for name in sorted(contents.entries):
        source = contents.entries[name]
        first = kept.setdefault((source.spec, source.extents), name) if source.spec.nbytes else name
        if first != name:
            tied[name] = first
    return tied


def _find_index(directory: Path, names: list[str]) -> Path | None:
    found = [name for name in names if name.endswith(tuple(f"{suffix}.index.json" for suffix in SUFFIXES))]
    if len(found) > 1 and INDEX not in found:
        raise FormatError(f"{_show(directory)}: several indexes, {_short.repr(found)}, none of them {INDEX}: keep the one that counts")
    return directory / (INDEX if INDEX in found else found[0]) if found else None


def _read_index(path: Path) -> dict[str, str]:
    raw, size = sibling._read_bytes(path, 0, sibling._MAX_JSON)
    if size > sibling._MAX_JSON:
        raise sibling._damaged(path, f"it has {size} bytes, an index at most {sibling._MAX_JSON}")
    weight_map = sibling._parse_object(path, raw, "text").get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise sibling._damaged(path, f"it must have a weight_map of tensor names to file names, found {_short.repr(weight_map)}")
    for name, shard in weight_map.items():
        plain = type(shard) is str and str(PurePosixPath(shard)) == shard and not shard.startswith("/") and ".." not in shard.split("/")
        if not plain or not shard.endswith(SUFFIXES) or "\\" in shard or "\0" in shard:
            raise sibling._damaged(path, f"expected a file below this directory, found {_short.repr(shard)}", name)
    return weight_map


def _choose_files(directory: Path, names: list[str]) -> list[str]:
    """The weight files of a directory without an index."""
    if SINGLE in names:
        return [SINGLE]
    names = [name for name in names if not _OTHERS.fullmatch(name)]
    for choice in _CHOICES:
        if found := [name for name in names if re.fullmatch(choice, name)]:
            break
    else:
        raise FormatError(f"{_show(directory)}: none of *{', *'.join(SUFFIXES)} in it: give the path of a checkpoint")
    for match in filter(None, map(_SHARD.fullmatch, found)):
        count = sum(name.startswith(f"{match['stem']}-") for name in found)
        if count < int(match["total"]):
            raise FormatError(
                f"{_show(directory)}: {count} of the {int(match['total'])} files {match['stem']!r}-* are there: download the others"
            )
    return found


# Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checksum:
    """What can be written only when ``nbytes`` bytes at ``start`` of a file are there.

    ``crc32``: the CRC-32 of these bytes, little-endian, goes to each of ``positions``. ``torch-id``: the second half of these
    bytes becomes torch's hash of the file's CRC-32s (twenty digits), from ``seed`` over those of all ``crc32`` entries in
    order to the known ones in ``tail``; then the CRC-32 of these bytes goes to ``positions``, too. See `patches`.
    """

    kind: str
    start: int
    nbytes: int
    positions: tuple[int, ...]
    seed: int = 0
    tail: tuple[int, ...] = ()
    prefix: bytes = b""


def _combine(seed: int, crc: int) -> int:
    """c10::hash_combine, in 64 bits."""
    return seed ^ ((crc + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & (1 << 64) - 1)


def patches(checksums: Sequence[Checksum], crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """What to write where, given the CRC-32 of the bytes of each ``crc32`` entry, in order."""
    values = iter(crcs)
    for checksum in checksums:
        if checksum.kind == "crc32":
            crc = next(values)
        else:
            seed = checksum.seed
            for crc in (*crcs, *checksum.tail):
                seed = _combine(seed, crc)
            text = checksum.prefix + b"%020d" % seed
            yield checksum.start, text
            crc = zlib.crc32(text)
        for position in checksum.positions:
            yield position, crc.to_bytes(4, "little")


def lay_out(specs: Mapping[str, TensorSpec], **options: Any) -> list[FileLayout]:
    """The layouts of `lay_out_with_checksums`, which takes the same arguments, without the checksums, which torch does not check."""
    return [layout for layout, _ in lay_out_with_checksums(specs, **options)]


def lay_out_with_checksums(
    specs: Mapping[str, TensorSpec],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int | None,
    file: str | None = None,
    tied: Mapping[str, str] | None = None,
    root: str | None = None,
    stem: str = "pytorch_model",
) -> list[tuple[FileLayout, tuple[Checksum, ...]]]:
    """The files of a checkpoint, with paths relative to it, and the checksums to write into each; the index, if any, comes last.

    Filled and patched, a file is byte for byte what torch.save makes of a dict of these names and contiguous tensors.

    Args:
        specs: the tensors, in tensor order.
        metadata: goes into the index; the files themselves have no place for it.
        max_shard_size: as huggingface_hub counts it: tied tensors once, all in the file of the first.
        file: the name of the one file to make, whatever its size.
        tied: names that share the storage of another, and its name; they have no slot. Those not among ``specs`` come last.
        root: the (dotted) key to put the dict of tensors under.
        stem: how the file names start.

    Raises:
        UsageError: a dtype that torch does not have, a tie that does not fit, or no room to lay the file out.
    """
    groups = _group(specs, tied or {})
    everything = dict(specs) | {name: specs[kept] for kept, names in groups.items() for name in names if name not in specs}
    sizes = {names[0]: specs[kept].nbytes for kept, names in groups.items()}
    others = {names[0]: names[1:] for names in groups.values()}
    shards = {file: list(everything)} if file else {}
    for name, firsts in () if file else sibling.split_into_shards(sizes, max_shard_size, stem).items():
        shards[name.removesuffix(sibling.SUFFIX) + SUFFIXES[0]] = firsts + [other for first in firsts for other in others[first]]
    layouts = [_lay_out_file(path, {name: everything[name] for name in names}, tied or {}, root) for path, names in shards.items()]
    if len(shards) > 1:
        totals = {"total_size": sum(sizes.values()), "total_parameters": sum(specs[kept].numel for kept in groups)}
        index = {"metadata": dict(metadata) | totals, "weight_map": {name: path for path, names in shards.items() for name in names}}
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        layouts.append((FileLayout(f"{stem}{SUFFIXES[0]}.index.json", len(text), ((0, text),), {}), ()))
    return layouts


def _group(specs: Mapping[str, TensorSpec], tied: Mapping[str, str]) -> dict[str, list[str]]:
    """Each tensor that has a storage, and all names of it in tensor order."""
    groups: dict[str, list[str]] = {}
    for name in (*specs, *(name for name in tied if name not in specs)):
        kept = tied.get(name, name)
        if kept not in specs or kept in tied or specs.get(name, specs[kept]) != specs[kept]:
            raise UsageError(f"tensor {_short.repr(name)} cannot be tied to {_short.repr(kept)}: give one of the same dtype and shape")
        groups.setdefault(kept, []).append(name)
    return groups


def _lay_out_file(
    path: str, specs: Mapping[str, TensorSpec], tied: Mapping[str, str], root: str | None
) -> tuple[FileLayout, tuple[Checksum, ...]]:
    with tempfile.TemporaryDirectory(prefix="streamconv-") as folder:
        name = PurePosixPath(path).name
        skeleton = Path(folder, "out", name if name.isascii() else "archive")  # the file's stem is the zip's folder, if torch can say it
        skeleton.parent.mkdir()
        try:
            kept = _save_without_data(skeleton, Path(folder, "data"), specs, tied, root)
            with _BoundedFile(skeleton) as file:
                places, infos, limit = _zip_records(skeleton, file)
                size = os.fstat(file.fileno()).st_size
                slots = {name: places[f"data/{number}"][0] for number, name in enumerate(kept)}
                filled = sorted((slots[name], specs[name].nbytes) for name in kept if specs[name].nbytes)
                gaps = zip([0, *map(sum, filled)], [*(start for start, _ in filled), size], strict=True)
                literals = tuple((start, os.pread(file.fileno(), end - start, start)) for start, end in gaps)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{path}: its {sum(spec.nbytes for spec in specs.values())} bytes cannot be laid out as a sparse file in {folder}: "
                f"{_short.repr(str(error))}; set TMPDIR to a directory where such files can be"
            ) from error
    directory = literals[-1][1][limit - literals[-1][0] :]
    return FileLayout(path, size, literals, slots), _checksums(directory, limit, places, infos, literals[-1])


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
            raise UsageError(f"tensor {_short.repr(name)}: torch has no type for {spec.dtype.name}: cast it or leave it out")
        tensors[name] = torch.empty(0, dtype=dtype).set_(storages[tied.get(name, name)], 0, spec.shape, _strides(spec.shape))
    for key in reversed(root.split(".") if root else []):
        tensors = {key: tensors}
    with torch.serialization.skip_data():
        torch.save(tensors, target)
    return names


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Those of a contiguous tensor, as torch counts them."""
    return [math.prod(size or 1 for size in shape[axis + 1 :]) for axis in range(len(shape))]


def _checksums(directory: bytes, limit: int, places: _Places, infos: list[zipfile.ZipInfo], end: tuple[int, bytes]) -> tuple[Checksum, ...]:
    """Where torch.save puts what depends on data: behind it, in the zip's directory, and in the hash of all CRCs."""
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
            prefix = end[1][start - end[0] :][: nbytes - 20]
            checksums.append(Checksum("torch-id", start, nbytes, positions, seed, tuple(tail), prefix))
        elif checksums:
            tail.append(info.CRC)
        else:
            seed = _combine(seed, info.CRC)
    return tuple(checksums)


# Messages --------------------------------------------------------------------------------------------------------


def _new(path: Path) -> str:
    return str(path.with_name(f"{path.stem}.new{path.suffix}"))


def _rewrite(path: Path, change: str = "d", *, safe: bool = True) -> str:
    """The one command that makes a file which can be read."""
    code = f"import torch; d = torch.load({str(path)!r}, weights_only={safe}); torch.save({change}, {_new(path)!r})"
    return f"rewrite it{'' if safe else ', if you trust who made it,'} with: python -c {shlex.quote(code)}"


def _unreadable(path: Path, error: OSError | ValueError) -> StreamconvError:
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UsageError(f"{_show(path)}: no such file or directory: give the path of a file that torch.save wrote or a directory of them")
    reason = (isinstance(error, OSError) and error.strerror) or _short.repr(str(error))
    return UsageError(f"{_show(path)}: cannot be read: {reason}; make it readable or give another path")
