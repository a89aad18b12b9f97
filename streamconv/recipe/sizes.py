"""The numbers of facts: what their expressions can ask for, and what axes, copies and offsets come to for one checkpoint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode
from streamconv.notation import expressions
from streamconv.notation.names import parse as parse_names
from streamconv.recipe.facts import ALL, Dim, Drop, Fact, Rule

MOST_COPIES = 100_000  # of a tensor


def scope_of(entries: Mapping[str, AnyNode], scope: Mapping[str, Any]) -> dict[str, Any]:
    """``scope`` with what expressions can ask of the tensors: ``has``, ``count`` and ``shape`` of a name pattern; and ``max``, ``min``."""

    def matching(text: str) -> Iterator[str]:
        pattern = parse_names(text)
        return (name for name in entries if pattern.match(name) is not None)

    def shape(text: str) -> list[int] | None:
        first = next(matching(text), None)
        return None if first is None else list(entries[first].spec.shape)

    return {
        **scope,
        "has": cache(lambda text: any(True for _ in matching(text))),
        "count": cache(lambda text: sum(1 for _ in matching(text))),
        "shape": cache(shape),
        "max": lambda *values: None if None in values else max(values),
        "min": lambda *values: None if None in values else min(values),
    }


def near_keys(given: object, scope: Mapping[str, Any]) -> str:
    """``; config.json has KEY``, for keys that are spelt like those that an expression asks for and that are not there."""
    if not isinstance(given, str):
        return ""
    config = scope.get("config") or {}
    wanted = [name for name in re.findall(r"[A-Za-z_]\w*", given) if scope.get(name) is None]
    found = {match for name in wanted for match in difflib.get_close_matches(name, config, 1, cutoff=0.85)}
    return f"; config.json has {', '.join(sorted(found))}" if found else ""


@dataclass(frozen=True)
class Sizes:
    """The sizes that the facts of one stage have in ``scope``: ``dims`` are those of the stage, ``title`` begins messages.

    All raise CoverageError where an expression does not give a whole number.
    """

    title: str
    dims: Mapping[str, Dim]
    scope: Mapping[str, Any]

    def near(self, rule: Rule | Drop) -> str:
        """See `near_keys`, of all that says the size of an axis."""
        texts: list[str] = []
        for dim in (*self.dims.values(), *rule.dims.values()):
            sizes = dim.values() if isinstance(dim, Mapping) else [dim]
            texts += (size for size in sizes if isinstance(size, str))
        return near_keys(" ".join(texts), self.scope)

    def dim(self, rule: Rule | Drop, axis: str, chosen: tuple[str, ...] = (), *, firm: bool = False) -> int | None:
        """The size of an axis, in distinct tensors where it counts copies too; None where nothing says it, ``firm``: before shapes do."""
        given: Any = rule.dims.get(axis, self.dims.get(axis))
        if isinstance(given, Mapping):
            given = next((given[choice] for choice in chosen if choice in given), None)
        if firm and isinstance(given, str) and not given.startswith("="):
            return None
        value = expressions.evaluate(given.removeprefix("="), self.scope) if isinstance(given, str) else given
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CoverageError(f"{self.title}: the size of axis {axis}, {given!r}, is {value!r}, not a whole number")
        copies = self.copies(rule, axis)
        if value is not None and value % copies:
            raise CoverageError(f"{self.title}: {value} of {axis} cannot hold each tensor {copies} times ({rule.left!r})")
        return value // copies if value is not None else None

    def copies(self, rule: Rule | Drop, name: str) -> int:
        """How many numbers of a capture that follow each other hold the same tensor."""
        given = rule.copies.get(name, 1) if isinstance(rule, Rule) else 1
        count = 1 if given == ALL else self.number(rule, given, f"copies of {name}")
        if count > MOST_COPIES:
            raise CoverageError(f"{self.title}: {count} copies of {name} ({rule.left!r}): no model has more than {MOST_COPIES}")
        return count

    def number(self, rule: Rule | Drop, given: Dim | None, what: str) -> int:
        """What a size in a fact comes to; ``what`` says it in a message, and is 1 at least unless it begins with "offset"."""
        value = expressions.evaluate(given, self.scope) if isinstance(given, str) else given
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if what.startswith("offset") else 1):
            how = f"give it with --set or in config.json{near_keys(given, self.scope)}"
            raise CoverageError(f"{self.title}: {what} ({rule.left!r}), {given!r}, is {value!r}: {how}")
        return value

    def offsets(self, fact: Fact) -> dict[str, int]:
        """What to take from a left number to get the right one."""
        if not isinstance(fact, Rule):
            return {}
        return {name: self.number(fact, size, f"offset of {name}") * (-1 if fact.flipped else 1) for name, size in fact.offset.items()}

    def places(self, fact: Fact) -> dict[str, int]:
        """The values of the numbers that count nothing."""
        if not isinstance(fact, Rule):
            return {}
        return {name: self.number(fact, size, f"offset {name}") for name, size in fact.at.items()}
