"""The recipes that come along, and those that other packages and recipe files add.

A module here is declarations only: a tuple ``RECIPES``. Another package adds recipes by the entry-point group
``streamconv.recipes``, each entry a `Recipe` or a tuple of them.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from streamconv.errors import RecipeError, UsageError
from streamconv.names import nearest
from streamconv.recipe import Recipe

GROUP = "streamconv.recipes"
_MAX_FILE = 4 << 20  # bytes of a recipe file


@cache
def registry() -> dict[str, Recipe]:
    """All known recipes by name.

    Raises:
        RecipeError: two recipes have the same name, or an entry point does not give recipes.
    """
    found: dict[str, Recipe] = {}
    given = [(name, importlib.import_module(f"{__name__}.{name}").RECIPES) for _, name, _ in pkgutil.iter_modules(__path__)]
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        given.append((entry.value, (loaded,) if isinstance(loaded, Recipe) else loaded))
    for origin, recipes in given:
        for recipe in recipes:
            if not isinstance(recipe, Recipe):
                raise RecipeError(f"entry point {origin} of group {GROUP} gives a {type(recipe).__name__}, not a Recipe")
            if recipe.name in found:
                raise RecipeError(f"two recipes are called {recipe.name}; the second comes from {origin}")
            found[recipe.name] = recipe
    return dict(sorted(found.items()))


def get(name: str) -> Recipe:
    """The recipe of that name, or the one in that ``.yaml`` or ``.json`` file.

    Raises:
        UsageError: there is none.
        RecipeError: the file is not a recipe.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        return load(Path(name))
    known = registry()
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown recipe {name!r}: {hint}known are {', '.join(known)}; or give a .yaml or .json file")
    return known[name]


def load(path: Path) -> Recipe:
    """The recipe in a YAML or JSON file.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: it is not a recipe.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise RecipeError(f"{path}: larger than {_MAX_FILE} bytes, which no recipe is")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe file") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not UTF-8 text") from error
    try:
        if path.suffix == ".json":
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except Exception as error:
        raise RecipeError(f"{path}: cannot be parsed: {' '.join(str(error).split())[:300]}") from error
    if isinstance(data, dict):
        data.setdefault("name", path.stem)
    recipe = Recipe.from_dict(data, str(path))
    for code in (recipe.config, recipe.inverse_config):
        if code is not None and not code.startswith(f"{__name__}."):
            raise RecipeError(f"{path}: config {code!r} names code to run, which a file may take from {__name__} only; leave it out")
    return recipe
