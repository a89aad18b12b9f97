"""What containers have in common: files in a directory, the index that names them, JSON that is not trusted, and messages."""

from __future__ import annotations

import errno
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import msgspec

from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats import AnyNode, FileLayout
from streamconv.storage.folder import File, IrregularFile, Location
from streamconv.text import one_line

_MAX_COUNT = 2**63 - 1

short = reprlib.Repr()  # what a damaged file says may be long, or hold newlines
short.maxstring = short.maxother = 240

Table = dict[str, AnyNode]


# Reading ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Location, offset: int, limit: int, noun: str) -> tuple[bytes, int]:
    """At most ``limit`` bytes from byte ``offset`` of a regular file, and the file's size in bytes; ``noun`` is what it is to be.

    Raises:
        FormatError: it is no regular file.
        UsageError: it is not there, or cannot be read.
    """
    with opened(path, noun) as file:
        size = file.size
        file.seek(offset)
        return file.read(max(0, min(limit, size - offset))), size


def read_line(path: Location, noun: str) -> str:
    """What a file says that names another one, such as ``latest``. Raises as `read_bytes`."""
    raw, _ = read_bytes(path, 0, 256, noun)
    return raw.decode("utf-8", "replace").strip()


@contextmanager
def opened(path: Location, noun: str) -> Iterator[File]:
    """A regular file, which is closed after the block; ``noun`` is what it is to be, for messages.

    Raises:
        FormatError: it is no regular file.
        UsageError: it is not there, or cannot be read.
    """
    try:
        with closing(path.folder.open(path.relative)) as file:
            yield file
    except IrregularFile:
        raise FormatError(f"{show(path)}: not a regular file; expected {noun} or its index: give the path of one") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, noun) from error


def check_unicode(path: Location, *groups: Iterable[str]) -> None:
    """Refuses lone surrogates, which JSON can escape but no file can hold. Raises FormatError."""
    for group in groups:
        try:
            "".join(group).encode()
        except UnicodeEncodeError as error:
            raise damaged(path, f"a name or metadata holds {error.object[error.start]!r}, which is no character") from error


def countable(shape: Sequence[int]) -> bool:
    """Whether a shape is of sizes from 0 and of less than 2**63 elements."""
    count = 1
    for size in shape:
        count *= size or 1  # sizes beside a zero count too: other readers may multiply them first
        if size < 0 or count > _MAX_COUNT:
            return False
    return True


def merge(path: Location, tables: Mapping[str, Mapping[str, AnyNode]], *, by_rank: bool) -> Table:
    """The tensors of all files by name, or by ``<file>/<name>``, which ``by_rank`` asks for.

    Raises:
        FormatError: a name is in two files, without ``by_rank``.
    """
    union: Table = {}
    for file, table in tables.items():
        if by_rank:
            union |= {f"{file}/{name}": entry for name, entry in table.items()}
            continue
        if not union.keys().isdisjoint(table):
            name = next(name for name in table if name in union)
            other = next(other for other in tables if name in tables[other])
            raise FormatError(
                f"{show(path)}: tensor {short.repr(name)} is in both {short.repr(other)} and {short.repr(file)}: remove the file that "
                "does not belong here, or, if these are ranks that repeat names, use a recipe that reads them as <file>/<name>"
            )
        union |= table
    return union


# Writing ---------------------------------------------------------------------------------------------------------


def split_into_shards(sizes: Mapping[str, int], max_shard_size: int | None, stem: str, suffix: str) -> dict[str, list[str]]:
    """File names and the tensors in each, as huggingface_hub assigns them for the same order and size.

    Args:
        sizes: bytes of each tensor, in tensor order.
        max_shard_size: most bytes of tensors in a file; a larger tensor gets its own; None puts all in one file.
        stem: how the file names start.
        suffix: how they end.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    nbytes = 0
    for name, size in sizes.items():
        if max_shard_size is not None and size > max_shard_size:
            shards.append([name])  # its number comes before that of the file still open
            continue
        if max_shard_size is not None and nbytes + size > max_shard_size:
            shards.append(current)
            current, nbytes = [], 0
        current.append(name)
        nbytes += size
    if current or not shards:
        shards.append(current)
    if len(shards) == 1:
        return {f"{stem}{suffix}": shards[0]}
    return {f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}": names for number, names in enumerate(shards, 1)}


def variant_stem(stem: str, variant: str | None) -> str:
    """How the names of a variant's files start."""
    return f"{stem}.{variant}" if variant else stem


def index_name(stem: str, suffix: str, variant: str | None) -> str:
    """What an index is called, where the files' names start with ``stem``, and with a dot and the variant, if they are one."""
    return f"{stem}{suffix}.index.{variant}.json" if variant else f"{stem}{suffix}.index.json"


def index_layout(path: str, shards: Mapping[str, Iterable[str]], specs: Collection[TensorSpec]) -> FileLayout:
    """The index of a checkpoint: in which file each tensor is, and in all how many bytes and elements.

    Args:
        path: its name.
        shards: the names of the tensors in each file.
        specs: of each tensor that is stored, so that tied ones count once.
    """
    totals = {"total_size": sum(spec.nbytes for spec in specs), "total_parameters": sum(spec.numel for spec in specs)}
    return _json_layout(path, {"metadata": totals, "weight_map": _file_of(shards)})


def map_layout(path: str, shards: Mapping[str, Iterable[str]]) -> FileLayout:
    """An index that says nothing but in which file each tensor is."""
    return _json_layout(path, _file_of(shards))


def _file_of(shards: Mapping[str, Iterable[str]]) -> dict[str, str]:
    file_of: dict[str, str] = {}
    for file, names in shards.items():
        file_of |= dict.fromkeys(names, file)
    return file_of


def indented_json(table: Mapping[str, Any]) -> bytes:
    """A table of texts and numbers, or of such tables, as ``json.dumps`` has it with ``indent=2, sort_keys=True``, in one copy of it."""
    try:
        text = msgspec.json.encode(table, order="deterministic")
    except (OverflowError, UnicodeEncodeError):  # of numbers and names that it does not write
        text = b"\\"
    if text.isascii() and not any(octet in text for octet in (b"\\", b"\x7f")):  # which are escaped in other ways there
        return msgspec.json.format(text, indent=2)
    return json.dumps(table, indent=2, sort_keys=True).encode()


def _json_layout(path: str, table: Mapping[str, Any]) -> FileLayout:
    text = indented_json(table)
    return FileLayout(path, len(text) + 1, ((0, text), (len(text), b"\n")), {})


# Messages --------------------------------------------------------------------------------------------------------


def show(path: Location) -> str:
    """A path as one line."""
    return one_line(path)


def damaged(path: Location, problem: str, tensor: str | None = None) -> FormatError:
    """The error for a file that breaks a rule of its format."""
    subject = "" if tensor is None else f"tensor {short.repr(tensor)}: "
    return FormatError(f"{show(path)}: {subject}{problem[:800]}; the file is damaged: download or write it again")


def lfs_pointer(path: Location) -> FormatError:
    """The error for what git leaves where it has not fetched a large file."""
    return FormatError(f"{show(path)}: a Git LFS pointer, not the file it stands for: fetch that, for instance with git lfs pull")


def unreadable(path: Location, error: OSError | ValueError, noun: str) -> StreamconvError:
    """The error for a path that the system does not let us read."""
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UsageError(f"{show(path)}: no such file or directory: give the path of {noun} or a directory of them")
    reason = (isinstance(error, OSError) and error.strerror) or short.repr(str(error))
    return UsageError(f"{show(path)}: cannot be read: {reason}; make it readable or give another path")
