"""The log of an output: lines of JSON of which the first says whose the output is, and each other one what of it has become durable."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from streamconv import codec
from streamconv.errors import FormatError
from streamconv.storage import Version


class Holder(TypedDict):
    """The process that is at work."""

    pid: int
    host: str
    started: float | None


class Line(TypedDict, total=False):
    """A JSON object.

    The first line, the *head*, says which conversion this is by the digest of its ``plan``, which ``stale`` files go first, and either
    into how many ``parts`` its files are divided, or what a process that has it to itself went by: ``settings``, the ``ends`` of its
    sources, the ``tiling``, whether it gives its sources back (``reclaim``). Each other line says what has become durable since:
    ``finished`` files, with a digest where one is known, tasks of others by where they begin, files to be made ``again``; or who is at
    work by now, and with which tiling.
    """

    state: str
    advice: str
    version: int
    plan: str
    settings: dict[str, Any]
    ends: dict[str, str]
    tiling: str
    holder: Holder
    overwrite: bool
    reclaim: bool
    stale: dict[str, Version]
    parts: int
    finished: str
    digest: str
    durable: dict[str, tuple[int, ...]]
    again: str


def read_line(text: bytes) -> Line | None:
    """A line; None if it is none, as what a crash has cut off, or somebody has changed."""
    try:
        return codec.decode(text, Line) if text.endswith(b"\n") else None
    except FormatError:
        return None


def read_lines(text: bytes) -> tuple[list[Line], int]:
    """The whole lines at the beginning of a log, and how many bytes they are."""
    lines: list[Line] = []
    size = 0
    for row in text.splitlines(keepends=True):
        line = read_line(row)
        if line is None:
            break
        lines.append(line)
        size += len(row)
    return lines, size


def read_head(text: bytes) -> Line:
    """The first line of a log; an empty one where that cannot be read."""
    return read_line(text[: text.find(b"\n") + 1]) or {}


class Log:
    """What of an output is done, as far as this process knows; on the disk, too, where it has an open file.

    Attributes:
        finished: files that are complete, durable and under their final names, with a digest where one is known.
        durable: of other files, by name, where the tasks begin whose bytes are durable.
        kept: bytes that an earlier run left, and that hold what they should.
        is_kept: a run after this one will know, too.
    """

    def __init__(self, fd: int = -1) -> None:
        self.finished: dict[str, str] = {}
        self.durable: dict[str, set[int]] = {}
        self.kept = 0
        self._fd = fd
        self._lock = threading.Lock()

    @property
    def is_kept(self) -> bool:
        return self._fd >= 0

    def record(self, done: Mapping[str, Iterable[int]]) -> None:
        """Notes that tasks are durable: by file, where they begin."""
        self.append({"durable": {name: tuple(sorted(places)) for name, places in done.items()}})

    def finish(self, name: str, digest: str = "") -> None:
        """Notes that ``name`` is complete, durable and under its final name."""
        self.append({"finished": name, "digest": digest})

    def forget(self, name: str) -> None:
        """Notes that ``name`` has to be made again."""
        self.append({"again": name})

    def append(self, line: Line) -> None:
        """Notes a line, durably where there is a file."""
        with self._lock:
            if self.is_kept:
                view = memoryview(codec.encode(line) + b"\n")
                while view:
                    view = view[os.write(self._fd, view) :]
                os.fsync(self._fd)
            self._take(line)

    def replay(self, lines: Iterable[Line]) -> None:
        """Takes into account what an earlier run has noted."""
        for line in lines:
            self._take(line)

    def close(self) -> None:
        """Lets go of the file, and of what locks it."""
        if self.is_kept:
            os.close(self._fd)
            self._fd = -1

    def _take(self, line: Line) -> None:
        if "tiling" in line:
            self.durable.clear()
        for name, places in line.get("durable", {}).items():
            self.durable.setdefault(name, set()).update(places)
        if "finished" in line:
            self.finished[line["finished"]] = line.get("digest", "")
            self.durable.pop(line["finished"], None)
        if "again" in line:
            self.finished.pop(line["again"], None)
            self.durable.pop(line["again"], None)
