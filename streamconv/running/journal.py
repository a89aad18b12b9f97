"""The state of an interrupted run, beside its output: which conversion it is, what of it is durable, and who is at it.

Its presence says that the output is not complete. It is there, with its first line, before the first byte of output, and goes after the
commit. One JSON object a line: the first says which conversion this is, each other one what has become durable since; a line that a
crash cut off counts for nothing. The run that holds the file's lock (``flock``) is the one at work: a dead one holds none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamconv import codec
from streamconv.engine import order
from streamconv.engine.io import sync_directory
from streamconv.errors import DestinationError
from streamconv.planning.plan import VERSION, Plan, SourceFile
from streamconv.running.lines import Holder, Line, read_line
from streamconv.storage import is_url
from streamconv.storage.reading import check_whole, read_whole

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None  # type: ignore[assignment]

NAME = ".streamconv.json"
DRAFT = ".new"  # at the end of that, until its first line is there
HEAD, TAIL = 256 << 10, 64 << 10  # bytes of a source that tell it from another: a container's table of contents is at one end
MOST = 256 << 20  # bytes of a journal
ONLY_COPY = "holds the only copy of tensors whose source was given back (--reclaim-source)"
IN_PARTS = "its files are made in parts: make the others with 'streamconv run PLAN --part I/N', then 'streamconv run PLAN --finish'"
_OWN = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_STRANGE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EINVAL, errno.EFBIG}  # what links, folders, devices and large files say
ATTEMPTS = 3  # to remove what must not be left, where the system fails now and then
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
_NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


def journal_path(root: Path, single_file: str | None) -> Path:
    """Where the journal of an output directory, or of an output file in a directory of others, lies."""
    return root / (f".{single_file}{NAME}" if single_file else NAME)


class Ledger:
    """What of an output is done, as far as this process knows.

    Attributes:
        finished: files that are complete, durable and under their final names, with a digest where one is known.
        durable: of other files, by name, where the tasks begin whose bytes are durable.
    """

    def __init__(self) -> None:
        self.finished: dict[str, str] = {}
        self.durable: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def record(self, done: Mapping[str, Iterable[int]]) -> None:
        """Notes that tasks are durable: by file, where they begin."""
        self._append({"durable": {name: tuple(sorted(places)) for name, places in done.items()}})

    def finish(self, name: str, digest: str = "") -> None:
        """Notes that ``name`` is complete, durable and under its final name."""
        self._append({"finished": name, "digest": digest})

    def forget(self, name: str) -> None:
        """Notes that ``name`` has to be made again."""
        self._append({"again": name})

    def end(self) -> None:
        """The conversion is complete."""

    def _append(self, line: Line) -> None:
        with self._lock:
            self._read(line)

    def _read(self, line: Line) -> None:
        """Takes a line into account."""
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


class Journal(Ledger):
    """The journal at ``path`` of the conversion that ``plan`` is: what a run after this one will know, too.

    Attributes:
        overwrites: old files in DST are to be removed before anything is written, also by the run that takes this one up.
    """

    def __init__(
        self, path: Path, plan: Plan, settings: Mapping[str, Any] | None = None, *, overwrite: bool = False, reclaim: bool = False
    ) -> None:
        super().__init__()
        self.path = path
        self.overwrites = overwrite
        self._plan, self._settings, self._reclaim = plan, dict(settings or {}), reclaim
        self._fd = -1

    def begin(self, *, resume: bool) -> None:
        """Starts a new journal, or takes up the one that is there; either way nobody else writes there until `close`.

        Raises:
            DestinationError: another run is at it, or what is there belongs to another conversion.
        """
        if resume and (fd := self._take(self.path, os.O_RDWR | os.O_APPEND)) >= 0:
            self._fd = fd
            self._take_up()
            return
        draft = self.path.with_name(f"{self.path.name}{DRAFT}")
        try:
            self._fd = self._take(draft, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self._create(draft)
        except BaseException as error:
            if self._fd >= 0 or (isinstance(error, OSError) and _is_empty(draft)):  # else it is another run's
                _discard(draft)
            self.close()
            if self.overwrites and not isinstance(error, DestinationError):
                note_overwrite(self.path, self._settings)
            raise

    def end(self) -> None:
        """The conversion is complete."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets others at the output; what is recorded stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _create(self, draft: Path) -> None:
        """Makes a draft the journal; by its lock no other run begins between the look at the old one and that."""
        old = self._take(self.path, os.O_RDWR)
        try:
            if old >= 0 and is_only_copy(self.path):
                raise DestinationError(f"{self.path.parent}: {ONLY_COPY}: finish that run with --resume")
            os.ftruncate(self._fd, 0)
            self._append(self._describe())
            draft.replace(self.path)
            sync_directory(str(self.path.parent))
        finally:
            if old >= 0:
                os.close(old)

    def _describe(self) -> Line:
        """The first line."""
        line: Line = {
            "state": "incomplete",
            "advice": "this conversion was interrupted or is running; rerun the same command with --resume",
            "version": VERSION,
            "plan": self._plan.digest(),
            "settings": self._settings,
            "sources": {source.path: (source.size, source.mtime_ns, _read_ends(source)) for source in self._plan.sources},
            "tiling": _tiling(self._plan),
            "holder": _describe_process(),
            "overwrite": self.overwrites,
        }
        if self._reclaim:
            line["reclaim"] = self._plan.to_json()
        return line

    def _take_up(self) -> None:
        lines, size, rest = _read_lines(self._fd)
        first: Line = lines[0] if lines else {}
        if "parts" in first:
            self.close()
            raise DestinationError(f"{self._plan.destination}: {IN_PARTS}, or start afresh with --overwrite")
        if difference := self._find_difference(first):
            self.close()
            raise DestinationError(
                f"{self.path}: the interrupted run was another one ({difference}): "
                + (
                    "give the options of that run"
                    if first.get("reclaim")
                    else "start afresh with --overwrite, or give the options of that run"
                )
            )
        if self._reclaim and b"\n" in rest:  # no crash leaves that
            self.close()
            raise DestinationError(f"{self.path}: line {len(lines) + 1} is damaged, and DST {ONLY_COPY}: restore that line")
        os.ftruncate(self._fd, size)
        self.overwrites = bool(first.get("overwrite"))
        for line in lines:
            self._read(line)
        self._append({"holder": _describe_process()})
        if _tiling(self._plan) != _last(lines, "tiling"):  # other memory or workers: what is half done was cut otherwise
            self._append({"tiling": _tiling(self._plan)})

    def _find_difference(self, found: Line) -> str | None:
        """What makes this conversion another one than the one whose first line is ``found``."""
        mine = self._describe()
        if not {"plan", "settings", "sources", "tiling"} <= found.keys():
            return "its journal cannot be read"
        if found.get("version") != VERSION:
            return f"its plan is of version {found.get('version')}, not {VERSION}"
        if bool(found.get("reclaim")) != self._reclaim:
            return f"--reclaim-source was {'' if found.get('reclaim') else 'not '}given"
        same = found["plan"] == mine["plan"]
        settings = found["settings"]
        if self._reclaim or not same:  # with the same plan, options may say the same in other words
            for key in sorted(settings.keys() & self._settings.keys()):
                if settings[key] != self._settings[key]:
                    return f"{key} was {settings[key]!r}, is {self._settings[key]!r}"
        if not self._reclaim:  # whose sources are checked, as far as they are still needed, before they are read
            for path in sorted({*found["sources"], *mine["sources"]}):
                old, new = found["sources"].get(path), mine["sources"].get(path)
                if old != new:
                    return f"{path} {_compare(old, new)}"
        return None if same else "other options, recipe or release"

    def _append(self, line: Line) -> None:
        with self._lock:
            view = memoryview(codec.encode(line) + b"\n")
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
            self._read(line)

    def _take(self, path: Path, flags: int) -> int:
        """A descriptor of ``path``, locked, or -1 if it is not there.

        Raises:
            DestinationError: another run has it.
        """
        while True:
            try:
                fd = os.open(path, flags | _OWN, 0o666)
            except FileNotFoundError:
                return -1
            except OSError as error:
                if error.errno not in _STRANGE:
                    raise
                raise _describe_stranger(path, error) from error
            try:
                check_whole(fd, MOST)
            except OSError as error:
                os.close(fd)
                if error.errno not in _STRANGE:
                    raise
                raise _describe_stranger(path, error) from error
            if not _lock_or_close(fd):
                holder = _last(_read_lines(fd)[0], "holder") or {}
                os.close(fd)
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise DestinationError(f"{self.path.parent}: {who} is writing there: wait for it, or give another DST")
            try:
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # it was finished and removed in between


def _describe_stranger(path: Path, error: OSError) -> DestinationError:
    """What is said of something in a journal's place that cannot be one."""
    return DestinationError(f"{path}: is in the place of this output's journal and {error.strerror}: remove it, or give another DST")


def note_overwrite(path: Path, settings: Mapping[str, Any]) -> None:
    """Notes beside an output, if there is one, that a conversion will replace it: one that resumes then does, if this one is killed.

    Args:
        path: of the journal to come.
        settings: what decides which conversion it is.
    """
    line: Line = {"state": "not begun", "advice": "rerun the same command, or with --resume", "overwrite": True, "settings": dict(settings)}
    with suppress(OSError):  # what cannot be noted is said when DST is written to
        fd = os.open(path.with_name(f"{path.name}{DRAFT}"), os.O_RDWR | os.O_CREAT | os.O_APPEND | _OWN, 0o666)
        try:
            if _lock(fd):  # else another run is at it, which is said later
                os.ftruncate(fd, 0)
                os.write(fd, codec.encode(line) + b"\n")
        finally:
            os.close(fd)


def is_overwrite_noted(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `note_overwrite` has noted this conversion, whose journal was not begun."""
    first = read_journal(path.with_name(f"{path.name}{DRAFT}"))[0]
    return first.get("overwrite") is True and first.get("settings") == dict(settings)


def forget_overwrite(path: Path) -> None:
    """Takes back what `note_overwrite` has noted."""
    _discard(path.with_name(f"{path.name}{DRAFT}"))


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def _discard(draft: Path) -> None:
    for _ in range(ATTEMPTS):
        with suppress(OSError):
            draft.unlink(missing_ok=True)
            return


def is_only_copy(path: Path) -> bool:
    """Whether the run of this journal has given parts of its source back; also of a damaged one that may have."""
    first, finished = read_journal(path)
    if first:
        return "reclaim" in first and bool(finished)
    return b'"reclaim":' in _read_if_there(path)


def read_journal(path: Path) -> tuple[Line, dict[str, str]]:
    """A journal's first line and its finished files; nothing where there is none, or something that cannot be one.

    Raises:
        OSError: it cannot be read now.
    """
    lines, _, _ = _split_lines(_read_if_there(path))
    found = {line["finished"]: line.get("digest", "") for line in lines if "finished" in line}
    return (lines[0] if lines else {}), found


def _read_if_there(path: Path) -> bytes:
    try:
        return read_whole(path, MOST)
    except OSError as error:
        if error.errno in _ABSENT | _STRANGE:
            return b""
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read_lines(fd: int) -> tuple[list[Line], int, bytes]:
    """The whole lines of an open journal, how many bytes they are, and what follows that is none."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return _split_lines(file.read(check_whole(fd, MOST)))


def _split_lines(text: bytes) -> tuple[list[Line], int, bytes]:
    lines: list[Line] = []
    size = 0
    for row in text.splitlines(keepends=True):
        line = read_line(row)
        if line is None:
            break
        lines.append(line)
        size += len(row)
    return lines, size, text[size:]


def _last(lines: Iterable[Mapping[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(list(lines)) if key in line), None)


def _lock(fd: int) -> bool:
    """Takes a file's lock; where there are none, whether the last holder is gone."""
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    holder = _last(_read_lines(fd)[0], "holder")
    return holder is None or not _is_alive(holder)


def _lock_or_close(fd: int) -> bool:
    """`_lock`; a descriptor that cannot be locked for another reason is closed."""
    try:
        return _lock(fd)
    except OSError:
        os.close(fd)
        raise


def _is_alive(holder: Holder) -> bool:
    """Whether a process is there; of those on other hosts nobody knows."""
    if holder["host"] != socket.gethostname():
        return True
    return holder["pid"] != os.getpid() and holder["started"] is not None and _read_start(holder["pid"]) == holder["started"]


def _describe_process() -> Holder:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _read_start(os.getpid())}


def _read_start(pid: int) -> float | None:
    """When a process began, in the system's own measure; None where it is not there."""
    if sys.platform == "linux":
        try:
            return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        except OSError:
            return None
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _tiling(plan: Plan) -> str:
    """Identifies how a plan's segments are cut into tasks."""
    tiles = [getattr(segment, "tile", None) for file in plan.files for segment in file.segments]
    return hashlib.sha256(repr((order.COPY_CHUNK, tiles)).encode()).hexdigest()


def _read_ends(source: SourceFile) -> str:
    """SHA-256 of the first and last bytes of a source, of a URL its tag; nothing where it is gone."""
    if is_url(source.path):
        return source.tag
    found = hashlib.sha256()
    try:
        with Path(source.path).open("rb") as file:
            found.update(file.read(HEAD))
            file.seek(max(HEAD, source.size - TAIL))
            found.update(file.read(TAIL))
    except FileNotFoundError:
        return ""
    return found.hexdigest()


def _compare(old: tuple[int, int, str] | None, new: tuple[int, int, str] | None) -> str:
    """How a source differs from what it was."""
    if old is None or new is None:
        return "was not read" if old is None else "is not read any more"
    if old[0] != new[0]:
        return f"had {old[0]} bytes, has {new[0]}"
    return "was modified" if old[1] != new[1] else "has other bytes"
