"""Where files are: paths of this machine, and URLs. Nothing of what URLs take is imported before one is used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

Outdated = Callable[[Collection[str], Iterable[str]], list[str]]  # of files put somewhere and those there: which go by that


def is_url(path: object) -> bool:
    """Whether a path names something behind a protocol, such as ``https://`` or ``s3://``."""
    return "://" in str(path)


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored file: its size in bytes and what changes with its content (an ETag, a digest), as far as the store tells."""

    size: int
    tag: str = ""
