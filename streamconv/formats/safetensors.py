"""Safetensors: reads headers and indexes without trusting them, and lays out files as the reference library writes them.

A file is eight bytes of header length (little-endian), a JSON header padded with spaces, and the tensors' bytes back to
back. A checkpoint is one file, or several in a directory, usually with an index that maps tensor names to file names.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import Contents, Extent, FileLayout, Source

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# In the order in which the reference library puts them into a file: widest first, so that all stay aligned.
CODES: dict[str, str] = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F6_E3M2": "float6_e3m2fn",
    "F6_E2M3": "float6_e2m3fn",
    "F4": "float4_e2m1fn",
    "BOOL": "bool",
}
_CODE_OF = {name: code for code, name in CODES.items()}
_RANK = {name: rank for rank, name in enumerate(CODES.values())}

_MAX_JSON = 100_000_000  # the reference library's own limit for a header; an index is held to the same
_MAX_COUNT = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_INTEGERS = {int}
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors", re.DOTALL)

_short = reprlib.Repr()  # what a damaged file says may be long, or hold newlines
_short.maxstring = _short.maxother = 240

_Specs = dict[tuple[str, tuple[int, ...]], TensorSpec]
_Table = dict[str, Source]


# Reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, *, by_rank: bool = False) -> Contents:
    """The contents of a file, or of a directory by its index, else ``model.safetensors``, else all its files.

    Args:
        path: a ``.safetensors`` file or a directory.
        by_rank: present each tensor as ``<file>/<name>``, for files of ranks, which repeat names.

    Raises:
        FormatError: damaged, incomplete or contradictory files; a tensor in two files without ``by_rank``.
        UsageError: the path is not there or cannot be read.
    """
    path = path.absolute()
    index: Path | None = None
    weight_map: dict[str, str] = {}
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir it never raises: reading the file says what is wrong
        names = _list_directory(path)
        if index := _find_index(path, names):
            weight_map = _read_index(index)
            names = _in_order(weight_map.values())
        else:
            names = _choose_files(path, names)
        files = {name: path / name for name in names}
        _check_present(index or path, files)
    else:
        files = {path.name: path}

    specs: _Specs = {}
    tables: dict[str, _Table] = {}
    metadata: dict[str, str] = {}
    for name, file in files.items():
        tables[name], found = _read_file(file, specs)
        metadata = found | metadata  # files agree as a rule; where not, the first has its say
    if index:
        _check_index(index, weight_map, tables)
    entries = _merge(path, tables, by_rank=by_rank)
    return Contents("safetensors", entries, list(files.values()), [index] if index else [], metadata)


def read_file(path: Path) -> tuple[dict[str, Source], dict[str, str]]:
    """The tensors of one file in the order of their offsets, and its metadata.

    Raises:
        FormatError: the file breaks a rule of the format.
        UsageError: the file is not there or cannot be read.
    """
    return _read_file(path.absolute(), {})


def _read_file(path: Path, specs: _Specs) -> tuple[_Table, dict[str, str]]:
    header, data_start, size = _read_header(path)
    metadata = header.pop(_METADATA, {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _damaged(path, f"{_METADATA} must map strings to strings, without repeating one, and is {_short.repr(metadata)}")
    _check_unicode(path, header, metadata, metadata.values())

    rows = [(*_offsets(path, name, info), name, _spec(path, name, info, specs)) for name, info in header.items()]
    rows.sort(key=itemgetter(0, 1))
    where, entries, position = str(path), {}, 0
    for begin, end, name, spec in rows:
        if begin != position:
            what = "leaves a gap after" if begin > position else "overlaps"
            raise _damaged(path, f"its data starts at {begin} and {what} the tensor before, which ends at {position}", name)
        if end - begin != spec.nbytes:
            raise _damaged(path, f"{spec} needs {spec.nbytes} bytes, its data_offsets [{begin}, {end}] hold {end - begin}", name)
        entries[name] = Source(spec, (Extent(where, data_start + begin, end - begin),))
        position = end
    if data_start + position != size:
        missing = data_start + position - size
        what = f"{missing} bytes are missing at the end" if missing > 0 else f"{-missing} bytes at the end belong to no tensor"
        raise _damaged(path, f"the header describes {data_start + position} bytes, the file has {size}: {what}")
    return entries, metadata


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands, where the data starts, and the file's size."""
    raw, size = _read_bytes(path, 0, 8)
    length = int.from_bytes(raw, "little")
    if raw == b"version ":
        raise FormatError(f"{_show(path)}: a Git LFS pointer, not the file it stands for: fetch that, for instance with git lfs pull")
    if len(raw) < 8:
        raise _damaged(path, f"it has {size} bytes, a safetensors file has 8 and a header at least")
    if length > _MAX_JSON:
        raise _damaged(path, f"it announces a header of {length} bytes, the format allows {_MAX_JSON}")
    if length > size - 8:
        raise _damaged(path, f"it announces a header of {length} bytes, and only {size - 8} follow")
    raw, size = _read_bytes(path, 8, length)
    if not raw.startswith(b"{"):
        raise _damaged(path, f"its header must start with '{{' and starts with {raw[:8]!r}")
    return _parse_object(path, raw, "header"), 8 + length, size


def _read_bytes(path: Path, offset: int, limit: int) -> tuple[bytes, int]:
    """At most ``limit`` bytes from ``offset`` of a regular file, and the file's size."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would wait for its writer
            raise FormatError(f"{_show(path)}: not a regular file; expected a safetensors file or its index: give the path of one")
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            return file.read(max(0, min(limit, size - offset))), size
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


class _Repeated(dict[str, Any]):
    """A JSON object that says a key twice; refused where it is used, since only there its place is known."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    repeated = _Repeated()
    repeated.key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return repeated


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse_int(text: str) -> int:
    return -1 if text == "-0" else int(text)  # as the reference library has it, -0 is no count


def _parse_object(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    hook = _parse_int if b"-0" in raw else None  # None is much faster
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_object, parse_int=hook, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        problem = f"its {what} is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        problem = f"its {what} is not JSON: {error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:
        problem = f"its {what} is not JSON that can be read: {_short.repr(str(error))}"
    else:
        if type(found) is dict:
            return found
        if type(found) is not _Repeated:
            raise _damaged(path, f"its {what} must be a JSON object and is a {type(found).__name__}")
        problem = f"its {what} names {_short.repr(found.key)} twice"
    raise _damaged(path, problem)


def _check_unicode(path: Path, *groups: Iterable[str]) -> None:
    """Refuses lone surrogates, which JSON can escape but no file can hold."""
    for group in groups:
        try:
            "".join(group).encode()
        except UnicodeEncodeError as error:
            raise _damaged(path, f"a name or metadata holds {error.object[error.start]!r}, which is no character") from error


def _offsets(path: Path, name: str, info: object) -> tuple[int, int]:
    """The data_offsets of one tensor's entry, whose fields are checked first."""
    if type(info) is _Repeated:
        raise _damaged(path, f"its entry says {_short.repr(info.key)} twice", name)
    if type(info) is not dict:
        raise _damaged(path, f"its entry must be a JSON object and is {_short.repr(info)}", name)
    if info.keys() != _FIELDS:
        raise _damaged(path, f"its entry must have the fields dtype, shape, data_offsets and has {_short.repr(list(info))}", name)
    offsets = info["data_offsets"]
    if type(offsets) is list and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and 0 <= begin <= end:
            return begin, end
    raise _damaged(path, f"data_offsets must be two integers, 0 <= begin <= end, and are {_short.repr(offsets)}", name)


def _spec(path: Path, name: str, info: dict[str, Any], specs: _Specs) -> TensorSpec:
    """Dtype and shape of an entry, one object for all equal ones: models repeat few of them very often."""
    code, shape = info["dtype"], info["shape"]
    if type(code) is not str or code not in CODES:
        raise _damaged(path, f"unknown dtype {_short.repr(code)}, known are {', '.join(CODES)}", name)
    # The exact type is asked for each time: True and 1.0 equal 1, and would be found among the specs.
    if type(shape) is not list or not _INTEGERS.issuperset(map(type, shape)):
        raise _damaged(path, f"its shape must be a list of integers and is {_short.repr(shape)}", name)
    key = (code, tuple(shape))
    spec = specs.get(key)
    if spec is None:
        if not _countable(shape):
            raise _damaged(path, f"its shape must be of sizes from 0, in all below 2**63 elements, and is {_short.repr(shape)}", name)
        spec = TensorSpec(DTYPES[CODES[code]], key[1])
        if spec.numel * spec.dtype.bits % 8:
            raise _damaged(path, f"{spec} ends inside a byte: {spec.numel} elements of {spec.dtype.bits} bits", name)
        specs[key] = spec
    return spec


def _countable(shape: list[int]) -> bool:
    count = 1
    for size in shape:
        count *= size or 1  # sizes beside a zero count too: other readers may multiply them first
        if size < 0 or count > _MAX_COUNT:
            return False
    return True


# Directories -----------------------------------------------------------------------------------------------------


def _find_index(directory: Path, names: list[str]) -> Path | None:
    names = [name for name in names if name.endswith(f"{SUFFIX}.index.json")]
    if INDEX in names:
        return directory / INDEX
    if len(names) > 1:
        raise FormatError(f"{_show(directory)}: several indexes, {_short.repr(names)}, none of them {INDEX}: keep the one that counts")
    return directory / names[0] if names else None


def _choose_files(directory: Path, names: list[str]) -> list[str]:
    """The weight files of a directory without an index."""
    if SINGLE in names:
        return [SINGLE]
    names = [name for name in names if name.endswith(SUFFIX)]
    if not names:
        raise FormatError(f"{_show(directory)}: no *{SUFFIX} file in it: give the path of a checkpoint")
    counts = Counter((match["stem"], int(match["total"])) for match in map(_SHARD.fullmatch, names) if match)
    for (stem, total), count in counts.items():
        if count < total:
            raise FormatError(f"{_show(directory)}: {count} of the {total} files {_short.repr(stem)}-* are there: download the others")
    return names


def _check_present(where: Path, files: Mapping[str, Path]) -> None:
    absent = [name for name, file in files.items() if not os.path.exists(file)]  # noqa: PTH110 - never raises
    if absent:
        raise FormatError(
            f"{_show(where)}: {len(absent)} of {len(files)} files are not there, such as {_short.repr(absent[0])}: download them"
        )


def _list_directory(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208 - names are wanted
    except OSError as error:
        raise _unreadable(directory, error) from error


def _read_index(path: Path) -> dict[str, str]:
    raw, size = _read_bytes(path, 0, _MAX_JSON)
    if size > _MAX_JSON:
        raise _damaged(path, f"it has {size} bytes, an index at most {_MAX_JSON}")
    weight_map = _parse_object(path, raw, "text").get("weight_map")
    if type(weight_map) is _Repeated:
        raise _damaged(path, f"its weight_map names {_short.repr(weight_map.key)} twice")
    if type(weight_map) is not dict or not weight_map:
        raise _damaged(path, f"it must have a weight_map of tensor names to file names, found {_short.repr(weight_map)}")
    for name, shard in weight_map.items():
        if type(shard) is not str or not _is_inside(shard):
            raise _damaged(path, f"expected a *{SUFFIX} file below this directory, found {_short.repr(shard)}", name)
    return weight_map


def _is_inside(shard: str) -> bool:
    """Whether a file name in an index is a plain relative path that cannot leave the directory. Links in it may."""
    path = PurePosixPath(shard)
    plain = str(path) == shard and not path.is_absolute() and ".." not in path.parts
    return plain and shard.endswith(SUFFIX) and "\\" not in shard and "\0" not in shard


def _in_order(shards: Iterable[str]) -> list[str]:
    """File names in the order of their numbers if all have one, else of their first appearance.

    A weight_map is usually sorted by tensor name, which would let ``model-00007-of-00009`` appear first.
    """
    names = list(dict.fromkeys(shards))
    return sorted(names) if all(map(_SHARD.fullmatch, names)) else names


def _check_index(index: Path, weight_map: dict[str, str], tables: dict[str, _Table]) -> None:
    """Every tensor is in the file that the index says, and in no other."""
    extra, moved = [], []
    for file, table in tables.items():
        for name in table:
            said = weight_map.get(name)
            if said is None:
                extra.append((name, f"is in {_short.repr(file)}, the index does not name it"))
            elif said != file:
                moved.append((name, f"is in {_short.repr(file)}, the index says {_short.repr(said)}"))
    missing = [
        (name, f"is in no file, the index says {_short.repr(file)}") for name, file in weight_map.items() if name not in tables[file]
    ]
    for problems in (moved, missing, extra):
        if problems:
            name, what = problems[0]
            raise FormatError(
                f"{_show(index)}: index and files differ in {len(problems)} tensors: {_short.repr(name)} {what}; "
                "download or write the index and the files again"
            )


def _merge(path: Path, tables: dict[str, _Table], *, by_rank: bool) -> _Table:
    if by_rank:
        return {f"{file}/{name}": entry for file, table in tables.items() for name, entry in table.items()}
    merged: _Table = {}
    for file, table in tables.items():
        if not merged.keys().isdisjoint(table):
            name = next(name for name in table if name in merged)
            other = next(other for other in tables if name in tables[other])
            raise FormatError(
                f"{_show(path)}: tensor {_short.repr(name)} is in both {_short.repr(other)} and {_short.repr(file)}: remove the file that "
                "does not belong here, or, if these are ranks that repeat names, use a recipe that reads them as <file>/<name>"
            )
        merged |= table
    return merged


# Writing ---------------------------------------------------------------------------------------------------------


def order_in_file(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names in the order of the reference library: by dtype, then by name (code points compare as UTF-8 does)."""
    return sorted(specs, key=lambda name: (_RANK[specs[name].dtype.name], name))


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors, length included, and where in the file each tensor starts.

    Raises:
        UsageError: a name that cannot be stored, a packed tensor that ends inside a byte, or too many tensors for one file.
    """
    if _METADATA in specs:
        raise UsageError(f"a tensor cannot be named {_METADATA!r} in a safetensors file: rename it")
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position, slots = 0, {}
    for name in order_in_file(specs):
        spec, begin = specs[name], position
        if spec.numel * spec.dtype.bits % 8:
            raise UsageError(f"tensor {_short.repr(name)}: {spec} ends inside a byte, which safetensors cannot store: leave it out")
        position += spec.nbytes
        slots[name] = begin
        header[name] = {"dtype": _CODE_OF[spec.dtype.name], "shape": list(spec.shape), "data_offsets": [begin, position]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a name or metadata holds {error.object[error.start]!r}, which UTF-8 cannot store: rename it") from error
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_JSON:
        raise UsageError(f"the header of {len(specs)} tensors takes {len(text)} bytes, safetensors allows {_MAX_JSON}: use smaller shards")
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in slots.items()}


def split_into_shards(sizes: Mapping[str, int], max_shard_size: int | None, stem: str = "model") -> dict[str, list[str]]:
    """File names and the tensors in each, as huggingface_hub assigns them for the same order and size.

    Args:
        sizes: bytes of each tensor, in tensor order.
        max_shard_size: bytes of tensors in a file; a larger tensor gets its own; None puts all in one file.
        stem: how the file names start.
    """
    closed: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if max_shard_size is not None and size > max_shard_size:
            closed.append([name])  # its number comes before that of the file still open
            continue
        if max_shard_size is not None and filled + size > max_shard_size:
            closed.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    if current or not closed:
        closed.append(current)
    if len(closed) == 1:
        return {f"{stem}{SUFFIX}": closed[0]}
    return {f"{stem}-{number:05d}-of-{len(closed):05d}{SUFFIX}": names for number, names in enumerate(closed, 1)}


def lay_out(
    specs: Mapping[str, TensorSpec], *, metadata: Mapping[str, str], max_shard_size: int | None, file: str | None = None
) -> list[FileLayout]:
    """The files of a checkpoint, with paths relative to it; the index, if there is more than one, comes last.

    Args:
        specs: the tensors, in tensor order.
        metadata: goes into each file.
        max_shard_size: see `split_into_shards`.
        file: the name of the one file to make, whatever its size.

    Raises:
        UsageError: see `header_bytes`.
    """
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    shards = {file: list(specs)} if file else split_into_shards(sizes, max_shard_size)
    layouts = []
    for path, names in shards.items():
        header, slots = header_bytes({name: specs[name] for name in names}, metadata)
        layouts.append(FileLayout(path, len(header) + sum(sizes[name] for name in names), ((0, header),), slots))
    if len(shards) > 1:
        totals = {"total_size": sum(sizes.values()), "total_parameters": sum(spec.numel for spec in specs.values())}
        index = {"metadata": totals, "weight_map": {name: path for path, names in shards.items() for name in names}}
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        layouts.append(FileLayout(INDEX, len(text), ((0, text),), {}))
    return layouts


# Messages --------------------------------------------------------------------------------------------------------


def _show(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


def _damaged(path: Path, problem: str, tensor: str | None = None) -> FormatError:
    place = "" if tensor is None else f"tensor {_short.repr(tensor)}: "
    return FormatError(f"{_show(path)}: {place}{problem[:800]}; the file is damaged: download or write it again")


def _unreadable(path: Path, error: OSError | ValueError) -> StreamconvError:
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UsageError(f"{_show(path)}: no such file or directory: give the path of a safetensors file or a directory of them")
    reason = (isinstance(error, OSError) and error.strerror) or _short.repr(str(error))
    return UsageError(f"{_show(path)}: cannot be read: {reason}; make it readable or give another path")
