"""GGUF, the container of llama.cpp: reads where tensors lie in one file or in the parts of one, and what its metadata says.

A file is metadata, a table of tensors, and their data at multiples of an alignment. Quantized ones consist of blocks of so many elements
with their scales in them, types of their own here. Facts: docs/gguf.md of ggml, and gguf 0.19.0.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.dtypes import BLOCK_TYPES, DTYPES, TensorSpec
from streamconv.errors import FormatError
from streamconv.formats import Contents, Extent, Source
from streamconv.formats.container import Beginning, Container, Names
from streamconv.formats.files import countable, damaged, opened, short, show
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.selection import Selection, find_files, gather
from streamconv.storage.folder import File, Location, read_each

KIND = Names("a GGUF file", (".gguf",), "model", (r"[^/]*\.gguf",), asked_for=("model.gguf",))
MAGIC = b"GGUF"

_PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
_BLOCKS = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 20: "iq4_nl",
    23: "iq4_xs", 39: "mxfp4_gguf",
}  # fmt: skip
_TYPES = {code: DTYPES[name] for code, name in _PLAIN.items()} | {code: BLOCK_TYPES[name] for code, name in _BLOCKS.items()}

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # types of metadata
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST = 1 << 20  # of tensors, and of pairs of metadata
_MOST_TEXT = 1 << 24  # bytes of a text
_MAX_AXES = 4  # ggml's own limit
_SHOWN = 64  # elements of a list that metadata is to give
_WINDOW = 1 << 20  # bytes that are read at a time


class _Cursor:
    """The beginning of a file, read front to back; what it says of itself is bounded by the file's size."""

    def __init__(self, path: Location, file: File) -> None:
        self.path, self.size, self.at = path, file.size, 0
        self._file, self._window, self._start = file, b"", 0

    def take(self, nbytes: int) -> bytes:
        if nbytes > min(_MOST_TEXT, self.size - self.at):
            raise damaged(self.path, f"byte {self.at}: {nbytes} bytes are to follow, {self.size - self.at} do")
        if self.at < self._start or self.at + nbytes > self._start + len(self._window):
            self._window, self._start = self._file.pread(max(nbytes, _WINDOW), self.at), self.at
        begin = self.at - self._start
        self.at += nbytes
        return self._window[begin : begin + nbytes]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        at, raw = self.at, self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"byte {at}: a text that is not UTF-8: {raw[:64]!r}") from error

    def value(self, kind: int) -> Any:
        """A value of metadata; of a long list, how many it has."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise damaged(self.path, f"byte {self.at}: metadata of type {kind}, which is none")
        inner, count = self.number("I"), self.number("Q")
        if count > self.size - self.at or inner == _ARRAY:
            raise damaged(self.path, f"byte {self.at}: a list of {count} values of type {inner}")
        if inner in _NUMBERS and count > _SHOWN:
            self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
            return {"count": count}
        if inner == _STRING and count > _SHOWN:
            for _ in range(count):
                self._skip(self.number("Q"))
            return {"count": count}
        return [self.value(inner) for _ in range(count)]

    def _skip(self, nbytes: int) -> None:
        if nbytes > self.size - self.at:
            raise damaged(self.path, f"byte {self.at}: {nbytes} bytes are to follow, {self.size - self.at} do")
        self.at += nbytes


def recognizes(beginning: Beginning) -> bool:
    """Whether a file begins as GGUF does."""
    return beginning.head.startswith(MAGIC)


def read(
    path: Location, *, by_rank: bool = False, files: Sequence[str] | Selection | None = None, explain: Explain = unexplained
) -> Contents:
    """The contents of a file, with all parts where it is one of several, or of a directory.

    Args:
        path: a ``.gguf`` file, any part of one, or a directory.
        by_rank: present each tensor as ``<file>/<name>``.
        files: names of the files of the directory to read, in this order, instead of looking for them.
        explain: see `check_index`.

    Raises:
        FormatError: damaged files, parts that are missing, tensors of types that are not known.
        UsageError: the path is not there or cannot be read.
    """
    selection = _with_parts(find_files(path, KIND, files, by_rank=by_rank))
    tables: dict[str, dict[str, Source]] = {}
    metadata: dict[str, Any] = {}
    for name, (table, pairs) in zip(selection.files, read_each(selection.files.values(), KIND.noun, _read_file), strict=True):
        tables[name] = table
        metadata = pairs | metadata
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    contents = gather("gguf", path, selection, tables, by_rank=by_rank, explain=explain, metadata=texts)
    contents.config.update(_as_config(metadata))
    return contents


def _as_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as a config: what is said of the model below ``gguf``, without the name of its architecture, which stands beside it."""
    architecture = metadata.get("general.architecture")
    config: dict[str, Any] = {"architecture": architecture}
    for key, value in metadata.items():
        section, *keys = key.split(".")
        if section != architecture or not keys:
            continue
        inner = config
        for part in keys[:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner.get(part, {}), dict) else {}
        inner[keys[-1]] = value
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = tokens["count"] if isinstance(tokens, dict) else len(tokens) if isinstance(tokens, list) else None
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return {"gguf": {**config, "tokens": vocabulary}}


def _with_parts(selection: Selection) -> Selection:
    """All parts of the file that was given as one of them."""
    if len(selection.files) != 1:
        return selection
    ((name, path),) = selection.files.items()
    part = KIND.shard(name)
    if part is None:
        return selection
    total = int(part["total"])
    names = [f"{part['stem']}-{number:05}-of-{part['total']}.gguf" for number in range(1, min(total, _MOST) + 1)]
    if name not in names:
        raise FormatError(f"{show(path)}: expected a number from 1 to {total} in its name: give it the one that it had")
    before = path.relative.removesuffix(name)
    return Selection({other: Location(path.folder, f"{before}{other}") for other in names})


def _read_file(path: Location) -> tuple[dict[str, Source], dict[str, Any]]:
    """The tensors of a file, and its metadata."""
    with opened(path, KIND.noun) as file:
        cursor = _Cursor(path, file)
        if cursor.take(min(4, cursor.size)) != MAGIC:
            raise FormatError(f"{show(path)}: no GGUF file: it does not begin with {MAGIC!r}")
        version = cursor.number("I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise FormatError(
                f"{show(path)}: a big-endian GGUF file, and only little-endian ones are read: convert it with llama.cpp's tools"
            )
        if version not in _VERSIONS:
            raise FormatError(f"{show(path)}: GGUF of version {version}: 2 and 3 are read")
        count, pairs = cursor.number("Q"), cursor.number("Q")
        if max(count, pairs) > _MOST:
            raise damaged(path, f"{count} tensors and {pairs} pairs of metadata: at most {_MOST} are read")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.number("I"))
        listed = [_read_tensor(cursor) for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MOST or alignment % 8:
            raise damaged(path, f"general.alignment is {short.repr(alignment)}: expected a multiple of 8")
        start = -(-cursor.at // alignment) * alignment
        table: dict[str, Source] = {}
        for name, spec, offset in sorted(listed, key=lambda row: row[2]):
            if name in table:
                raise damaged(path, f"two tensors are called {short.repr(name)}")
            if offset % alignment or start + offset + spec.nbytes > cursor.size:
                raise damaged(path, f"{spec} at byte {start + offset} is not in its {cursor.size} bytes, at multiples of {alignment}", name)
            table[name] = Source(spec, (Extent(str(path), start + offset, spec.nbytes),))
    return table, metadata


def _read_tensor(cursor: _Cursor) -> tuple[str, TensorSpec, int]:
    """A row of the table: name, dtype and shape, offset in the data."""
    name, axes = cursor.text(), cursor.number("I")
    if axes > _MAX_AXES:
        raise damaged(cursor.path, f"{axes} axes, at most {_MAX_AXES} there are", name)
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    code, offset = cursor.number("I"), cursor.number("Q")
    if code not in _TYPES:
        raise FormatError(f"{show(cursor.path)}: tensor {short.repr(name)} is of GGUF's type {code}, which is not known here")
    spec = TensorSpec(_TYPES[code], shape)
    if not countable(shape) or not spec.is_whole or (spec.dtype.is_packed and shape[-1:] and shape[-1] % spec.dtype.block):
        raise damaged(cursor.path, f"{list(shape)} elements of {spec.dtype} do not fill its blocks", name)
    return name, spec, offset


CONTAINER = Container(name="gguf", summary="GGUF files", names=KIND, read=read, recognizes=recognizes, has_own_metadata=True)
