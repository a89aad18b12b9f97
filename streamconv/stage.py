"""What this process is at before there are bytes to count, for whoever shows it: headers that are read, names that are matched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stage:
    """What is being done, and how many of how many are done; of one with no ``total`` nobody counts."""

    what: str = ""
    total: int = 0
    done: int = 0

    def __str__(self) -> str:
        return f"{self.what}: {self.done} of {self.total}" if self.total else self.what


_current = Stage()


def current() -> Stage:
    """The one that was begun last, by whatever thread."""
    return _current


def begin(what: str, total: int = 0) -> Stage:
    """Begins the next one.

    >>> begin("reading headers", 3).done += 1
    >>> str(current())
    'reading headers: 1 of 3'
    """
    global _current  # noqa: PLW0603 - there is one process
    _current = Stage(what, total)
    return _current
