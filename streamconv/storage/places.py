"""Which file or folder a path is, whatever it is called: two mounts, links or spellings of one have the same device and inode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

Identity = tuple[int, int]
"""Device and inode."""
Place = tuple[int | str, ...]
"""Of an entry in a folder: the folder's identity and its own; of one that is not there, the names below the nearest folder that is."""
_LINKS = 40  # that a path may go through, as the system has it


def identify(path: Path) -> Identity | None:
    """What a path leads to; None where that is nothing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def identify_with_parents(path: Path) -> Iterator[Identity]:
    """What a path leads to, and the folders that this lies in, from the inside; those that are not there are left out."""
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if (identity := identify(folder)) is not None:
            yield identity


def place_of(path: Path) -> Place:
    """The entry that a path names; if that is a link, the link."""
    above = path.absolute()
    names: list[str] = []
    while (folder := identify(above.parent)) is None and above.parent != above:
        names.insert(0, above.name.casefold())
        above = above.parent
    try:
        own = above.lstat()
    except OSError:
        return (*(folder or ()), above.name.casefold(), *names)
    return (*(folder or ()), own.st_dev, own.st_ino, *names)


def places_of(path: Path) -> set[Place]:
    """The entries by which a path leads to its file: its own, and of each link the one that it names."""
    places = set()
    for _ in range(_LINKS):
        places.add(place_of(path))
        try:
            path = path.parent / path.readlink()
        except (OSError, ValueError):
            break
    return places
