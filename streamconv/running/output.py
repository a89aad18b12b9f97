"""The state of an output: its plan lies in it, and beside that a log of what has become durable, until all is there.

`Directory` and `Bucket` are the two kinds of outputs. Whoever writes one takes it (`Lock`: this process alone; `Lease`: all processes with
the same plan), makes what is missing, commits the index last, and leaves: nothing of ours stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from streamconv.errors import DestinationError, FormatError
from streamconv.planning.plan import VERSION, Plan
from streamconv.running.log import Line, read_head, read_lines
from streamconv.storage import Version
from streamconv.storage.sinks import Sink

STATE = ".streamconv"
PLAN, LOG = "plan.json", "log.jsonl"
MOST = 256 << 20  # bytes of a log
MOST_OF_PLAN = 512 << 20  # bytes of a plan: one of a million tensors has fewer
ONLY_COPY = "holds the only copy of tensors whose source was given back (--reclaim-source)"
IN_PARTS = "its files are made in parts: make the others with 'streamconv run PLAN --part I/N', then 'streamconv run PLAN --finish'"
EARLIER = ".json"  # at the end of that: the file in which earlier releases kept what they had begun


def state_name(single: str | None) -> str:
    """The folder of an output's state, beside the output's files; of an output that is one ``single`` file among others, its own."""
    return f".{single}{STATE}" if single else STATE


class Output(Protocol):
    """A place for the files of an output, by names relative to it, and for its state."""

    where: str
    """What DST is called in messages."""
    stays: bool
    """Files in the places of new ones stand until these replace them: none can be removed only if it still is what was seen."""

    @property
    def sink(self) -> Sink | None:
        """What takes its files, if that is no file system of this machine."""
        ...

    def list(self, folders: Iterable[str] = ()) -> Mapping[str, Version]:
        """What of an output may be there: every file, or those at the top, in its folders, and in these ``folders``."""
        ...

    def look(self, names: Iterable[str]) -> dict[str, Version]:
        """The versions of those of these files that are there: size, or -1 of what is no plain file, and what changes with its content."""
        ...

    def remove(self, seen: Mapping[str, Version], remade: Container[str]) -> None:
        """Removes files that still are the versions that were ``seen``; those that are ``remade`` by others may be replaced meanwhile."""
        ...

    def find_wrong(self, plan: Plan, numbers: Iterable[int]) -> set[int]:
        """Those of a plan's files, which are there at their sizes, that hold something else, as far as their literals tell."""
        ...

    def clear_up(self, plan: Plan) -> None:
        """Removes what killed processes have left unfinished of a plan's files."""
        ...

    def address(self, name: str) -> Path | str:
        """Where a file is read."""
        ...

    def check_room(self, plan: Plan, stale: Iterable[str]) -> None:
        """Raises SpaceError unless there is room for a plan's files, once the ``stale`` ones are gone and those in their place."""
        ...

    def prepare(self, plan: Plan, suffix: str) -> None:
        """Makes it something that can be written, or says why it cannot be.

        Args:
            plan: of the files that will be there.
            suffix: the longest that their names have until they are complete.

        Raises:
            DestinationError: it cannot be written.
        """
        ...

    def check_empty(self) -> None:
        """Refuses an output that has something in it beside a state. Raises DestinationError."""
        ...

    def is_begun(self) -> bool:
        """Whether some conversion has taken it, and has not left."""
        ...

    def load(self, name: str) -> bytes | None:
        """A file of the state; None where there is none."""
        ...

    def load_earlier(self) -> bytes | None:
        """What an earlier release kept instead; None where there is nothing."""
        ...

    def keep(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Makes a file of the state, whole or not at all. Where one of many wins, the others find out by looking at it."""
        ...

    def leave(self) -> None:
        """Removes the state, the log first: the output is complete."""
        ...

    def drop_earlier(self) -> None:
        """Removes what an earlier release kept."""
        ...


def check_free(output: Output) -> None:
    """Refuses an output that has something in it, or that is begun. Raises DestinationError."""
    check_earlier(output)
    text = output.load(LOG)
    if text is not None and read_head(text).get("parts"):
        raise DestinationError(f"{output.where}: {IN_PARTS}, or start afresh with --overwrite")
    if text is not None:
        raise DestinationError(f"{output.where}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite")
    output.check_empty()


def check_earlier(output: Output, *, overwrite: bool = False) -> None:
    """Refuses what an earlier release has begun and only that can go on with; ``overwrite``: only what must not be lost.

    Raises:
        DestinationError: there is such.
    """
    text = output.load_earlier()
    if text is None:
        return
    what = f"{output.where}: an earlier release of streamconv has begun a conversion there"
    if b'"reclaim":' in text:
        raise DestinationError(f"{what}, and it {ONLY_COPY}: finish it with that release")
    if not overwrite:
        raise DestinationError(f"{what}: finish it with that release, or start afresh with --overwrite")


def tidy(output: Output, single: str | None) -> None:
    """Removes what a run has left of its state beside a complete output, since it was killed while it left."""
    if output.look([state_name(single), f"{state_name(single)}/{PLAN}"]):
        output.leave()


def is_only_copy(text: bytes) -> bool:
    """Whether the run of this log has given parts of its source back; also of a damaged one that may have."""
    lines, _ = read_lines(text)
    if lines:
        return bool(lines[0].get("reclaim")) and any("finished" in line for line in lines)
    return b'"reclaim":true' in text


def finished_files(text: bytes | None) -> dict[str, str]:
    """The files that a log calls finished."""
    lines, _ = read_lines(text or b"")
    return {line["finished"]: line.get("digest", "") for line in lines if "finished" in line}


def describe(plan: Plan) -> Line:
    """What every head of a log says of the conversion."""
    return {"state": "incomplete", "version": VERSION, "plan": plan.digest()}


def begun_plan(output: Output, root: str) -> tuple[Plan, Line]:
    """The plan of an unfinished output, which may have moved to ``root`` since, and the head of its log.

    Raises:
        DestinationError: nothing is begun there, or it cannot be gone on with by its plan.
    """
    check_earlier(output)
    text = output.load(LOG)
    if text is None:
        raise DestinationError(f"{output.where}: holds no unfinished conversion: there is nothing to go on with")
    head, document = read_head(text), output.load(PLAN)
    if not head:
        raise DestinationError(f"{output.where}: {LOG} there cannot be read: restore it from a copy, or start afresh with --overwrite")
    if head.get("version") != VERSION:
        raise DestinationError(
            f"{output.where}: the interrupted run is of another release (its plan is of version {head.get('version')}, not {VERSION}): "
            "finish it with that release"
        )
    if document is None:
        raise DestinationError(f"{output.where}: its plan is not there: go on by the command that began it, with --resume")
    try:
        plan = Plan.from_json(document)
    except FormatError as error:
        raise DestinationError(f"{output.where}: {PLAN} there is damaged ({error}): restore it from a copy, or give the plan") from error
    if plan.digest() != head.get("plan"):
        raise DestinationError(f"{output.where}: {PLAN} and {LOG} there are of different conversions: restore them from a copy")
    return replace(plan, root=root), head
