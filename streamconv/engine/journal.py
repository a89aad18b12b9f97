"""The state of an interrupted run, beside its output: which conversion it is and which files are finished.

Its presence says that the output is not complete. It is written before the first byte and removed after the commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from streamconv.errors import DestinationError
from streamconv.plan import Plan

NAME = ".streamconv.json"


def journal_path(root: Path, single_file: str | None) -> Path:
    """Where the journal of an output directory, or of an output file in a directory of others, lies."""
    return root / (f".{single_file}{NAME}" if single_file else NAME)


class Journal:
    """Reads and writes the journal at ``path`` for the conversion that ``plan`` is."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self._plan = plan
        self._digest = plan.digest()
        self.finished: list[str] = []

    def begin(self, *, resume: bool) -> None:
        """Starts a new journal, or takes up the finished files of the one that is there.

        Raises:
            DestinationError: what is there belongs to another conversion.
        """
        if resume and self.path.exists():
            found = self._load()
            if found.get("plan") != self._digest:
                raise DestinationError(
                    f"{self.path}: the interrupted run was another one (other sources, options, recipe or version): "
                    "start afresh with --overwrite, or give the options of that run"
                )
            sizes = {file.path: file.size for file in self._plan.files}
            self.finished = [name for name in found.get("finished", []) if _size(self.path.parent / str(name)) == sizes.get(name, -1)]
        self._write()

    def finish(self, name: str) -> None:
        """Notes that ``name`` is complete, durable and under its final name."""
        self.finished.append(name)
        self._write()

    def end(self) -> None:
        """The conversion is complete."""
        self.path.unlink(missing_ok=True)

    def _load(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            found = None
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        state = {
            "state": "incomplete",
            "advice": "this conversion was interrupted or is running; rerun the same command with --resume",
            "plan": self._digest,
            "finished": self.finished,
        }
        temporary = self.path.with_name(f"{self.path.name}.new")
        with temporary.open("w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None
    except OSError:
        return None
