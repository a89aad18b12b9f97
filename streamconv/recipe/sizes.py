"""The numbers of facts: what their expressions can ask for, and what axes and the arithmetic of names come to for one checkpoint."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from streamconv.errors import CoverageError, NotationError
from streamconv.graph.node import AnyNode
from streamconv.notation import expressions
from streamconv.notation.names import Capture, Pattern, Values
from streamconv.notation.names import parse as parse_names
from streamconv.recipe.facts import Dim, Fact, Rule, Tie, pattern_of

MOST_COPIES = 100_000  # of a tensor


def scope_of(entries: Mapping[str, AnyNode], scope: Mapping[str, Any]) -> dict[str, Any]:
    """``scope`` with what expressions can ask of the tensors: ``has``, ``count`` and ``shape`` of a name pattern; and ``max``, ``min``.

    ``has(pattern, 'float8')`` asks for one whose dtype's name begins so.
    """

    def matching(text: str) -> Iterator[str]:
        pattern = plain_names(text)
        end = pattern.atoms[-1]
        names = [name for name in entries if name.endswith(end)] if isinstance(end, str) else entries  # the expression is slow
        return filter(pattern.regex.fullmatch, names)

    def shape(text: str) -> list[int] | None:
        first = next(matching(text), None)
        return None if first is None else list(entries[first].spec.shape)

    def has(text: str, dtype: str = "") -> bool:
        return any(entries[name].spec.dtype.name.startswith(dtype) for name in matching(text))

    def count(text: str) -> int:
        return len(list(matching(text)))

    return {
        **scope,
        "has": cache(has),
        "count": cache(count),
        "shape": cache(shape),
        "max": lambda *values: None if None in values else max(values),
        "min": lambda *values: None if None in values else min(values),
    }


def near_keys(expression: object, scope: Mapping[str, Any]) -> str:
    """``; config.json has KEY``, for keys that are spelt like those that an expression asks for and that are not there."""
    if not isinstance(expression, str):
        return ""
    config = scope.get("config") or {}
    unknown = [name for name in re.findall(r"[A-Za-z_]\w*", expression) if scope.get(name) is None]
    matches = [difflib.get_close_matches(name, config, 1, cutoff=0.85) for name in unknown]
    keys = set(itertools.chain.from_iterable(matches))
    return f"; config.json has {', '.join(sorted(keys))}" if keys else ""


def plain_names(text: str) -> Pattern:
    """The pattern of names that belong to no rule. Raises NotationError where numbers come with arithmetic."""
    pattern = parse_names(text)
    for capture in pattern.captures:
        if capture.operator:
            raise NotationError(f"{_notation(capture)} is for names of a rule: give {{{capture.name}}}", text, 0)
    return pattern


@dataclass(frozen=True)
class Numbering:
    """The names of a pattern, its numbers' arithmetic done: ``shifts`` is n of ``{i+n}``, ``places`` that of ``{i=n}``."""

    pattern: Pattern
    shifts: Mapping[str, int]
    places: Mapping[str, int]

    def read(self, numbers: Values) -> Values | None:
        """The values of captures for the numbers in a name; None where the pattern is not for that name."""
        if any(numbers[name] != place for name, place in self.places.items()):
            return None
        values = {name: int(numbers[name]) - shift for name, shift in self.shifts.items()}
        return None if any(value < 0 for value in values.values()) else {**numbers, **values}

    def has(self, values: Values) -> bool:
        """Whether there is a name for these values: ``{i-1}`` has none for 0."""
        return all(int(values[name]) + shift >= 0 for name, shift in self.shifts.items() if name in values)

    def write(self, values: Values) -> str:
        """The name that these values of captures make."""
        numbers = {name: int(values[name]) + shift for name, shift in self.shifts.items() if name in values}
        return self.pattern.format({**values, **numbers, **self.places})

    @property
    def open(self) -> tuple[str, ...]:
        """The captures that values are needed for."""
        return tuple(capture.name for capture in self.pattern.captures if capture.name not in self.places)


@dataclass(frozen=True)
class Sizes:
    """The sizes that the facts of one stage have in ``scope``: ``dims`` are those of the stage, ``title`` begins messages.

    All raise CoverageError where an expression does not give a whole number.
    """

    title: str
    dims: Mapping[str, Dim]
    scope: Mapping[str, Any]

    def near(self, rule: Rule) -> str:
        """See `near_keys`, of all that says the size of an axis."""
        texts: list[str] = []
        for dim in (*self.dims.values(), *rule.dims.values()):
            sizes = dim.values() if isinstance(dim, Mapping) else [dim]
            texts += (size for size in sizes if isinstance(size, str))
        return near_keys(" ".join(texts), self.scope)

    def dim(self, fact: Fact, axis: str, alternatives: tuple[str, ...] = (), *, firm: bool = False) -> int | None:
        """The size of an axis, in tensors that differ; None where nothing says it, ``firm``: before shapes do."""
        own = {} if isinstance(fact, Tie) else fact.dims
        size: Any = own.get(axis, self.dims.get(axis))
        if isinstance(size, Mapping):
            size = next((size[alternative] for alternative in alternatives if alternative in size), None)
        if firm and isinstance(size, str) and not size.startswith("="):
            return None
        value = self._value(size)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CoverageError(f"{self.title}: the size of axis {axis}, {size!r}, is {value!r}, not a whole number")
        repeats = self.repeats(fact, axis)
        if value is not None and value % repeats:
            raise CoverageError(f"{self.title}: {value} of {axis} cannot hold each tensor {repeats} times ({pattern_of(fact)!r})")
        return value // repeats if value is not None else None

    def repeats(self, fact: Fact, name: str) -> int:
        """How many numbers of a capture that follow each other hold the same tensor."""
        if not isinstance(fact, Rule):
            return 1
        text = fact.binding.left_only.repeats.get(name) or fact.binding.right_only.repeats.get(name)
        if text is None:
            return 1
        count = self._number(fact, f"{{{name}//{text}}}", text, least=1)
        if count > MOST_COPIES:
            raise CoverageError(f"{self.title}: {count} copies of {name} ({pattern_of(fact)!r}): no model has more than {MOST_COPIES}")
        return count

    def count(self, fact: Fact, name: str) -> int:
        """How many numbers there are of a capture that only ``dims`` say."""
        size = self.dim(fact, name)
        return self._number(fact, f"number of {name}", size, least=1)

    def numbering(self, fact: Fact, pattern: Pattern) -> Numbering:
        """The names of one side of a fact."""
        shifts, places = {}, {}
        for capture in pattern.captures:
            if capture.operator in ("+", "-"):
                text = f"0 {capture.operator} {capture.operand}"
                shifts[capture.name] = self._number(fact, _notation(capture), text)
            elif capture.operator == "=" and capture.operand != "*":
                places[capture.name] = self._number(fact, _notation(capture), capture.operand, least=0)
        return Numbering(pattern, shifts, places)

    def _number(self, fact: Fact, what: str, size: Dim | None, least: int | None = None) -> int:
        """What a size in a fact comes to; ``what`` says it in a message."""
        value = expressions.evaluate(size, self._with_dims(fact, size)) if isinstance(size, str) else size
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            how = f"give it with --set or in config.json{near_keys(size, self.scope)}"
            raise CoverageError(f"{self.title}: {what} ({pattern_of(fact)!r}), {size!r}, is {value!r}: {how}")
        return value

    def _with_dims(self, fact: Fact, text: str) -> Mapping[str, Any]:
        """What an expression of names may use: ``dims`` too."""
        dims = {**self.dims, **({} if isinstance(fact, Tie) else fact.dims)}
        sizes = {name: dims[name] for name in expressions.find_names(text) if name in dims}
        return {**self.scope, **{name: self._value(size) for name, size in sizes.items()}}

    def _value(self, size: Any) -> Any:
        return expressions.evaluate(size.removeprefix("="), self.scope) if isinstance(size, str) else size


def _notation(capture: Capture) -> str:
    """A number with arithmetic, as a pattern has it."""
    return f"{{{capture.name}{capture.operator}{capture.operand}}}"
