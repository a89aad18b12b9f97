"""An output that one process alone writes: the log is locked (``flock``) by the run at work; a dead one holds no lock."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamconv import codec
from streamconv.engine import order
from streamconv.engine.io import check_folder, sync_directory
from streamconv.errors import DestinationError, writing
from streamconv.planning.plan import Plan, SourceFile
from streamconv.running.difference import find_difference
from streamconv.running.directory import DRAFT, PARTIAL, STRANGE, Directory, new_suffix, partial, write_durably
from streamconv.running.local import LocalEngine
from streamconv.running.log import Holder, Line, Log, read_head, read_lines
from streamconv.running.output import IN_PARTS, MOST, ONLY_COPY, PLAN, describe, is_only_copy
from streamconv.running.reclaim import Reclaim
from streamconv.storage import Version, is_url
from streamconv.storage.reading import check_whole

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None  # type: ignore[assignment]

HEAD, TAIL = 256 << 10, 64 << 10  # bytes of a source that tell it from another: a container's table of contents is at one end
ADVICE = "this conversion was interrupted or is running; rerun the same command with --resume"
_OWN = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
_ATTEMPTS = 3  # to remove what must not be left, where the system fails now and then
_NEEDED = {"plan", "version", "settings", "ends", "tiling"}


class Lock:
    """The right of this process alone to write an output, and the log of what it has done.

    Args:
        output: where files go.
        plan: what is made there.
        settings: what the plan was made with, to say what differs.
        reclaim: gives sources back meanwhile.
        checksum: `SUMS` is made, too.

    Attributes:
        log: of what is done, from `take` on.
        goes_on: what an interrupted run has left was taken up.
        suffix: the longest that names of files have until they are complete.
    """

    def __init__(
        self,
        output: Directory,
        plan: Plan,
        settings: Mapping[str, Any] | None = None,
        *,
        reclaim: Reclaim | None = None,
        checksum: bool = False,
    ) -> None:
        self.log = Log()
        self.goes_on = False
        self.suffix = PARTIAL
        self.output, self._plan = output, plan
        self._settings, self._reclaim, self._checksum = dict(settings or {}), reclaim, checksum

    def settle(self, *, overwrite: bool, resume: bool) -> tuple[bool, bool]:
        """Which of both it is to be, if both are said, or an overwrite was killed before it was begun."""
        if resume and is_overwrite_noted(self.output, self._settings):
            return True, False
        if overwrite and resume:
            resume = self.output.is_begun() or self.is_complete()
            return not resume, resume
        return overwrite, resume

    def list_numbers(self) -> list[int]:
        """The numbers of the files that this process is to see to: all."""
        return list(range(len(self._plan.files)))

    def is_complete(self) -> bool:
        """Whether all files are there, at their sizes."""
        paths = {self.output.root / file.path: file.size for file in self._plan.files}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def find_missing(self, *_: object) -> list[int]:
        """All files: the engine finds in the log what of them is done."""
        return self.list_numbers()

    def count_finished(self) -> int:
        """Of the files that `find_missing` gives, how many are there."""
        return len(self.log.finished)

    def take(self, *, goes_on: bool, stale: Callable[[], Iterable[str]] | None = None) -> None:
        """Goes on with what is begun there, if something is and that is wanted, or begins; nobody else writes there until `release`.

        Args:
            goes_on: take up what an interrupted run of this conversion has left.
            stale: what is to be removed first, looked at when DST is this process's; also by a run that takes this one up.

        Raises:
            DestinationError: another run is at it, or what is there belongs to another conversion.
        """
        fd = _open_locked(self.output.log, os.O_RDWR | os.O_APPEND) if goes_on else -1
        self.goes_on = fd >= 0
        if self.goes_on:
            self.log = Log(fd)
            head = self._take_up(fd)
        else:
            head = self._begin(stale)
        if not self.goes_on and stale is None:
            self._check_empty()
        with writing():
            self.output.remove(head.get("stale", {}), ())

    def _check_empty(self) -> None:
        """Refuses an output that another run has finished since it was looked at. Raises DestinationError."""
        try:
            self.output.check_empty()
        except DestinationError:
            self.leave()
            raise

    def make(self, plan: Plan, numbers: Iterable[int], tell: Callable[[int], None]) -> Counter[str]:  # noqa: ARG002 - it makes all
        """Makes the plan's files, the commit last; what has overflowed in them."""
        engine = LocalEngine(plan, self.log, tell, checksum=self._checksum, reclaim=self._reclaim)
        engine.run()
        return engine.overflowed

    def leave(self) -> None:
        """The output is complete: nothing of the state stays."""
        self.output.leave()
        self.release()

    def release(self) -> None:
        """Lets others at the output; what is noted stays."""
        self.log.close()

    def _begin(self, stale: Callable[[], Iterable[str]] | None) -> Line:
        """Begins a new log; a draft of it is locked first, so that no other run begins between the looks and the log's being there."""
        draft = _draft_of(self.output)
        fd = -1
        try:
            draft.parent.mkdir(exist_ok=True)
            fd = _open_locked(draft, os.O_RDWR | os.O_CREAT)
            self.log = Log(fd)
            return self._replace(draft, fd, stale)
        except BaseException as error:
            if fd >= 0 or (isinstance(error, OSError) and _is_empty(draft)):  # else it is another run's
                _discard(draft)
            self.release()
            if stale is not None and not isinstance(error, DestinationError):
                note_overwrite(self.output, self._settings)
            raise

    def _replace(self, draft: Path, fd: int, stale: Callable[[], Iterable[str]] | None) -> Line:
        """Makes the draft the log, in the place of one that is there.

        A kill at any step leaves either what a resuming run begins this conversion anew by, or a log beside its plan.
        """
        directory = self.output
        plan = partial(directory.state / PLAN, new_suffix())
        olds = [_open_locked(path, os.O_RDWR) for path in (directory.log, directory.earlier)]
        try:
            if olds[0] >= 0 and is_only_copy(directory.load(directory.log.name) or b""):
                raise DestinationError(f"{directory.root}: {ONLY_COPY}: finish that run with --resume")
            head = self._describe(directory.look(stale()) if stale else {}, overwrite=stale is not None)
            os.lseek(fd, 0, os.SEEK_SET)
            self.log.append(head)  # over the note of an overwrite, which says of whose it is what the head says, too
            os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))
            os.fsync(fd)
            write_durably(plan, self._plan.json_pieces())
            directory.log.unlink(missing_ok=True)
            plan.replace(directory.state / PLAN)
            draft.replace(directory.log)
            sync_directory(str(directory.state))
            sync_directory(str(directory.root))
            directory.drop_earlier()
        finally:
            with suppress(OSError):
                plan.unlink(missing_ok=True)
            for old in olds:
                if old >= 0:
                    os.close(old)
        return head

    def _describe(self, stale: Mapping[str, Version], *, overwrite: bool) -> Line:
        """The head of a new log."""
        return {
            **describe(self._plan),
            "advice": ADVICE,
            "settings": self._settings,
            "ends": self._read_ends(),
            "tiling": _tiling(self._plan),
            "holder": _describe_process(),
            "overwrite": overwrite,
            "stale": dict(stale),
            "reclaim": self._reclaim is not None,
        }

    def _read_ends(self) -> dict[str, str]:
        return {source.path: _read_ends(source) for source in self._plan.sources}

    def _take_up(self, fd: int) -> Line:
        """Goes on with the log that is there; its head."""
        lines, size, is_damaged = _read_log(fd)
        head: Line = lines[0] if lines else {}
        try:
            self._check(head, f"line {len(lines) + 1} is damaged" if is_damaged else None)
        except BaseException:
            self.release()
            raise
        os.ftruncate(fd, size)
        self.output.keep(PLAN, self._plan.json_pieces)  # which a run that was to replace this one may have taken away
        self.log.replay(lines)
        self.log.append({"holder": _describe_process()})
        if _tiling(self._plan) != _last(lines, "tiling"):  # other memory or workers: what is half done was cut otherwise
            self.log.append({"tiling": _tiling(self._plan)})
        return head

    def _check(self, head: Line, damage: str | None) -> None:
        """Refuses to go on with another conversion than that of a log with this head, or by a damaged one. Raises DestinationError."""
        if "parts" in head:
            raise DestinationError(f"{self.output.where}: {IN_PARTS}, or start afresh with --overwrite")
        if difference := self._find_difference(head):
            afresh = "" if head.get("reclaim") else "start afresh with --overwrite, or "
            what = f"the interrupted run was another one ({difference})"
            raise DestinationError(f"{self.output.log}: {what}: {afresh}give the options of that run")
        if self._reclaim and damage:  # no crash leaves that
            raise DestinationError(f"{self.output.log}: {damage}, and DST {ONLY_COPY}: restore that line")

    def _find_difference(self, head: Line) -> str | None:
        """What makes this conversion another one than the one with this head."""
        if not head.keys() >= _NEEDED:
            return "its log cannot be read"
        if head.get("reclaim", False) != (self._reclaim is not None):
            return f"--reclaim-source was {'not ' if self._reclaim else ''}given"
        if difference := find_difference(self.output, head, self._plan, self._settings, exact=self._reclaim is not None):
            return difference
        if self._reclaim:  # whose sources are checked, as far as they are still needed, before they are read
            return None
        before, now = head["ends"], self._read_ends()
        return next((f"{path} has other bytes" for path in sorted(now) if before.get(path) != now[path]), None)


def _open_locked(path: Path, flags: int) -> int:
    """A descriptor of ``path``, locked, or -1 if it is not there.

    Raises:
        DestinationError: another run has it, or it is no file.
    """
    while True:
        try:
            fd = os.open(path, flags | _OWN, 0o666)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except OSError as error:
            raise _describe_stranger(path, error) from error
        try:
            check_whole(fd, MOST)
        except OSError as error:
            os.close(fd)
            raise _describe_stranger(path, error) from error
        if not _lock_or_close(fd):
            holder = _last(_read_log(fd)[0], "holder") or {}
            os.close(fd)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise DestinationError(f"{path.parent}: {who} is writing there: wait for it, or give another DST")
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # it was finished and removed in between


def _describe_stranger(path: Path, error: OSError) -> Exception:
    """What is said of something in a log's place that cannot be one; an error of another kind as it is."""
    if error.errno not in STRANGE:
        return error
    return DestinationError(f"{path}: is in the place of this output's log and {error.strerror}: remove it, or give another DST")


# An overwrite that is not begun ------------------------------------------------------------------------------------


def note_overwrite(directory: Directory, settings: Mapping[str, Any]) -> None:
    """Notes in an output, if there is one, that a conversion will replace it: one that resumes then does, if this one is killed.

    Args:
        directory: the output.
        settings: what decides which conversion it is.
    """
    line: Line = {"state": "not begun", "advice": "rerun the same command, or with --resume", "overwrite": True, "settings": dict(settings)}
    draft = _draft_of(directory)
    with suppress(OSError, DestinationError):  # what cannot be noted is said when DST is written to
        draft.parent.mkdir(exist_ok=True)
        check_folder(draft.parent)
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_APPEND | _OWN, 0o666)
        try:
            if _lock(fd):  # else another run is at it, which is said later
                os.ftruncate(fd, 0)
                os.write(fd, codec.encode(line) + b"\n")
        finally:
            os.close(fd)


def is_overwrite_noted(directory: Directory, settings: Mapping[str, Any]) -> bool:
    """Whether `note_overwrite` has noted this conversion, which was not begun."""
    head = read_head(directory.load(_draft_of(directory).name) or b"")
    return head.get("overwrite") is True and head.get("settings") == dict(settings)


def forget_overwrite(directory: Directory) -> None:
    """Takes back what `note_overwrite` has noted."""
    if not directory.state.is_symlink():
        _discard(_draft_of(directory))


def _draft_of(directory: Directory) -> Path:
    return directory.log.with_name(f"{directory.log.name}{DRAFT}")


def _discard(draft: Path) -> None:
    for _ in range(_ATTEMPTS):
        with suppress(OSError):
            draft.unlink(missing_ok=True)
            break
    with suppress(OSError):  # it holds a log
        draft.parent.rmdir()


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


# Who is at work ----------------------------------------------------------------------------------------------------


def _read_log(fd: int) -> tuple[list[Line], int, bool]:
    """The whole lines of an open log, how many bytes they are, and whether a whole line follows that is none."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        text = file.read(check_whole(fd, MOST))
    lines, size = read_lines(text)
    return lines, size, b"\n" in text[size:]


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
    holder = _last(_read_log(fd)[0], "holder")
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
    digest = hashlib.sha256()
    try:
        with Path(source.path).open("rb") as file:
            digest.update(file.read(HEAD))
            file.seek(max(HEAD, source.size - TAIL))
            digest.update(file.read(TAIL))
    except FileNotFoundError:
        return ""
    return digest.hexdigest()
