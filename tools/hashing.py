"""Runs streamconv with a place for outputs that keeps no data: ``sha256://NAME`` hashes what is written to it, ``discard://NAME`` does not.

    python -m tools.hashing --out digests.json convert SRC sha256://any --max-memory 300MB

``digests.json`` gets each file's size and sha256 (empty for ``discard``), and the process's peak of resident memory, in bytes. It is also
an example of a file system of one's own: whatever is registered with fsspec can be a DST.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from streamconv import memory
from streamconv.cli import command as cli

SMALL = 1 << 20  # bytes of a file that is kept, so that what a run notes there can be read back


class _File(AbstractBufferedFile):  # type: ignore[misc]
    """A file of which only the digest grows."""

    def _initiate_upload(self) -> None:
        self.digest = hashlib.sha256()
        self.written = 0
        self.head = b""

    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getbuffer()
        if self.fs.hashes:
            self.digest.update(data)
        if self.written + len(data) <= SMALL:
            self.head += bytes(data)
        self.written += len(data)
        data.release()
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        self.fs.take(self.path, self.written, self.digest.hexdigest() if self.fs.hashes else "", self.head)

    def discard(self) -> None:
        self.fs.files.pop(self.path, None)


class HashingFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Files by their path: size, digest, and the data of small ones."""

    protocol = "sha256"
    hashes = True
    cachable = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.files: dict[str, tuple[int, str, bytes]] = {}

    def take(self, path: str, size: int, digest: str, data: bytes) -> None:
        """A file is complete."""
        self.files[path] = size, digest, data if size <= SMALL else b""

    def _open(self, path: str, mode: str = "rb", block_size: int = 1 << 20, **settings: Any) -> _File:
        if mode != "wb":
            raise NotImplementedError("what is hashed cannot be read")
        return _File(self, path, mode, block_size=block_size, autocommit=settings.get("autocommit", True))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        found = [self._info(name) for name in self.files if name == path or name.rpartition("/")[0] == path]
        return found if detail else [info["name"] for info in found]

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        path = self._strip_protocol(path).rstrip("/")
        found = {name: self._info(name) for name in self.files if name == path or name.startswith(f"{path}/")}
        return found if detail else list(found)

    def _info(self, name: str) -> dict[str, Any]:
        size, digest, _ = self.files[name]
        return {"name": name, "size": size, "type": "file", "ETag": digest}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return self._info(path)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.take(self._strip_protocol(path), len(value), hashlib.sha256(value).hexdigest(), value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        size, _digest, data = self.files[self._strip_protocol(path)]
        if size > SMALL:
            raise NotImplementedError(f"{path}: what is hashed cannot be read")
        return data[start:end]

    def rm_file(self, path: str) -> None:
        del self.files[self._strip_protocol(path)]


class DiscardingFileSystem(HashingFileSystem):
    """The same without digests."""

    protocol = "discard"
    hashes = False


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.hashing", description="Run streamconv with sha256:// and discard:// as DST.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where sizes, digests and memory go")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what streamconv is given")
    options = parser.parse_args(arguments)
    for kind in (HashingFileSystem, DiscardingFileSystem):
        fsspec.register_implementation(kind.protocol, kind)
    code = cli.main(options.command)
    if options.out is not None:
        made = {**HashingFileSystem().files, **DiscardingFileSystem().files}
        files = {name: {"size": size, "sha256": digest} for name, (size, digest, _) in made.items()}
        options.out.write_text(json.dumps({"files": files, "peak_memory": memory.peak()}, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
