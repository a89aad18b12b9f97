"""The lines of a journal or claim: what each may say, with types that are checked when it is read."""

from __future__ import annotations

from typing import Any, TypedDict

from streamconv import codec
from streamconv.errors import FormatError


class Holder(TypedDict):
    """The process that is at work."""

    pid: int
    host: str
    started: float | None


class Line(TypedDict, total=False):
    """A JSON object.

    The first of a journal says which conversion this is, that of a claim also what goes first (``old``) and how many ``parts`` there
    are. Each other one says what has become durable since: ``finished`` files, with a digest where one is known, tasks of others by
    where they begin, files to be made ``again``; or who is at work by now, and with which tiling.
    """

    state: str
    advice: str
    version: int
    plan: str
    settings: dict[str, Any]
    sources: dict[str, tuple[int, int, str]]
    tiling: str
    holder: Holder
    overwrite: bool
    reclaim: str
    old: dict[str, list[int | str]]
    parts: int
    finished: str
    digest: str
    durable: dict[str, tuple[int, ...]]
    again: str


def read_line(text: bytes) -> Line | None:
    """A line; None if it is none, as what a crash has cut off, or somebody has changed."""
    try:
        return codec.decode(text, Line) if text.endswith(b"\n") else None
    except FormatError:
        return None
