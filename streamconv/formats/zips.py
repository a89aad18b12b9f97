"""Zip archives as torch writes them: where each entry's bytes lie, and small entries' contents, compressed or not."""

from __future__ import annotations

import io
import itertools
import shlex
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from streamconv.errors import FormatError
from streamconv.formats.files import damaged, short, show
from streamconv.storage.folder import File, Location

MAX_DIRECTORY = 64 << 20  # a zip's directory: about 700000 storages
_ALIGNMENT = 64  # bytes: what the start of each entry's data is a multiple of (torch.serialization.config.save.storage_alignment)
_MAX_PADDING = 64 << 10
_BUFFER = 64 << 10


class _Bounded:
    """A file whose zip directory cannot make zipfile read as much as it likes."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            count = max(0, self._file.size - self.tell())
        if count > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {count} bytes; at most {MAX_DIRECTORY} are read")
        return self._file.read(count)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a zip: where its bytes start, how many they are, and how many it has when they are inflated."""

    start: int
    nbytes: int
    size: int
    deflated: bool


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip's entries by name, its directory in order, and where that starts.

    Names are those below the folder that all of them lie in.
    """

    path: Location
    file: File
    entries: dict[str, Entry]
    infos: list[zipfile.ZipInfo]
    limit: int

    def open(self, name: str, limit: int) -> BinaryIO:
        """The contents of an entry. Raises FormatError for none, and for one that would be inflated to more than ``limit`` bytes."""
        entry = self.entries.get(name)
        if entry is None:
            raise damaged(self.path, f"expected a {name} in the zip, found {short.repr(list(self.entries))}")
        if not entry.deflated:
            return open_section(self.file, entry.start, entry.nbytes)
        if entry.size > limit:
            raise FormatError(
                f"{show(self.path)}: zip entry {short.repr(name)} is compressed and takes {entry.size} bytes inflated, at most {limit} "
                f"are: {rezip(self.path)}"
            )
        part = _Inflated(_Section(self.file, entry.start, entry.nbytes), entry.size)
        return cast("BinaryIO", io.BufferedReader(part, _BUFFER))

    def read(self, name: str, limit: int) -> bytes:
        """At most ``limit`` bytes of an entry. Raises FormatError as `open` does, and for one with more."""
        try:
            data = self.open(name, limit).read(limit + 1)
        except ValueError as error:
            raise damaged(self.path, f"zip entry {short.repr(name)} {error}") from error
        if len(data) > limit:
            raise damaged(self.path, f"zip entry {short.repr(name)} has {self.entries[name].size} bytes, at most {limit} are read")
        return data


def is_zip(head: bytes) -> bool:
    """Whether a file's first bytes are those of a zip with something in it."""
    return head.startswith(b"PK\3\4")


def first_entry(file: File, head: bytes) -> str:
    """The name of a zip's first entry; ``head`` is at least the first 30 bytes of the file. Nothing is checked."""
    length = int.from_bytes(head[26:28], "little")
    return file.pread(min(length, 4096), 30).decode("utf-8", "replace")


def find_program(first: str) -> tuple[str, str] | None:
    """What another program made whose zips begin with such an entry, and how it becomes readable: see `foreign`. None: nothing known."""
    if first.endswith(".npy"):
        return "a file of numpy arrays (.npz)", "npz"
    if first in ("metadata.json", "config.json", "model.weights.h5"):
        return "a model of Keras 3 (.keras), with HDF5 in it", "keras"
    if first == "[Content_Types].xml":
        return "an Office document", ""
    if first.partition("/")[2].partition("/")[0] in ("archive_format", "serialized_exported_program.json"):
        return "a program that torch.export wrote", ""
    return None


def describe_zip(first: str) -> tuple[str, str]:
    """What a zip is that no container here reads, by its first entry's name, and how it becomes readable: see `foreign`."""
    return find_program(first) or (f"a zip archive, with {first[:200]!r} in it", "zip")


def open_section(file: File, start: int, nbytes: int, *, buffer: int = _BUFFER) -> BinaryIO:
    """A range of an open file, as a file of so large a buffer; it tells where in the whole file it is."""
    return cast("BinaryIO", io.BufferedReader(_Section(file, start, nbytes), buffer))


class _Section(io.RawIOBase):
    """A range of an open file, as a file."""

    def __init__(self, file: File, start: int, nbytes: int) -> None:
        self._file, self._at, self._end = file, start, start + nbytes

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as there are bytes."""
        data = self._file.pread(min(len(buffer), self._end - self._at), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        """Where the next byte is, in the whole file."""
        return self._at


class FileRange:
    """A range of an open file, as an open file of its own; see `storage.folder.File`."""

    def __init__(self, file: File, start: int, nbytes: int) -> None:
        self._file, self._start, self._at = file, start, 0
        self.size, self.is_remote = nbytes, file.is_remote

    def pread(self, nbytes: int, offset: int) -> bytes:
        return self._file.pread(max(0, min(nbytes, self.size - offset)), self._start + offset)

    def read(self, nbytes: int = -1, /) -> bytes:
        data = self.pread(self.size if nbytes < 0 else nbytes, self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """Leaves the whole file open."""


class _Inflated(io.RawIOBase):
    """A deflated stream's contents, of which no more is made than is asked for and than was declared."""

    def __init__(self, file: io.RawIOBase, size: int) -> None:
        self._file, self._rest = file, size
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as there are bytes."""
        want = min(len(buffer), self._rest)
        data = b""
        while want and not data and not self._inflate.eof:
            chunk = self._inflate.unconsumed_tail or self._file.read(_BUFFER)
            if not chunk:
                break
            try:
                data = self._inflate.decompress(chunk, want)
            except zlib.error as error:
                raise ValueError(f"cannot be inflated: {error}") from error
        buffer[: len(data)] = data
        self._rest -= len(data)
        return len(data)


def read_archive(path: Location, file: File) -> Archive:
    """The entries of a zip. Raises FormatError where directory and entries contradict each other."""
    try:
        with zipfile.ZipFile(cast("BinaryIO", _Bounded(file))) as archive:
            infos, limit = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, ArithmeticError, struct.error, OSError) as error:
        raise damaged(path, f"its zip directory cannot be read: {short.repr(str(error))}") from error
    entries: dict[str, Entry] = {}
    folder = infos[0].filename.partition("/")[0] if infos else ""
    end = 0
    starts = _aligned_starts(infos, limit) if file.is_remote else {}
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = f"zip entry {short.repr(info.filename)}"
        start = starts.get(info.header_offset)
        if start is None:
            start = _start(path, file, info, end, limit)
        end = start + info.compress_size
        name = info.filename.removeprefix(f"{folder}/")
        if name == info.filename or name in entries or ".." in PurePosixPath(name).parts:
            raise damaged(path, f"{entry} is there twice or outside the folder {short.repr(folder)}")
        if info.is_dir():
            continue
        if info.flag_bits & 0x41 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{show(path)}: {entry} is encrypted, or compressed in a way torch does not read: write the file again")
        entries[name] = Entry(start, info.compress_size, info.file_size, info.compress_type == zipfile.ZIP_DEFLATED)
        if not entries[name].deflated and info.compress_size != info.file_size:
            raise damaged(path, f"{entry} has {info.compress_size} bytes and is said to be of {info.file_size}")
    return Archive(path, file, entries, infos, limit)


def _start(path: Location, file: File, info: zipfile.ZipInfo, end: int, limit: int) -> int:
    """Where an entry's bytes start, by its own header, which lies behind the ``end`` of the entry before."""
    entry = f"zip entry {short.repr(info.filename)}"
    header = file.pread(30, info.header_offset) if 0 <= info.header_offset < limit else b""
    if len(header) < 30 or header[:4] != b"PK\3\4" or info.header_offset < end or not (end or info.header_offset == 0):
        raise damaged(path, f"{entry} does not start at byte {info.header_offset}, as the directory says")
    start: int = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:]))
    stored_name = file.pread(start - info.header_offset - 30, info.header_offset + 30)
    if start + info.compress_size > limit or not stored_name.startswith(_raw_name(info)):
        raise damaged(path, f"{entry} of {info.compress_size} bytes at {start} does not lie inside the {limit} bytes of data")
    return start


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")


def _aligned_starts(infos: list[zipfile.ZipInfo], limit: int) -> dict[int, int]:
    """Where the bytes of entries start, by where their headers do, without a look at each header, which would take a request.

    torch aligns them, and puts an entry's header right behind the bytes of the one before (and a descriptor, if it writes one): where that
    comes out for all entries, it is so. Nothing is said of the first and the last, whose headers are near what is read anyhow.
    """
    infos = sorted(infos, key=lambda info: info.header_offset)
    starts = {}
    for info, after in itertools.pairwise(infos[1:]):
        ends = [after.header_offset - size for size in ((16, 24) if info.flag_bits & 8 else (0,))]
        candidates = [end - info.compress_size for end in ends if (end - info.compress_size) % _ALIGNMENT == 0]
        least = info.header_offset + 30 + len(info.orig_filename.encode())
        if len(candidates) != 1 or not 0 <= candidates[0] - least < _MAX_PADDING or after.header_offset > limit:
            return {}
        starts[info.header_offset] = candidates[0]
    return starts


def rezip(path: Location) -> str:
    """The one command that makes a zip without compression, whatever is in it: nothing of it is loaded."""
    old, new = names(path)
    code = (
        f"import zipfile; a = zipfile.ZipFile({old!r}); b = zipfile.ZipFile({new!r}, 'w'); "
        "[b.writestr(i.filename, a.read(i)) for i in a.infolist()]; b.close()"
    )
    first = "" if path.local else "download it and "
    return f"{first}store it plain with: python -c {shlex.quote(code)}"


def names(path: Location) -> tuple[str, str]:
    """How a command that mends a file calls it, and how it calls the file that it makes: ``model.bin``, ``model.new.bin``."""
    old = str(path) if path.local else path.name
    return old, f"{old.removesuffix(path.suffix)}.new{path.suffix}"
