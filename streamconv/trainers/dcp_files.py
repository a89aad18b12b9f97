"""New files of torch's distributed checkpoints: zips of one tensor each, end to end, and the table that says where they lie.

Nothing of torch is needed: a tensor's zip and the table are pickles of few words, which are written here as protocol 2 has them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streamconv.digests import Checksum
from streamconv.dtypes import TensorSpec
from streamconv.errors import UsageError
from streamconv.formats import FileLayout
from streamconv.formats.files import short, split_into_shards
from streamconv.graph.moves import packed_strides

_ALIGNMENT = 64  # bytes, from the beginning of a zip, as torch has it
_WIDE = 0xFFFFFFFF  # what stands for a size that takes eight bytes, and for an offset
_STORAGES = {
    "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int32": "Int", "int16": "Short",
    "int8": "Char", "uint8": "Byte", "bool": "Bool", "complex64": "ComplexFloat",
}  # fmt: skip
_LATER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Types of torch whose storages are bytes to it."""
_TABLE = "torch.distributed.checkpoint.metadata"


# Pickles ---------------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _call(callee: bytes, *arguments: bytes) -> bytes:
    return callee + _tuple(*arguments) + b"R"


def _dict(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def _list(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _object(module: str, name: str, **attributes: bytes) -> bytes:
    return _name(module, name) + b")\x81" + _dict((_text(key), value) for key, value in attributes.items()) + b"b"


def _sizes(numbers: Iterable[int]) -> bytes:
    return _call(_name("torch", "Size"), _tuple(*map(_integer, numbers)))


def _pickle(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


_NONE, _FALSE = b"N", b"\x89"


def _tensor(spec: TensorSpec) -> bytes:
    """A pickle of a contiguous tensor over storage ``0``."""
    name = spec.dtype.name
    is_typed = name in _STORAGES
    kind = _name("torch", f"{_STORAGES[name]}Storage") if is_typed else _name("torch.storage", "UntypedStorage")
    count = spec.numel if is_typed else spec.nbytes
    storage = _tuple(_text("storage"), kind, _text("0"), _text("cpu"), _integer(count)) + b"Q"
    strides = packed_strides(tuple(size or 1 for size in spec.shape))
    hooks = _name("collections", "OrderedDict") + b")R"
    shape, steps = _tuple(*map(_integer, spec.shape)), _tuple(*map(_integer, strides))
    arguments = [storage, _integer(0), shape, steps, _FALSE, hooks, *([] if is_typed else [_name("torch", name)])]
    return _pickle(_call(_name("torch._utils", "_rebuild_tensor_v2" if is_typed else "_rebuild_tensor_v3"), *arguments))


# Zips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Zip:
    """A zip around a tensor's bytes: what comes before and behind them, and where their checksum goes, from its beginning on."""

    before: bytes
    behind: bytes
    checksums: tuple[int, ...]


def _wrap(spec: TensorSpec) -> _Zip:
    """The zip of one tensor."""
    entries = [("data.pkl", _tensor(spec)), ("byteorder", b"little"), ("version", b"3\n")]
    before, directory = b"", b""
    for name, data in entries:
        crc = zlib.crc32(data)
        directory += _directory_entry(name, crc, len(data), len(before))
        before += _header(name, crc, len(data), b"") + data
    start = len(before)
    name = "data/0"
    bare = len(_header(name, 0, spec.nbytes, b""))
    padding = -(start + bare + 4) % _ALIGNMENT
    filling = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    header = _header(name, 0, spec.nbytes, filling)
    places = (start + 14, len(before) + len(header) + spec.nbytes + len(directory) + 16)
    directory += _directory_entry(name, 0, spec.nbytes, start)
    before += header
    at = len(before) + spec.nbytes
    return _Zip(before, directory + _end(len(entries) + 1, len(directory), at), places)


def zip_of_dict() -> bytes:
    """What torch.save makes of an empty dict."""
    entries = [("data.pkl", _pickle(b"}")), ("byteorder", b"little"), ("version", b"3\n")]
    data = directory = b""
    for name, content in entries:
        crc = zlib.crc32(content)
        directory += _directory_entry(name, crc, len(content), len(data))
        data += _header(name, crc, len(content), b"") + content
    return data + directory + _end(len(entries), len(directory), len(data))


def _header(name: str, crc: int, nbytes: int, extra: bytes) -> bytes:
    raw = f"archive/{name}".encode()
    wide = nbytes >= _WIDE
    if wide:
        extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) + extra
    size = _WIDE if wide else nbytes
    return struct.pack("<IHHHHHIIIHH", 0x04034B50, 45 if wide else 20, 0, 0, 0, 0x21, crc, size, size, len(raw), len(extra)) + raw + extra


def _directory_entry(name: str, crc: int, nbytes: int, offset: int) -> bytes:
    raw = f"archive/{name}".encode()
    wide = nbytes >= _WIDE
    extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if wide else b""
    size, version = (_WIDE, 45) if wide else (nbytes, 20)
    numbers = (0x02014B50, version, version, 0, 0, 0, 0x21, crc, size, size, len(raw), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<IHHHHHHIIIHHHHHII", *numbers) + raw + extra


def _end(count: int, nbytes: int, offset: int) -> bytes:
    """The end of a zip whose directory of so many entries and bytes lies at ``offset``."""
    if offset + nbytes < _WIDE:
        return struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, nbytes, offset, 0)
    wide = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, nbytes, offset)
    locator = struct.pack("<IIQI", 0x07064B50, 0, offset + nbytes, 1)
    return wide + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _WIDE, _WIDE, 0)


# Files -----------------------------------------------------------------------------------------------------------


def lay_out(
    specs: Mapping[str, TensorSpec], *, max_shard_size: int | None = None, file: str | None = None, root: str | None = None
) -> list[FileLayout]:
    """The files of a new checkpoint, the table of contents last, which makes it valid.

    Args:
        specs: the tensors, in tensor order.
        max_shard_size: bytes of tensors in a file.
        file: there is no such checkpoint of one file.
        root: the key of the dict that a trainer has its model's tensors under.

    Raises:
        UsageError: a type that torch does not have, or one file.
    """
    if file is not None:
        raise UsageError(f"{file}: a distributed checkpoint is a folder: give a directory")
    unknown = next((name for name, spec in specs.items() if spec.dtype.name not in (*_STORAGES, *_LATER)), None)
    if unknown is not None:
        raise UsageError(f"tensor {short.repr(unknown)}: torch has no type for {specs[unknown].dtype.name}: cast it or leave it out")
    shards = split_into_shards({name: spec.nbytes for name, spec in specs.items()}, max_shard_size, "shard", "")
    layouts: list[FileLayout] = []
    places: dict[str, tuple[str, int, int]] = {}
    for number, names in enumerate(shards.values()):
        path, offset = f"__0_{number}.distcp", 0
        literals: list[tuple[int, bytes]] = []
        slots: dict[str, int] = {}
        checksums: list[Checksum] = []
        for name in names:
            spec = specs[name]
            wrapped = _wrap(spec)
            start = offset + len(wrapped.before)
            end = start + spec.nbytes
            literals += _around(offset, wrapped, end) if spec.nbytes else [(offset, wrapped.before + wrapped.behind)]
            slots[name] = start
            if spec.nbytes:
                checksums.append(Checksum("crc32", start, spec.nbytes, tuple(offset + place for place in wrapped.checksums)))
            places[name] = path, offset, end + len(wrapped.behind) - offset
            offset = end + len(wrapped.behind)
        layouts.append(FileLayout(path, offset, tuple(literals), slots, tuple(checksums)))
    table = _table(specs, places, root)
    return [*layouts, FileLayout(".metadata", len(table), ((0, table),), {})]


def _around(offset: int, wrapped: _Zip, end: int) -> list[tuple[int, bytes]]:
    """What is written of a zip but its tensor and the checksums of that."""
    pieces = []
    for start, data in ((0, wrapped.before), (end - offset, wrapped.behind)):
        at = 0
        for place in wrapped.checksums:
            if start <= place < start + len(data):
                pieces.append((offset + start + at, data[at : place - start]))
                at = place - start + 4
        pieces.append((offset + start + at, data[at:]))
    return pieces


def _table(specs: Mapping[str, TensorSpec], places: Mapping[str, tuple[str, int, int]], root: str | None) -> bytes:
    """``.metadata``."""
    layout = _call(_name("torch.serialization", "_get_layout"), _text("torch.strided"))
    contiguous = _call(_name(_TABLE, "_MEM_FORMAT_ENCODING"), _integer(0))
    tensors, planner, storage = [], [], []
    for name, spec in specs.items():
        full = _text(f"{root}.{name}" if root else name)
        properties = _name(_TABLE, "TensorProperties") + b")\x81"
        properties += _tuple(_name("torch", spec.dtype.name), layout, _FALSE, contiguous, _FALSE) + b"b"
        origin = _sizes(0 for _ in spec.shape)
        chunk = _object(_TABLE, "ChunkStorageMetadata", offsets=origin, sizes=_sizes(spec.shape))
        tensors.append(
            (full, _object(_TABLE, "TensorStorageMetadata", properties=properties, size=_sizes(spec.shape), chunks=_list(chunk)))
        )
        planner.append((full, _tuple(*map(_text, [root, name] if root else [name]))))
        index = _object(_TABLE, "MetadataIndex", fqn=full, offset=origin, index=_integer(0))
        path, offset, nbytes = places[name]
        where = {"relative_path": _text(path), "offset": _integer(offset), "length": _integer(nbytes)}
        storage.append((index, _object("torch.distributed.checkpoint.filesystem", "_StorageInfo", **where)))
    whole = {"state_dict_metadata": _dict(tensors), "planner_data": _dict(planner), "storage_data": _dict(storage), "storage_meta": _NONE}
    return _pickle(_object(_TABLE, "Metadata", **whole, version=_text("1.0.0")))
