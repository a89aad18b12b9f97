"""What a file is, by its first bytes: a container that is read, or something else, which is named and not called damaged."""

from __future__ import annotations

import re
import zipfile
from pathlib import PurePath

from streamconv.errors import FormatError, StreamconvError
from streamconv.formats.files import Opened, lfs_pointer, opened, pread, show, size_of
from streamconv.formats.foreign import READS, foreign
from streamconv.formats.json_text import MAX_JSON
from streamconv.formats.pickles import is_legacy
from streamconv.formats.roots import describe_pickle
from streamconv.storage.remote import Location, RemotePath, exists

HEAD = 512  # bytes that are looked at
_NOUN = "a checkpoint's file"
_TORCH_ENTRY = re.compile(r"\.data|\.format_version|\.storage_alignment|byteorder|code|constants\.pkl|data|data\.pkl|extra|version")
_TORCH_TAR = {"pickle", "storages", "sys_info", "tensors"}
_MSGPACK_MAPS, _MSGPACK_TEXTS = (*range(0x81, 0x90), 0xDE, 0xDF), (*range(0xA0, 0xC0), 0xD9, 0xDA)

_MAGICS = (  # where, which bytes, what it is, and what makes it readable
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 (Keras)", "hdf5"),
    (0, b"GGUF", "GGUF (llama.cpp)", "gguf"),
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
    """The container that a file's first bytes show: safetensors, torch or mindspore; None where they do not tell.

    Args:
        path: the file.
        texts: refuse texts for what they are, too.

    Raises:
        FormatError: it is something else, which the message names, with the command that makes it readable where there is one.
        UsageError: it is not there, or cannot be read.
    """
    with opened(path, _NOUN) as file:
        head, size = pread(file, HEAD, 0), size_of(file)
        if not size:
            raise FormatError(f"{show(path)}: an empty file, of 0 bytes: download or write it again")
        container = _container(path, file, head)
        if container is None:
            _refuse_foreign(path, file, head, size, texts=texts)
        return container


def holds_checkpoint(path: Location) -> bool:
    """Whether a file's first bytes are those of a container that is read; it never raises for what a file is."""
    try:
        return recognize(path) is not None
    except StreamconvError:
        return False


def _container(path: Location, file: Opened, head: bytes) -> str | None:
    if head[8:].lstrip(b" \t\r\n").startswith(b"{") and int.from_bytes(head[:8], "little") <= MAX_JSON:
        return "safetensors"
    if head.startswith(b"PK\3\4"):
        _check_zip(path, file, head)
        return "torch"
    if is_legacy(head):
        return "torch"
    if head[257:262] == b"ustar" and head[:100].partition(b"\0")[0].decode("latin-1").rstrip("/") in _TORCH_TAR:
        return "torch"  # from before 2017: the reader says what to do
    return "mindspore" if _is_mindspore(head) else None


def _check_zip(path: Location, file: Opened, head: bytes) -> None:
    """Refuses a zip that is none of torch's, by the name of its first entry."""
    length = int.from_bytes(head[26:28], "little")
    first = pread(file, min(length, 4096), 30).decode("utf-8", "replace")
    if first.endswith(".npy"):
        raise foreign(path, "a file of numpy arrays (.npz)", "npz")
    if first in ("metadata.json", "config.json", "model.weights.h5"):
        raise foreign(path, "a model of Keras 3 (.keras), with HDF5 in it", "keras")
    if first == "[Content_Types].xml":
        raise foreign(path, "an Office document", "")
    inside = first.split("/")
    if len(inside) > 1 and _TORCH_ENTRY.fullmatch(inside[1]):
        return
    if len(inside) > 1 and inside[1] in ("archive_format", "serialized_exported_program.json"):
        raise foreign(path, "a program that torch.export wrote", "")
    if isinstance(path, RemotePath) or _lists_torch_entries(path):
        return  # what is wrong in it says the reader
    raise foreign(path, f"a zip archive, with {first[:200]!r} in it", "zip")


def _lists_torch_entries(path: Location) -> bool:
    """Whether a zip has torch's pickle in it, or a directory that cannot be read, as one that ends early."""
    if path.stat().st_size > 64 << 20:
        return True
    try:
        with zipfile.ZipFile(str(path)) as archive:
            return any(name.endswith(("/data.pkl", "/constants.pkl")) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError):
        return True


def _is_mindspore(head: bytes) -> bool:
    """Whether it begins with a record of a name and a tensor; a graph of TensorFlow has an operation's name in its place."""
    if head.startswith(b"crc_num") or head[1:4] == b"\x5e\x3a\x7f":
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


def _refuse_foreign(path: Location, file: Opened, head: bytes, size: int, *, texts: bool) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise lfs_pointer(path)
    for at, magic, what, command in _MAGICS:
        if head.startswith(magic, at):
            raise foreign(path, what, command)
    if head[257:262] == b"ustar":
        raise foreign(path, "a NeMo archive (tar)" if path.suffix == ".nemo" else "a tar archive", "tar")
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise foreign(path, describe_pickle(path, file, size), "pickle")
    if head[0] in _MSGPACK_MAPS and len(head) > 1 and {*head[1:6]} & {*_MSGPACK_TEXTS} and path.suffix in (".msgpack", ""):
        raise foreign(path, "MessagePack (Flax)", "flax")
    if message := _protobuf(path, head):
        raise foreign(path, message, {"ONNX": "onnx", "a TensorFlow SavedModel": "tensorflow"}.get(message, ""))
    if texts and len(head) >= 16 and (text := _text(head)):
        raise FormatError(f"{show(path)}: {text} and no weights; {READS}: download the file again, with the right address and credentials")
    for pattern, what, command in _NAMES:
        if re.fullmatch(pattern, path.name, re.DOTALL):
            raise foreign(path, what, command)
    if path.suffix == ".bin" and exists(path.parent / f"{PurePath(path.name).stem}.xml"):
        raise foreign(path, "the weights of OpenVINO, beside its .xml", "")
    if len(head) >= 64 and not any(pread(file, HEAD, start).strip(b"\0") for start in (0, size // 2, max(0, size - HEAD))):
        raise FormatError(f"{show(path)}: {size} bytes that are zero: it was never downloaded or written: download or write it again")


def _protobuf(path: Location, head: bytes) -> str | None:
    """ONNX, CoreML or a SavedModel: messages that begin with a version."""
    if not (head[:1] == b"\x08" and 0 < head[1] < 0x80 and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")):
        return None
    if path.suffix in (".mlmodel", ".pb"):
        return "CoreML" if path.suffix == ".mlmodel" else "a TensorFlow SavedModel"
    producer = head[4 : 4 + head[3]] if len(head) > 4 else b""
    named = head[2:3] == b"\x12" and producer.isascii() and producer[:1].isalpha()
    return "ONNX" if named or path.suffix == ".onnx" else None


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
