"""What the outputs of a conversion are written to: a directory, an object store, a repository on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored file: its size in bytes and what changes with its content (an ETag, a digest), as far as the store tells."""

    size: int
    tag: str = ""


class Sink(Protocol):
    """A place for the files of an output, by names relative to it. A file appears whole under its name, or not at all."""

    url: str
    streams: bool
    """Whether files may be written front to back as they come; else they are made on this machine and uploaded."""

    def list(self) -> Mapping[str, Entry]:
        """What is there."""
        ...

    def stream(self, name: str, size: int) -> AbstractContextManager[Callable[[memoryview], None]]:
        """What takes a file of ``size`` bytes piece by piece; the file is there when the block is left without an error."""
        ...

    def upload(self, name: str, path: Path) -> None:
        """Puts a complete local file there."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Puts a small file there."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...
