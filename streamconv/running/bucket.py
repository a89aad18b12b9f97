"""An output behind a URL: an object store, or a repository on the Hub. Files appear there whole, or not at all.

A store cannot take a file away only if it still is what was seen: where others may be at work, stale files in the places of new ones stand
until those replace them. What makes a loader take the files for a model, the index, is written last and goes first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

from streamconv.errors import DestinationError, SpaceError
from streamconv.planning.plan import Plan
from streamconv.running.directory import check_names
from streamconv.running.log import read_line
from streamconv.running.output import EARLIER, LOG, PLAN, STATE, state_name
from streamconv.storage import Version
from streamconv.storage.sinks import Sink
from streamconv.units import format_size


class Bucket:
    """See `Output`. Of two that take it at once, the later has it.

    Args:
        sink: what takes the files.
        single: the name of the one file, if DST is one.
    """

    stays = True

    def __init__(self, sink: Sink, single: str | None = None) -> None:
        self.sink: Sink = sink
        self._single = single
        self.where, self._state = sink.url, state_name(single)

    def list(self, folders: Iterable[str] = ()) -> Mapping[str, Version]:  # noqa: ARG002 - a store lists all
        return {name: entry for name, entry in self.sink.list().items() if not name.startswith(f"{self._state}/")}

    def look(self, names: Iterable[str]) -> dict[str, Version]:
        there = self.sink.list()
        return {name: there[name] for name in names if name in there}

    def remove(self, seen: Mapping[str, Version], remade: Container[str]) -> None:  # noqa: ARG002 - those stand
        there = self.look(seen) if seen else {}
        if names := [name for name, version in there.items() if version == seen[name]]:
            self.sink.remove(names)

    def find_wrong(self, plan: Plan, numbers: Iterable[int]) -> set[int]:  # noqa: ARG002 - what is there is whole, and only this plan's writers write it
        return set()

    def clear_up(self, plan: Plan) -> None:
        self.sink.abandon({file.path for file in plan.files}, others=not self._single)

    def address(self, name: str) -> str:
        return self.sink.address(name)

    def check_room(self, plan: Plan, stale: Iterable[str]) -> None:  # noqa: ARG002 - a store has room
        """See `Output`; of what is made on this machine before it is uploaded."""
        folder = tempfile.gettempdir()
        check_names(plan, Path(folder))
        free = shutil.disk_usage(folder).free
        if plan.totals.disk_needed > free:
            needed = format_size(plan.totals.disk_needed)
            raise SpaceError(
                f"{folder}: no room: files of {needed} are made there, {format_size(free)} are free: set TMPDIR to another disk"
            )

    def prepare(self, plan: Plan, suffix: str) -> None:
        """Nothing: there are no folders."""

    def check_empty(self) -> None:
        for name in self.sink.list():
            if name == self._single if self._single else not name.startswith(STATE):
                raise DestinationError(f"{self.where}: holds {name} already: give another DST, or --overwrite, or --resume")

    def is_begun(self) -> bool:
        return self.load(LOG) is not None

    def load(self, name: str) -> bytes | None:
        """See `Output`.

        Raises:
            DestinationError: a log is there that cannot be read.
        """
        data = self.sink.load_state(f"{self._state}/{name}")
        if name == LOG and data and read_line(data) is None:
            raise DestinationError(f"{self.where}: {self._state}/{name} there is no log that can be read: remove it, or give another DST")
        return data or None

    def load_earlier(self) -> bytes | None:
        return self.sink.load_state(f"{self._state}{EARLIER}")

    def keep(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        self.sink.save_state(f"{self._state}/{name}", b"".join(pieces()))

    def leave(self) -> None:
        for name in (LOG, PLAN):
            self.sink.drop_state(f"{self._state}/{name}")

    def drop_earlier(self) -> None:
        if self.load_earlier() is not None:
            self.sink.drop_state(f"{self._state}{EARLIER}")
