"""Facts, options and sides as JSON values, as recipe files hold them, and back with everything checked."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from streamconv.errors import RecipeError
from streamconv.recipe.facts import Drop, Fact, Make, Option, Rule, Tie

MOST = 4096  # items of a list or mapping in a recipe file; nobody has written a tenth of that
LARGEST = 2**63  # whole numbers stay below it
MOST_SHARDS = 100_000
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


def mapping(data: object, where: str) -> Mapping[str, Any]:
    """``data`` if it is a mapping of texts. Raises RecipeError."""
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{where}: expected a mapping, found {type(data).__name__}")
    return data


def facts(rows: object, where: str) -> tuple[Fact, ...]:
    """The facts in a list of mappings. Raises RecipeError."""
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST:
        with within("rules"):
            raise RecipeError(f"{where}: 'rules' must be a list of 1 to {MOST} rules")
    found = []
    for number, row in enumerate(rows, 1):
        with within("rules", number - 1):
            found.append(_fact(row, f"{where}, rule {number}"))
    return tuple(found)


def _fact(row: object, where: str) -> Fact:
    fact = dict(mapping(row, where))
    kind = next((kind for kind in KINDS if kind in fact), None)
    if kind is None:
        found = ", ".join(map(str, fact))[:200] or "nothing"
        raise RecipeError(f"{where}: expected one of {', '.join(KINDS)}, found {found}")
    first = FIRST[kind]
    if first in fact:
        raise RecipeError(f"{where}: unknown field {first!r}; the {first} side stands after {kind!r}")
    if former := next((key for key in _FORMER if key in fact), None):
        with within(former):
            raise RecipeError(f"{where}: no field {former!r} any more: {_FORMER[former]}")
    if kind == "drop" and "flipped" in fact:
        with within("flipped"):
            raise RecipeError(f"{where}: no field 'flipped' any more: a drop of the other side is a make")
    fact[first] = fact.pop(kind)
    for key in ("op", "undo"):
        fact |= {key: _spelt_out(fact[key])} if key in fact else {}
    made: Fact = build(KINDS[kind], fact, where)
    return made


def row_of(fact: Fact) -> dict[str, Any]:
    """A fact as a recipe file has it."""
    kind = type(fact).__name__.lower()
    return {kind: getattr(fact, FIRST[kind]), **without_defaults(fact, FIRST[kind])}


def _spelt_out(step: object) -> object:
    """A step; ``{add: 1}`` is short for ``{op: add, value: 1}``."""
    if isinstance(step, dict) and len(step) == 1 and (name := next(iter(step))) in ("add", "scale"):
        return {"op": name, "value": step[name]}
    return step


def options(rows: object, where: str) -> dict[str, Option]:
    """Options by name; their help may be missing. Raises RecipeError."""
    found = {}
    for name, row in mapping(rows, f"{where}, options").items():
        with within(name):
            found[name] = build(Option, {"help": "", **mapping(row, f"{where}, option {name}")}, f"{where}, option {name}")
    return found


def build(kind: type[Any], data: object, where: str) -> Any:
    """A dataclass of the values of its fields. Raises RecipeError."""
    values = mapping(data, where)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        with within(unknown[0]):
            raise RecipeError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(fields)}")
    for name, value in values.items():
        wanted = VALUES.get(name, TEXT)
        if not (dataclasses.is_dataclass(value) or wanted.fits(value)):
            with within(name):
                raise RecipeError(f"{where}: {name} must be {wanted.expected}, found {reprlib.repr(value)}")
        if isinstance(value, list | tuple | dict) and len(value) > MOST:
            with within(name):
                raise RecipeError(f"{where}: {name} has {len(value)} items, {MOST} at most")
    required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise RecipeError(f"{where}: missing {', '.join(missing)}")
    return kind(**{name: _frozen(value) for name, value in values.items()})


def without_defaults(item: Any, *leave: str) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, as JSON values."""
    found = {}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.name not in leave and value != default:
            found[f.name] = [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, tuple) else value
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _is_dims(value: object) -> bool:
    sizes = value.values() if isinstance(value, dict) else ()
    return isinstance(value, dict) and all(
        _is_size(size) or (isinstance(size, dict) and len(size) <= MOST and all(map(_is_size, size.values()))) for size in sizes
    )


def _is_size(value: object) -> bool:
    return isinstance(value, str) or (type(value) is int and abs(value) < LARGEST)


def _is_step(value: object) -> bool:
    return isinstance(value, dict) and all(_is_size(one) or isinstance(one, float) for one in value.values())


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _is_pair(value: object) -> bool:
    return _is_texts(value) and len(value) == 2  # type: ignore[arg-type]


class Value(NamedTuple):
    """What a field of a recipe file must be: as a test, in words, and as JSON Schema."""

    fits: Callable[[Any], bool]
    expected: str
    schema: Mapping[str, Any]


_SIZE = {"type": ["integer", "string"]}
_LIST = {"type": "array", "items": {"type": "string"}}
TEXT = Value(lambda value: isinstance(value, str), "text", {"type": "string"})
FLAG = Value(lambda value: isinstance(value, bool), "true or false", {"type": "boolean"})
SIZES = Value(
    _is_dims,
    "a mapping of axes to numbers, expressions, or one of these for each alternative",
    {"type": "object", "additionalProperties": {"anyOf": [_SIZE, {"type": "object", "additionalProperties": _SIZE}]}},
)
STEP = Value(
    _is_step,
    "a mapping of op: its name, and of what it takes: numbers or expressions",
    {"type": "object", "additionalProperties": {"type": ["number", "string"]}},
)
TEXTS = Value(_is_texts, "a list of texts", _LIST)
VALUES: dict[str, Value] = {
    **dict.fromkeys(("fallback", "sparse", "partial", "firm", "required", "flipped"), FLAG),
    "dims": SIZES,
    "optional": Value(lambda value: isinstance(value, bool | str), "true, false or an expression", {"type": ["boolean", "string"]}),
    **dict.fromkeys(("op", "undo"), STEP),
    **dict.fromkeys(("choices", "ranks", "files", "expects", "also"), TEXTS),
    "shards": Value(
        lambda value: type(value) is int and 0 <= value <= MOST_SHARDS,
        f"a whole number of at most {MOST_SHARDS}",
        {"type": "integer", "minimum": 0, "maximum": MOST_SHARDS},
    ),
    "default": Value(
        lambda value: value is None or isinstance(value, int | str),
        "text, a whole number, true or false",
        {"type": ["string", "integer", "boolean", "null"]},
    ),
    "kind": Value(lambda value: value in ("", "bool", "int", "str"), "bool, int or str", {"enum": ["", "bool", "int", "str"]}),
    "requires": Value(
        lambda value: isinstance(value, dict) and _is_texts([*value, *value.values()]),
        "a mapping of texts to texts",
        {"type": "object", "additionalProperties": {"type": "string"}},
    ),
    "rules": Value(lambda value: isinstance(value, tuple), "a list", {"type": "array"}),
    "options": Value(lambda value: isinstance(value, dict), "a mapping", {"type": "object"}),
    "aliases": Value(
        lambda value: isinstance(value, list) and all(map(_is_pair, value)),
        "a list of pairs of texts",
        {"type": "array", "items": {**_LIST, "minItems": 2, "maxItems": 2}},
    ),
}
"""A field that is not here is `TEXT`."""
