"""What makes a conversion another one than the one that an output was begun with, in words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.planning.plan import VERSION, Plan, SourceFile
from streamconv.running.log import Line
from streamconv.running.output import Output, begun_plan

OTHER = "other options, recipe or release"


def find_difference(output: Output, head: Line, plan: Plan, settings: Mapping[str, Any], *, exact: bool = False) -> str | None:
    """What makes a plan, made with ``settings``, another one than that of an output with this ``head``, in words.

    With the same plan, settings may say the same in other words; ``exact``: they may not, since the plan is the output's own.
    """
    if head["version"] != VERSION:
        return f"its plan is of version {head['version']}, not {VERSION}"
    is_same, before = head["plan"] == plan.digest(), head.get("settings", {})
    for key in sorted(before.keys() & settings.keys()) if exact or not is_same else ():
        if before[key] != settings[key]:
            return f"{key} was {before[key]!r}, is {settings[key]!r}"
    if is_same:
        return None
    with suppress(StreamconvError, OSError):
        return _compare(begun_plan(output, plan.root)[0], plan)
    return OTHER


def _compare(old: Plan, new: Plan) -> str:
    """What differs between two plans, the first thing that says most."""
    before, now = ({source.path: source for source in plan.sources} for plan in (old, new))
    for path in sorted(before.keys() & now.keys()):
        if difference := _compare_sources(before[path], now[path]):
            return f"{path} {difference}"
    if old.format != new.format:
        return f"the container was {old.format}, is {new.format}"
    rows, new_rows = ({row.target: row for row in plan.mapping} for plan in (old, new))
    for name in sorted(rows.keys() & new_rows.keys()):
        if rows[name].spec != new_rows[name].spec:
            return f"{name} was {rows[name].spec}, is {new_rows[name].spec}"
    if name := _first_alone(rows, new_rows):
        return f"{name} was {'made' if name in rows else 'not made'}"
    if path := _first_alone(before, now):
        return f"{path} {'is not read any more' if path in before else 'was not read'}"
    sizes, new_sizes = ({file.path: file.size for file in plan.files} for plan in (old, new))
    for name in sorted(sizes.keys() & new_sizes.keys()):
        if sizes[name] != new_sizes[name]:
            return f"{name} was to have {sizes[name]} bytes, is to have {new_sizes[name]}"
    if name := _first_alone(sizes, new_sizes):
        return f"{name} was {'one of its files' if name in sizes else 'none of its files'}"
    return OTHER


def _first_alone(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """The first name that only one of two has; nothing if they have the same."""
    return min(one.keys() ^ other.keys(), default="")


def _compare_sources(old: SourceFile, new: SourceFile) -> str:
    """How a source differs from what it was; nothing if it does not."""
    if old.size != new.size:
        return f"had {old.size} bytes, has {new.size}"
    if old.version == new.version:
        return ""
    return "has other bytes" if old.tag != new.tag else "was modified"
