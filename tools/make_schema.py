"""Writes the JSON Schema of recipe files from the types that decode them: ``python -m tools.make_schema``."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec

import streamconv
from streamconv.recipe import Recipe
from streamconv.recipe.declaration import FIRST, KINDS, required_of, types_of
from streamconv.recipe.facts import MOST, Option, Side

SCHEMA = Path(streamconv.__file__).parent / "recipe.schema.json"
_PARTS = {
    "rules": {"type": "array", "minItems": 1, "maxItems": MOST, "items": {"oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in KINDS]}},
    "options": {"type": "object", "maxProperties": MOST, "additionalProperties": {"$ref": "#/$defs/option"}},
    "left": {"$ref": "#/$defs/side"},
    "right": {"$ref": "#/$defs/side"},
    "then": {"$ref": "#"},
}
"""The fields of a recipe that are made of other things."""


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12)."""
    whole = _object(Recipe, parts=_PARTS)
    facts = {kind: _object(fact, first=(FIRST[kind], kind)) for kind, fact in KINDS.items()}
    defs = {**facts, "option": _object(Option), "side": _object(Side)}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a recipe of streamconv"}
    return {**head, **whole, "required": ["rules"], "$defs": defs}


def _object(kind: type[Any], *, parts: dict[str, Any] | None = None, first: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """The schema of a dataclass, whose docstring says what its fields are; field ``first[0]`` goes by another name in files."""
    text = inspect.cleandoc(kind.__doc__ or "")
    told = {name: " ".join(words.split()) for name, words in re.findall(r"^    (\w+): ((?:.+\n?(?:        .+\n?)*))", text, re.MULTILINE)}
    names = {field: first[1] if field == first[0] else field for field in types_of(kind)}
    properties = {}
    for field, wanted in types_of(kind).items():
        value = (parts or {}).get(field) or msgspec.json.schema(wanted)
        properties[names[field]] = value | ({"description": told[field]} if field in told else {})
    about = " ".join(text.split("\n\n")[0].split())
    required = [names[field] for field in required_of(kind)]
    found = {"type": "object", "description": about, "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
