"""Recipes by their names: those of a package of declarations, those that other packages add, and those in files."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import RecipeError, UsageError
from streamconv.extensions import extensions
from streamconv.notation.names import nearest
from streamconv.recipe import files
from streamconv.recipe.model import Writer
from streamconv.recipe.recipe import Recipe

GROUP = "streamconv.recipes"
INVERSE = ":inverse"


@dataclass
class Registry:
    """The recipes below a package, whose modules each have a tuple ``RECIPES``, and those of entry-point group `GROUP`.

    Attributes:
        package: the package's name.
        modules: module below the package -> the names of its recipes, between blanks. What is not here is looked for in all modules.
        known: all of them by name, once they have been asked for.
    """

    package: str
    modules: Mapping[str, str]
    known: dict[str, Recipe] = field(default_factory=dict)

    def get(self, name: str) -> Recipe:
        """The recipe of that name, or the one in that ``.yaml``, ``.json`` or ``.py`` file; ``FILE.py:NAME`` where it has several.

        With ``:inverse`` at its end it is the recipe in the other direction. A recipe of the package loads its own module only.

        Raises:
            UsageError: there is none.
            RecipeError: the file is not a recipe.

        >>> sorted(streamconv.recipes.get("gemma-original2hf").options)
        ['head_dim', 'num_attention_heads', 'num_key_value_heads']
        >>> streamconv.recipes.get("gemma-original2hf:inverse").name
        'gemma-original2hf:inverse'
        """
        if name.endswith(INVERSE):
            forward = self.get(name.removesuffix(INVERSE))
            return forward.inverse(f"{forward.name}{INVERSE}")
        if name.endswith((".yaml", ".yml", ".json")):
            return self.load(Path(name))
        file, mark, recipe_name = name.rpartition(".py:")
        if mark or name.endswith(".py"):
            return files.run(Path(f"{file}.py") if mark else Path(name), recipe_name if mark else None)
        return self._find(name)

    def load(self, path: Path) -> Recipe:
        """The recipe in a YAML or JSON file.

        Raises:
            UsageError: the file cannot be read.
            RecipeError: it is not a recipe; says at which line and column.
        """
        return files.load(path, self.find_writer)

    def find_writer(self, writes: Writer | str) -> Writer:
        """The function that `Side.writes` is, or names.

        Raises:
            RecipeError: it names no recipe, or one without such a function.
        """
        if not isinstance(writes, str):
            return writes
        try:
            forward = self._find(writes.removesuffix(INVERSE))
        except UsageError as error:
            raise RecipeError(f"writes {writes!r}: there is no recipe of that name; give one whose JSON files are wanted") from error
        side = forward.source if writes.endswith(INVERSE) else forward.target
        if side.writes is None or isinstance(side.writes, str):
            raise RecipeError(f"writes {writes!r}: that recipe makes no JSON files of its own")
        return side.writes

    def _find(self, name: str) -> Recipe:
        """The recipe of that name. Raises UsageError."""
        for module, names in self.modules.items():
            if name in names.split():
                return next(recipe for recipe in self._declarations(module) if recipe.name == name)
        recipes = self.all()
        if name not in recipes:
            near = nearest(name, recipes)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"unknown recipe {name!r}: {hint}'streamconv recipes' lists all {len(recipes)}; or give a .yaml, .json or .py file"
            )
        return recipes[name]

    def all(self) -> dict[str, Recipe]:
        """All known recipes by name.

        Raises:
            RecipeError: two recipes have the same name, or an entry point does not give recipes.
        """
        if not self.known:
            recipes: dict[str, Recipe] = {}
            for origin, recipe in self._everywhere():
                if not isinstance(recipe, Recipe):
                    raise RecipeError(f"{origin} gives a {type(recipe).__name__}, not a Recipe")
                if recipe.name in recipes:
                    raise RecipeError(f"two recipes are called {recipe.name}; the second comes from {origin}")
                recipes[recipe.name] = recipe
            self.known = dict(sorted(recipes.items()))
        return dict(self.known)

    def select(self, fits: Callable[[str], bool]) -> list[Recipe]:
        """The recipes whose names fit, in the order of these, without loading others of the package.

        Raises:
            RecipeError: as `all` does, where other packages add recipes.
        """
        return [self._find(name) for name in self.names() if fits(name)]

    def names(self) -> list[str]:
        """The names of all recipes, in order, without loading those of the package.

        Raises:
            RecipeError: as `all` does, where other packages add recipes.
        """
        if self.known or any(True for _ in extensions(GROUP)):
            return list(self.all())
        return sorted(name for names in self.modules.values() for name in names.split())

    def forget(self) -> None:
        """Looks for entry points anew when recipes are asked for again."""
        self.known = {}

    def _everywhere(self) -> Iterator[tuple[str, Any]]:
        """All recipes, with the module or entry point that each is from."""
        package = importlib.import_module(self.package)
        for info in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            if not info.ispkg:
                yield from ((info.name, recipe) for recipe in self._declarations(info.name.removeprefix(f"{self.package}.")))
        for extension in extensions(GROUP):
            value = extension.load()
            for recipe in (value,) if isinstance(value, Recipe) else value:
                yield extension.origin, recipe

    def _declarations(self, module: str) -> tuple[Recipe, ...]:
        """The recipes of a module of the package."""
        recipes: tuple[Recipe, ...] = importlib.import_module(f"{self.package}.{module}").RECIPES
        return recipes
