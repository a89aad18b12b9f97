"""MindSpore's own files (``.ckpt``): reads where their tensors lie, and lays out files as mindspore.save_checkpoint does.

A file is one protobuf message without header or index: for each parameter a record of its name, sizes, type and raw bytes, for one of
more than `SLICE` bytes several that repeat all but the bytes; and, if asked for, a checksum. Facts: checkpoint.proto and
train/serialization.py of mindspore 2.10.0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.formats import Contents, Extent, FileLayout, Source
from streamconv.formats.container import Beginning, Container, Names
from streamconv.formats.files import (
    countable,
    damaged,
    lfs_pointer,
    opened,
    read_bytes,
    short,
    show,
)
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.selection import Selection, find_files, gather
from streamconv.storage.folder import File, Location, read_each

KIND = Names(
    "a MindSpore checkpoint",
    (".ckpt",),
    "model",
    (r"[^/]*\.ckpt", r".*/[^./][^/]*\.ckpt"),
    others=r".*strategy[^/]*\.ckpt",
    folders=r"rank_\d+",
    asked_for=("model.ckpt",),
)
SLICE = 512 << 20  # bytes of a tensor in one record

_TYPES = {
    name: name.lower()
    for name in (
        "Bool", "Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float16", "BFloat16", "Float32", "Float64",
        "Complex64",
    )
}  # fmt: skip
_CODE_OF = {dtype: name for name, dtype in _TYPES.items() if dtype != "complex64"}  # which MindSpore writes and cannot load
_STRING = "str"
_CIPHER = b"\x5e\x3a\x7f"  # after a byte that says which
_ENCRYPTED = tuple(bytes([kind]) + _CIPHER for kind in b"\xd8\xd9\xda")  # AES-GCM, AES-CBC, SM4-CBC
_CHECKSUM = 17  # bytes at the end of a file that has one: crc_num, and the number in ten bytes
_MAX_AXES = 64  # torch's and numpy's own limit
_MAX_TYPE = 64
_MAX_NAMES = 1 << 28  # bytes of names and numbers in a file: over a million records
_WINDOW = 4096
_SMALL = 64  # bytes: what ranks may repeat, such as the step and the loss scale
_Table = dict[str, Source]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    """A field of a message: its number and kind, where it begins, and where its value begins and ends."""

    number: int
    kind: int
    at: int
    start: int
    stop: int


class _Record(NamedTuple):
    name: str
    at: int
    shape: tuple[int, ...]
    code: str
    start: int
    stop: int


# Protobuf --------------------------------------------------------------------------------------------------------


class _Wire:
    """A message in a file, of which nothing is read but what is asked for."""

    def __init__(self, path: Location, file: File) -> None:
        self.path, self._file = path, file
        self._window, self._start = b"", 0
        self._left = _MAX_NAMES

    def take(self, start: int, nbytes: int) -> bytes:
        if start < self._start or start + nbytes > self._start + len(self._window):
            self._window, self._start = self._file.pread(max(nbytes, _WINDOW), start), start
        return self._window[start - self._start : start - self._start + nbytes]

    def spend(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            raise damaged(self.path, f"it has more fields, or longer names, than can be listed ({_MAX_NAMES} bytes)")

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """A number, below 2**64, and where it ends."""
        self.spend(8)
        value = 0
        for k, byte in enumerate(self.take(at, min(10, stop - at))):
            value |= (byte & 0x7F) << 7 * k
            if byte < 0x80 and value < 1 << 64:
                return value, at + k + 1
        raise damaged(self.path, f"byte {at}: a number that does not end by byte {min(at + 10, stop)}")

    def text(self, field: _Field, most: int = _MAX_NAMES) -> str:
        nbytes = field.stop - field.start
        if nbytes > most:
            raise damaged(self.path, f"byte {field.at}: a text of {nbytes} bytes, at most {most} are read")
        self.spend(nbytes)
        raw = self.take(field.start, nbytes)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"byte {field.start + error.start}: a text that is not UTF-8: {raw[:64]!r}") from error

    def fields(self, start: int, stop: int) -> Iterator[_Field]:
        """The fields of the message in these bytes."""
        at = start
        while at < stop:
            key, value_at = self.varint(at, stop)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                _, end = self.varint(value_at, stop)
            elif kind == _BYTES:
                nbytes, value_at = self.varint(value_at, stop)
                end = value_at + nbytes
            else:
                end = value_at + {_FIXED64: 8, _FIXED32: 4}.get(kind, stop)
            if not number or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
                raise damaged(self.path, f"byte {at}: no field of a message can start with {self.take(at, 8)!r}")
            if end > stop:
                raise damaged(self.path, f"byte {at}: field {number} ends at byte {end}, what it is part of at {stop}")
            yield _Field(number, kind, at, value_at, end)
            at = end


def _records(wire: _Wire, stop: int) -> Iterator[_Record]:
    """The records of a file up to ``stop``; what is unknown is skipped, as all readers of protobuf do."""
    for outer in wire.fields(0, stop):
        if (outer.number, outer.kind) != (1, _BYTES):
            continue
        parts = {}
        for field in wire.fields(outer.start, outer.stop):
            if field.number < 4 and field.kind == _BYTES:
                parts[field.number] = field
        name = wire.text(parts[1]) if 1 in parts else ""
        if 2 in parts:
            yield _record(wire, name, outer.at, parts[2])
        elif 3 in parts:
            what = f"byte {outer.at}: parameter {short.repr(name)}: a hash table, which is not read"
            raise FormatError(f"{show(wire.path)}: {what}: write the file without it")
        else:
            raise damaged(wire.path, f"byte {outer.at}: it has no tensor", name)


def _record(wire: _Wire, name: str, at: int, tensor: _Field) -> _Record:
    """A tensor's record. Its sizes are a field each, or several are packed into one; a single 0 stands for none."""
    sizes: list[int] = []
    code = content = None
    for field in wire.fields(tensor.start, tensor.stop):
        position = field.start
        while field.number == 1 and field.kind in (_VARINT, _BYTES) and position < field.stop:
            size, position = wire.varint(position, field.stop)
            sizes.append(size)
            if len(sizes) > _MAX_AXES:
                raise damaged(wire.path, f"byte {field.at}: it has more than {_MAX_AXES} sizes", name)
        if field.number == 2 and field.kind == _BYTES:
            code = wire.text(field, _MAX_TYPE)
        elif field.number == 3 and field.kind == _BYTES:
            content = field
    if code is None or content is None:
        raise damaged(wire.path, f"byte {tensor.at}: it has no {'data' if code else 'type'}", name)
    if not countable(sizes):
        raise damaged(wire.path, f"byte {tensor.at}: its shape {short.repr(sizes)} has 2**63 elements or more", name)
    return _Record(name, at, () if sizes == [0] else tuple(sizes), code, content.start, content.stop)


# Reading ---------------------------------------------------------------------------------------------------------


def _read_file(path: Location) -> tuple[_Table, list[str]]:
    """The tensors of a file in its order, and the names of what else is there."""
    with opened(path, KIND.noun) as file:
        size, wire = file.size, _Wire(path, file)
        _check_head(path, wire.take(0, 8))
        tail = wire.take(max(0, size - _CHECKSUM), _CHECKSUM)
        has_checksum = len(tail) == _CHECKSUM and tail.startswith(b"crc_num")
        entries, left_out = _tensors(wire, size - _CHECKSUM if has_checksum else size)
    if not entries:
        raise FormatError(f"{show(path)}: no tensor in its {size} bytes, only {short.repr(left_out)}: give another file")
    return entries, left_out


def _check_head(path: Location, head: bytes) -> None:
    """Refuses other things of this name by theirs."""
    if head == b"version ":
        raise lfs_pointer(path)
    if head.startswith(b"PK\3\4"):
        raise FormatError(f"{show(path)}: a file that torch.save wrote, not MindSpore: give it a name that ends in .pt")
    if head.startswith(_ENCRYPTED):
        raise FormatError(
            f"{show(path)}: encrypted (enc_key of mindspore.save_checkpoint): write it plain, "
            "with mindspore.load_checkpoint(..., dec_key=...) and mindspore.save_checkpoint"
        )
    if head and not head.startswith((b"\n", b"crc_num")):
        raise damaged(path, f"byte 0: it starts with {head!r}, a MindSpore checkpoint with a newline (the key of a record)")


def _tensors(wire: _Wire, stop: int) -> tuple[_Table, list[str]]:
    entries: _Table = {}
    left_out: dict[str, None] = {}
    for name, group in itertools.groupby(_records(wire, stop), key=lambda record: record.name):
        slices = list(group)
        first = slices[0]
        if name in entries or name in left_out:
            raise damaged(wire.path, f"byte {first.at}: it is there for the second time", name)
        other = next((record for record in slices if (record.shape, record.code) != (first.shape, first.code)), None)
        if other:
            raise damaged(
                wire.path, f"byte {other.at}: {other.code}{[*other.shape]} goes on what began as {first.code}{[*first.shape]}", name
            )
        if first.code == _STRING:
            left_out[name] = None
            continue
        if first.code not in _TYPES:
            raise FormatError(
                f"{show(wire.path)}: byte {first.at}: tensor {short.repr(name)}: of type {short.repr(first.code)}, "
                f"read are {', '.join(_TYPES)}: write the file without it"
            )
        spec = TensorSpec(DTYPES[_TYPES[first.code]], first.shape)
        nbytes = sum(record.stop - record.start for record in slices)
        if nbytes != spec.nbytes:
            raise damaged(wire.path, f"byte {first.at}: {spec} needs {spec.nbytes} bytes, its {len(slices)} records hold {nbytes}", name)
        entries[name] = Source(spec, tuple(Extent(str(wire.path), record.start, record.stop - record.start) for record in slices))
    return entries, list(left_out)


def recognizes(beginning: Beginning) -> bool:
    """Whether a file begins with a record of a name and a tensor; a graph of TensorFlow has an operation's name in its place."""
    head = beginning.head
    if head.startswith(b"crc_num") or head[1:4] == _CIPHER:
        return True
    at = _after_length(head, 0, b"\n")
    if at is None or (name := _after_length(head, at, b"\n")) is None:
        return False
    stop = name + head[at + 1]
    tensor = _after_length(head, stop, b"\x12")
    return tensor is not None and head[tensor : tensor + 1] in (b"\x08", b"\n", b"\x12", b"\x1a")


def _after_length(head: bytes, at: int, key: bytes) -> int | None:
    """Where the value of a field begins, if such a field stands there."""
    if head[at : at + 1] != key:
        return None
    at += 1
    while at < len(head) and head[at] >= 0x80:
        at += 1
    return at + 1 if at < len(head) else None


def read(
    path: Location, *, by_rank: bool = False, files: Sequence[str] | Selection | None = None, explain: Explain = unexplained
) -> Contents:
    """The contents of a file, or of a directory: ``model.ckpt``, else all its ``.ckpt`` files, else those in its ``rank_N`` folders.

    Args:
        path: a ``.ckpt`` file or a directory.
        by_rank: present each tensor as ``<file>/<name>``, for files of ranks, which repeat names.
        files: names of the files of the directory to read, in this order, instead of looking for them.
        explain: see `check_index`.

    Raises:
        FormatError: damaged, hostile or encrypted files; a tensor in two files (but for a few equal bytes) without ``by_rank``.
        UsageError: the path is not there or cannot be read.
    """
    selection = find_files(path, KIND, files, by_rank=by_rank)
    tables, left_out = {}, []
    for name, (table, others) in zip(selection.files, read_each(selection.files.values(), KIND.noun, _read_file), strict=True):
        tables[name] = dict(table)
        left_out += [f"{name}/{other}" if by_rank else other for other in others]
    if not by_rank:
        _leave_out_repeated(path, selection.files, tables)
    contents = gather("mindspore", path, selection, tables, by_rank=by_rank, explain=explain)
    if left_out:
        contents.notes.append(f"{len(left_out)} values that are not tensors are left out: {short.repr(left_out)[1:-1]}")
    return contents


def _leave_out_repeated(path: Location, files: Mapping[str, Location], tables: Mapping[str, _Table]) -> None:
    """Takes small tensors that several files repeat, with the same bytes, out of all but the first.

    Raises:
        FormatError: a larger tensor is in several files, or the bytes differ.
    """
    first_file: dict[str, str] = {}
    for file, table in tables.items():
        repeated = [name for name in table if first_file.setdefault(name, file) != file]
        for name in repeated:
            first = first_file[name]
            if _small_bytes(files[first], tables[first][name]) != _small_bytes(files[file], table.pop(name)):
                raise FormatError(
                    f"{show(path)}: tensor {short.repr(name)} is in both {short.repr(first)} and {short.repr(file)}: slices or copies "
                    "that a parallel strategy made, or two steps of one training, which are not put together: merge slices with "
                    "mindspore.transform_checkpoints, or give the path of one file"
                )


def _small_bytes(file: Location, source: Source) -> tuple[object, ...]:
    """What equal small tensors have in common, and no others."""
    if source.spec.nbytes > _SMALL:
        return source.extents
    raw = [read_bytes(file, extent.offset, extent.nbytes, KIND.noun)[0] for extent in source.extents]
    return source.spec, b"".join(raw)


# Writing ---------------------------------------------------------------------------------------------------------


def lay_out(
    specs: Mapping[str, TensorSpec],
    *,
    max_shard_size: int | None = None,  # noqa: ARG001 - MindSpore knows no shards
    file: str | None = None,
) -> list[FileLayout]:
    """The one file of a checkpoint; filled, it is byte for byte what MindSpore saves of these tensors, in this order.

    (MindSpore saves nothing of a tensor without elements; here it is a record that MindSpore loads.)

    Args:
        specs: the tensors, in tensor order.
        max_shard_size: of no effect: there is one file, and each tensor is in it.
        file: its name.

    Raises:
        UsageError: a dtype, a shape or a name that MindSpore could not load.
    """
    position, literals, slots, pieces = 0, [], {}, {}
    for name, spec in specs.items():
        places = []
        for start in range(0, spec.nbytes or 1, SLICE):
            nbytes = min(SLICE, spec.nbytes - start)
            head = _head(name, spec, nbytes)
            literals.append((position, head))
            places.append((position + len(head), nbytes))
            position += len(head) + nbytes
        slots[name] = places[0][0]
        if len(places) > 1:
            pieces[name] = tuple(places)
    return [FileLayout(file or KIND.single, position, tuple(literals), slots, pieces=pieces)]


def _head(name: str, spec: TensorSpec, nbytes: int) -> bytes:
    """All of a record but the ``nbytes`` bytes of the tensor that end it."""
    code = _CODE_OF.get(spec.dtype.name)
    if code is None or spec.shape == (0,):
        what = f"{spec} from a .ckpt: {'leave it out' if code else 'cast it or leave it out'}"
        raise UsageError(f"tensor {short.repr(name)}: MindSpore cannot load {what}")
    try:
        tag = name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a name holds {error.object[error.start]!r}, which UTF-8 cannot store: rename it") from error
    head = b"".join(b"\x08" + _varint(size) for size in spec.shape) + _bytes_field(2, code.encode(), 0) + _bytes_field(3, b"", nbytes)
    return _bytes_field(1, _bytes_field(1, tag, 0) + _bytes_field(2, head, nbytes), nbytes)


def _bytes_field(number: int, start: bytes, nbytes: int) -> bytes:
    """A field of bytes: these, and ``nbytes`` more."""
    return bytes([number << 3 | _BYTES]) + _varint(len(start) + nbytes) + start


def _varint(value: int) -> bytes:
    raw = bytearray()
    while value > 0x7F:
        raw.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*raw, value])


CONTAINER = Container(
    name="mindspore", summary="MindSpore's .ckpt", names=KIND, read=read, lay_out=lay_out, recognizes=recognizes, ties="copied"
)
