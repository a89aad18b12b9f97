"""Writes the JSON Schema of recipe files from the dataclasses that they become: ``python -m tools.make_schema``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import streamconv
from streamconv.recipe import Recipe
from streamconv.recipe.declaration import FIRST, KINDS, TEXT, VALUES
from streamconv.recipe.facts import Option, Side

SCHEMA = Path(streamconv.__file__).parent / "recipe.schema.json"


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12)."""
    found = {
        **_object(Recipe, "name", "summary"),
        "$defs": {kind: _object(fact, first=(FIRST[kind], kind)) for kind, fact in KINDS.items()},
    }
    found["$defs"] |= {"option": _object(Option, "help"), "side": _object(Side)}
    found["properties"] |= {
        "rules": {"type": "array", "minItems": 1, "items": {"oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in KINDS]}},
        "options": {"type": "object", "additionalProperties": {"$ref": "#/$defs/option"}},
        "left": {"$ref": "#/$defs/side"},
        "right": {"$ref": "#/$defs/side"},
        "then": {"$ref": "#"},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a recipe of streamconv", **found}


def _object(kind: type[Any], *free: str, first: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """The schema of a dataclass, whose docstring says what its fields are; ``free`` may be missing, ``first`` has another name."""
    text = inspect.cleandoc(kind.__doc__ or "")
    told = {name: " ".join(words.split()) for name, words in re.findall(r"^    (\w+): ((?:.+\n?(?:        .+\n?)*))", text, re.MULTILINE)}
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        name = first[1] if field.name == first[0] else field.name
        value = dict(VALUES.get(field.name, TEXT).schema)
        properties[name] = value | ({"description": told[field.name]} if field.name in told else {})
        if field.default is field.default_factory is dataclasses.MISSING and name not in free:
            required.append(name)
    about = " ".join(text.split("\n\n")[0].split())
    found = {"type": "object", "description": about, "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
