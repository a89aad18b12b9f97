"""What other packages add: entry points of a group for each kind of thing that there may be more of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class Extension:
    """One thing that another package adds.

    Attributes:
        name: of its entry point.
        origin: which that is, in messages.
        load: imports it.
    """

    name: str
    origin: str
    load: Callable[[], Any]


def extensions(group: str) -> Iterator[Extension]:
    """What installed packages add to a group; nothing of it is imported yet."""
    for point in entry_points(group):
        yield Extension(point.name, f"entry point {point.value} of group {group}", point.load)


def entry_points(group: str) -> Iterable[EntryPoint]:
    """Those of installed packages, which `importlib.metadata` knows: it is loaded, which takes long, only where there may be some."""
    if not _may_have_any(tuple(sys.path)):
        return ()
    from importlib import metadata

    return metadata.entry_points(group=group)


@cache
def _may_have_any(folders: tuple[str, ...]) -> bool:
    """Whether a package in these folders, or one in an archive, may have entry points of a group of ours."""
    for folder in filter(Path.exists, map(Path, folders)):
        if not folder.is_dir() or any(b"[streamconv." in file.read_bytes() for file in folder.glob("*-info/entry_points.txt")):
            return True
    return False
