"""What a file is, by its first bytes: a container that is read, or something else, which is named and not called damaged."""

from __future__ import annotations

import re
from pathlib import PurePath

from streamconv.errors import FormatError, StreamconvError
from streamconv.formats.container import HEAD, Beginning
from streamconv.formats.files import lfs_pointer, opened, show
from streamconv.formats.foreign import foreign, reads
from streamconv.formats.registry import containers
from streamconv.formats.roots import describe_pickle
from streamconv.formats.zips import describe_zip, first_entry, is_zip
from streamconv.storage.folder import File, Location

_NOUN = "a checkpoint's file"
_MSGPACK_MAPS, _MSGPACK_TEXTS = (*range(0x81, 0x90), 0xDE, 0xDF), (*range(0xA0, 0xC0), 0xD9, 0xDA)

_MAGICS = (  # where, which bytes, what it is, and what makes it readable
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 (Keras)", "hdf5"),
    *((0, magic, "a file of llama.cpp from before GGUF", "") for magic in (b"lmgg", b"tjgg", b"fmgg", b"algg")),
    (0, b"\x93NUMPY", "a numpy array (.npy)", "npy"),
    (4, b"TFL3", "TensorFlow Lite", ""),
    (4, b"ORTM", "ONNX Runtime's own format", ""),
    (0, b"PAR1", "Parquet, a table and no weights", ""),
    (0, b"ARROW1", "Arrow, a table and no weights", ""),
    (0, b"\x1f\x8b", "a file compressed with gzip", "gzip"),
    (0, b"BZh", "a file compressed with bzip2", "bzip2"),
    (0, b"\xfd7zXZ\0", "a file compressed with xz", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "a file compressed with Zstandard", "zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z"),
    (0, b"Rar!", "a RAR archive", ""),
    (0, b"\x12\x01\0\0\0\0\0\0", "MXNet's parameters", ""),
    (0, b"%PDF", "a PDF document", ""),
    (0, b"\x89PNG", "a PNG image", ""),
    (0, b"\x7fELF", "a program of this machine (ELF)", ""),
    (0, b"/annex/objects/", "a pointer of git-annex, not the file it stands for", ""),
)
_NAMES = (  # what has no bytes of its own to be known by
    (r".*\.data-\d{5}-of-\d{5}", "a part of a TensorFlow checkpoint", "tensorflow"),
    (r".*\.index", "the index of a TensorFlow checkpoint", "tensorflow"),
    (r".*\.pb", "a TensorFlow graph", ""),
    (r".*\.mlmodel", "CoreML", ""),
    (r".*\.caffemodel", "Caffe's weights", ""),
)


def recognize(path: Location, *, texts: bool = True) -> str | None:
    """The name of the container that a file's first bytes show; None where they do not tell.

    Args:
        path: the file.
        texts: refuse texts for what they are, too.

    Raises:
        FormatError: it is something else, which the message names, with the command that makes it readable where there is one.
        UsageError: it is not there, or cannot be read.
    """
    with opened(path, _NOUN) as file:
        head, size = file.pread(HEAD, 0), file.size
        if not size:
            raise FormatError(f"{show(path)}: an empty file, of 0 bytes: download or write it again")
        beginning = Beginning(path, file, head)
        name = next((name for name, container in containers().items() if container.recognizes(beginning)), None)
        if name is None:
            _refuse_foreign(path, file, head, size, texts=texts)
        return name


def holds_checkpoint(path: Location) -> bool:
    """Whether a file's first bytes are those of a container that is read; it never raises for what a file is."""
    try:
        return recognize(path) is not None
    except StreamconvError:
        return False


def _refuse_foreign(path: Location, file: File, head: bytes, size: int, *, texts: bool) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise lfs_pointer(path)
    for at, magic, what, command in _MAGICS:
        if head.startswith(magic, at):
            raise foreign(path, what, command)
    _refuse_archive(path, file, head)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise foreign(path, describe_pickle(path, file, size), "pickle")
    if head[0] in _MSGPACK_MAPS and len(head) > 1 and {*head[1:6]} & {*_MSGPACK_TEXTS} and path.suffix in (".msgpack", ""):
        raise foreign(path, "MessagePack (Flax)", "flax")
    if message := _protobuf(path, head):
        raise foreign(path, message, {"ONNX": "onnx", "a TensorFlow SavedModel": "tensorflow"}.get(message, ""))
    if texts and len(head) >= 16 and (text := _text(head)):
        raise FormatError(
            f"{show(path)}: {text} and no weights; {reads()}: download the file again, with the right address and credentials"
        )
    for pattern, what, command in _NAMES:
        if re.fullmatch(pattern, path.name, re.DOTALL):
            raise foreign(path, what, command)
    if path.suffix == ".bin" and path.folder.has(f"{PurePath(path.relative).with_suffix('.xml')}"):
        raise foreign(path, "the weights of OpenVINO, beside its .xml", "")
    if len(head) >= 64 and not any(file.pread(HEAD, start).strip(b"\0") for start in (0, size // 2, max(0, size - HEAD))):
        raise FormatError(f"{show(path)}: {size} bytes that are zero: it was never downloaded or written: download or write it again")


def _refuse_archive(path: Location, file: File, head: bytes) -> None:
    if is_zip(head):
        raise foreign(path, *describe_zip(first_entry(file, head)))
    if head[257:262] == b"ustar":
        raise foreign(path, "a NeMo archive (tar)" if path.suffix == ".nemo" else "a tar archive", "tar")


def _protobuf(path: Location, head: bytes) -> str | None:
    """ONNX, CoreML or a SavedModel: messages that begin with a version."""
    if not (head[:1] == b"\x08" and 0 < head[1] < 0x80 and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")):
        return None
    if path.suffix in (".mlmodel", ".pb"):
        return "CoreML" if path.suffix == ".mlmodel" else "a TensorFlow SavedModel"
    producer = head[4 : 4 + head[3]] if len(head) > 4 else b""
    is_onnx = head[2:3] == b"\x12" and producer.isascii() and producer[:1].isalpha()
    return "ONNX" if is_onnx or path.suffix == ".onnx" else None


def _text(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        return "a web page (HTML), such as one to log in,"
    if start.startswith(b"<"):
        return "XML, such as a store's error message,"
    if start.startswith((b'{"', b"{\n", b"{ ", b"{\r", b'["', b"[{", b"[\n")):
        return "JSON text, such as a server's error message,"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode()
    return "plain text" if text and all(char.isprintable() or char in "\n\r\t" for char in text) else None
