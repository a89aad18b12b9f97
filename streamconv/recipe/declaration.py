"""Facts, options and sides as JSON values, as recipe files hold them, and back with everything checked."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from streamconv import codec
from streamconv.errors import FormatError, RecipeError
from streamconv.recipe.facts import MOST, Drop, Fact, Make, Option, Rule, Tie
from streamconv.recipe.steps import ARITHMETIC

KINDS: dict[str, type[Fact]] = {"rule": Rule, "drop": Drop, "make": Make, "tie": Tie}
FIRST = {"rule": "left", "drop": "left", "make": "right", "tie": "left"}
"""The field that a fact in a file begins with, under the name of its kind."""
_NUMBERS = "is said by the number itself, in the names"
_FORMER = {
    "complete": "rules are complete; leave it out, and say sparse: true of those of which names may be missing",
    "offset": f"it {_NUMBERS}: {{i+n}} on the side that is larger",
    "at": f"it {_NUMBERS}: {{i=n}}",
    "copies": f"it {_NUMBERS}: {{r=*}} where all hold the same, {{r//k}} where k that follow each other do",
}


@contextmanager
def within(*place: str | int) -> Iterator[None]:
    """Says of a RecipeError from here that it lies below these keys."""
    try:
        yield
    except RecipeError as error:
        error.place = (*place, *error.place)
        raise


def table(data: object, where: str) -> Mapping[str, Any]:
    """``data`` if it is a mapping of texts. Raises RecipeError."""
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{where}: expected a mapping, found {type(data).__name__}")
    return data


def facts(rows: object, where: str) -> tuple[Fact, ...]:
    """The facts in a list of mappings. Raises RecipeError."""
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST:
        with within("rules"):
            raise RecipeError(f"{where}: 'rules' must be a list of 1 to {MOST} rules")
    entries = []
    for number, row in enumerate(rows, 1):
        with within("rules", number - 1):
            entries.append(_fact(row, f"{where}, rule {number}"))
    return tuple(entries)


def _fact(row: object, where: str) -> Fact:
    fact = dict(table(row, where))
    kind = next((kind for kind in KINDS if kind in fact), None)
    if kind is None:
        fields = ", ".join(map(str, fact))[:200] or "nothing"
        raise RecipeError(f"{where}: expected one of {', '.join(KINDS)}, found {fields}")
    first = FIRST[kind]
    if first in fact:
        raise RecipeError(f"{where}: unknown field {first!r}; the {first} side stands after {kind!r}")
    for key, instead in _FORMER.items():
        if key in fact:
            with within(key):
                raise RecipeError(f"{where}: no field {key!r} any more: {instead}")
    if kind == "drop" and "flipped" in fact:
        with within("flipped"):
            raise RecipeError(f"{where}: no field 'flipped' any more: a drop of the other side is a make")
    fact[first] = fact.pop(kind)
    for key in ("op", "undo"):
        if key in fact:
            fact[key] = _spell_out(fact[key])
    result: Fact = build(KINDS[kind], fact, where)
    return result


def row_of(fact: Fact) -> dict[str, Any]:
    """A fact as a recipe file has it."""
    kind = type(fact).__name__.lower()
    return {kind: getattr(fact, FIRST[kind]), **without_defaults(fact, FIRST[kind])}


def _spell_out(step: object) -> object:
    """A step; ``{add: 1}`` is short for ``{op: add, value: 1}``."""
    if not isinstance(step, dict) or len(step) != 1:
        return step
    ((name, value),) = step.items()
    return {"op": name, "value": value} if name in ARITHMETIC else step


def options(rows: object, where: str) -> dict[str, Option]:
    """Options by name; their help may be missing. Raises RecipeError."""
    row_of_name, entries = table(rows, f"{where}, options"), {}
    if len(row_of_name) > MOST:
        raise RecipeError(f"{where}: {len(row_of_name)} options, {MOST} at most")
    for name, row in row_of_name.items():
        with within(name):
            entries[name] = build(Option, row, f"{where}, option {name}")
    return entries


def build(kind: Any, data: object, where: str, ready: Collection[str] = ()) -> Any:
    """A dataclass of its fields' values, which have the types that it declares; ``ready`` ones stay as they are. Raises RecipeError."""
    values = table(data, where)
    types = types_of(kind)
    unknown = sorted(set(values) - set(types))
    if unknown:
        with within(unknown[0]):
            raise RecipeError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(types)}")
    decoded = {}
    for name, value in values.items():
        with within(name):
            decoded[name] = value if name in ready else _decode(name, value, types[name], where)
    absent = [name for name in required_of(kind) if name not in values]
    if absent:
        raise RecipeError(f"{where}: missing {', '.join(absent)}")
    return kind(**decoded)


def required_of(kind: type[Any]) -> list[str]:
    """The fields of a dataclass that have no default."""
    return [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]


@cache
def types_of(kind: Any) -> dict[str, Any]:
    """What the fields of a dataclass may be in a file: what they are declared to be, but for None, which is to leave them out."""
    return {name: _in_files(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _in_files(hint: Any) -> Any:
    """A field's type without None and functions."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not NoneType and get_origin(member) is not Callable]
    return Union[tuple(members)]  # noqa: UP007


def _decode(name: str, value: object, type_: Any, where: str) -> Any:
    """A field of a file as one of the type that the dataclass declares. Raises RecipeError."""
    try:
        return codec.convert(value, type_)
    except FormatError as error:
        raise RecipeError(f"{where}: {name} must {_requirement(str(error), type_)}, found {reprlib.repr(value)}") from error


def _requirement(fault: str, type_: Any) -> str:
    """What a value must be or hold, in words: of a fault such as ``Expected int | str, got array - at $[...]``."""
    if get_origin(type_) is Literal:
        return f"be {' or '.join(filter(None, get_args(type_)))}"
    form = _FAULT.fullmatch(fault)
    if form is None:
        return f"be readable ({fault})"
    return ("hold " if form["inside"] else "be ") + _WORD.sub(lambda word: _WORDS[word[0]], form["expected"])


_FAULT = re.compile(r"Expected (?P<expected>.*?)(?:, got .*?)?(?: - at \$(?P<inside>.+))?")
_WORDS = {
    "str": "text", "bool": "true or false", "int": "a whole number", "float": "a number", "array": "a list", "object": "a mapping",
    "null": "nothing", " | ": " or ",
}  # fmt: skip
_WORD = re.compile("|".join(map(re.escape, _WORDS)))


def without_defaults(item: Any, *leave: str) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, as JSON values."""
    values = {}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.name not in leave and value != default:
            values[f.name] = _as_lists(value)
    return values


def _as_lists(value: Any) -> Any:
    """A value whose tuples, and those in them, are lists."""
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
