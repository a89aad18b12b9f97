"""What other packages add: entry points of a group for each kind of thing that there may be more of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


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
    from importlib.metadata import entry_points

    for point in entry_points(group=group):
        yield Extension(point.name, f"entry point {point.value} of group {group}", point.load)
