"""An overwrite that is intended, and not begun: it is noted in the draft of a log, so that a run that resumes begins it.

Such a draft is also what a run locks until its log is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamconv import codec
from streamconv.engine.io import check_folder
from streamconv.errors import DestinationError
from streamconv.running.directory import DRAFT, Directory
from streamconv.running.holder import FLAGS, lock_file
from streamconv.running.log import Line, read_head

_ATTEMPTS = 3  # to remove what must not be left, where the system fails now and then


def note_overwrite(directory: Directory, settings: Mapping[str, Any]) -> None:
    """Notes in an output, if there is one, that a conversion will replace it: one that resumes then does, if this one is killed.

    Args:
        directory: the output.
        settings: what decides which conversion it is.
    """
    line: Line = {"state": "not begun", "advice": "rerun the same command, or with --resume", "overwrite": True, "settings": dict(settings)}
    draft = draft_of(directory)
    with suppress(OSError, DestinationError):  # what cannot be noted is said when DST is written to
        draft.parent.mkdir(exist_ok=True)
        check_folder(draft.parent)
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_APPEND | FLAGS, 0o666)
        try:
            if lock_file(fd):  # else another run is at it, which is said later
                os.ftruncate(fd, 0)
                os.write(fd, codec.encode(line) + b"\n")
        finally:
            os.close(fd)


def is_overwrite_noted(directory: Directory, settings: Mapping[str, Any]) -> bool:
    """Whether `note_overwrite` has noted this conversion, which was not begun."""
    head = read_head(directory.load(draft_of(directory).name) or b"")
    return head.get("overwrite") is True and head.get("settings") == dict(settings)


def forget_overwrite(directory: Directory) -> None:
    """Takes back what `note_overwrite` has noted."""
    if not directory.state.is_symlink():
        discard(draft_of(directory))


def draft_of(directory: Directory) -> Path:
    """Where the draft of an output's log is."""
    return directory.log.with_name(f"{directory.log.name}{DRAFT}")


def discard(draft: Path) -> None:
    """Removes a draft, and the state, where that holds nothing else."""
    for _ in range(_ATTEMPTS):
        with suppress(OSError):
            draft.unlink(missing_ok=True)
            break
    with suppress(OSError):  # it holds a log
        draft.parent.rmdir()


def is_empty(path: Path) -> bool:
    """Whether a draft is there and says nothing."""
    try:
        return path.stat().st_size == 0
    except OSError:
        return False
