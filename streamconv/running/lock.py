"""An output that one process alone writes: the log is locked (``flock``) by the run at work; a dead one holds no lock."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamconv.engine import order
from streamconv.engine.io import sync_directory
from streamconv.errors import DestinationError, writing
from streamconv.graph.losses import Losses
from streamconv.planning.plan import Plan, SourceFile
from streamconv.running.difference import find_difference
from streamconv.running.directory import PARTIAL, Directory, new_suffix, partial, write_durably
from streamconv.running.filling import LocalEngine
from streamconv.running.holder import describe_process, last_value, open_locked, read_log
from streamconv.running.intent import discard, draft_of, is_empty, is_overwrite_noted, note_overwrite
from streamconv.running.log import Line, Log
from streamconv.running.output import IN_PARTS, ONLY_COPY, PLAN, describe, is_only_copy
from streamconv.running.reclaim import Reclaim
from streamconv.storage import Version, is_url

HEAD, TAIL = 256 << 10, 64 << 10  # bytes of a source that tell it from another: a container's table of contents is at one end
ADVICE = "this conversion was interrupted or is running; rerun the same command with --resume"
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

    @property
    def kept(self) -> int:
        """Bytes that an earlier run left, and that hold what they should."""
        return self.log.kept

    def take(self, *, goes_on: bool, stale: Callable[[], Iterable[str]] | None = None) -> None:
        """Goes on with what is begun there, if something is and that is wanted, or begins; nobody else writes there until `release`.

        Args:
            goes_on: take up what an interrupted run of this conversion has left.
            stale: what is to be removed first, looked at when DST is this process's; also by a run that takes this one up.

        Raises:
            DestinationError: another run is at it, or what is there belongs to another conversion.
        """
        fd = open_locked(self.output.log, os.O_RDWR | os.O_APPEND) if goes_on else -1
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

    def make(self, plan: Plan, numbers: Iterable[int], tell: Callable[[int], None]) -> Losses:  # noqa: ARG002 - it makes all
        """Makes the plan's files, the commit last; what their values have lost."""
        engine = LocalEngine(plan, self.log, tell, checksum=self._checksum, reclaim=self._reclaim)
        engine.run()
        return engine.losses

    def leave(self) -> None:
        """The output is complete: nothing of the state stays."""
        self.output.leave()
        self.release()

    def release(self) -> None:
        """Lets others at the output; what is noted stays."""
        self.log.close()

    def _begin(self, stale: Callable[[], Iterable[str]] | None) -> Line:
        """Begins a new log; a draft of it is locked first, so that no other run begins between the looks and the log's being there."""
        draft = draft_of(self.output)
        fd = -1
        try:
            draft.parent.mkdir(exist_ok=True)
            fd = open_locked(draft, os.O_RDWR | os.O_CREAT)
            self.log = Log(fd)
            return self._replace(draft, fd, stale)
        except BaseException as error:
            if fd >= 0 or (isinstance(error, OSError) and is_empty(draft)):  # else it is another run's
                discard(draft)
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
        olds = [open_locked(path, os.O_RDWR) for path in (directory.log, directory.earlier)]
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
            "holder": describe_process(),
            "overwrite": overwrite,
            "stale": dict(stale),
            "reclaim": self._reclaim is not None,
        }

    def _read_ends(self) -> dict[str, str]:
        return {source.path: _read_ends(source) for source in self._plan.sources}

    def _take_up(self, fd: int) -> Line:
        """Goes on with the log that is there; its head."""
        lines, size, is_damaged = read_log(fd)
        head: Line = lines[0] if lines else {}
        try:
            self._check(head, f"line {len(lines) + 1} is damaged" if is_damaged else None)
        except BaseException:
            self.release()
            raise
        os.ftruncate(fd, size)
        self.output.keep(PLAN, self._plan.json_pieces)  # which a run that was to replace this one may have taken away
        self.log.replay(lines)
        self.log.append({"holder": describe_process()})
        if _tiling(self._plan) != last_value(lines, "tiling"):  # other memory or workers: what is half done was cut otherwise
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
