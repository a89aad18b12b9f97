"""Where files are: paths of this machine, and URLs. Nothing of what URLs take is imported before one is used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

Outdated = Callable[[Collection[str], Iterable[str]], list[str]]  # of files put somewhere and those there: which go by that


def is_url(path: object) -> bool:
    """Whether a path names something behind a protocol, such as ``https://`` or ``s3://``."""
    return "://" in str(path)


@dataclass(frozen=True, slots=True)
class Version:
    """Says whether a file is still the one that it was.

    Attributes:
        size: in bytes.
        tag: what changes with its content, as far as its store tells: an ETag, a digest; on this machine the time of its last change.
    """

    size: int
    tag: str = ""
