"""Recipe files: YAML and JSON, whose problems are told by line and column, and Python files, which are run."""

from __future__ import annotations

import errno
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv.errors import NotationError, RecipeError, UsageError
from streamconv.recipe.declaration import KINDS, within
from streamconv.recipe.model import Writer
from streamconv.recipe.recipe import Recipe
from streamconv.recipe.settable import with_sizes
from streamconv.storage.reading import read_whole

_MAX_FILE = 4 << 20  # bytes of a recipe file
_DEEPEST = 32  # lists and mappings in each other
_MOST = 200_000  # texts, numbers, lists and mappings


def load(path: Path, find_writer: Callable[[str], Writer]) -> Recipe:
    """The recipe in a YAML or JSON file; ``find_writer`` gives the functions that it names.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: it is not a recipe; says at which line and column.
    """
    text = read_text(path)
    try:
        data, node = parse(text, json_only=path.suffix == ".json")
    except RecipeError as error:
        raise RecipeError(f"{path}:{error}") from error
    except Exception as error:
        raise RecipeError(f"{path}: cannot be parsed: {' '.join(str(error).split())[:300]}") from error
    if isinstance(data, dict):
        data.setdefault("name", path.stem)
    try:
        recipe = Recipe.from_dict(data, str(path))
        for depth, stage in enumerate(recipe.stages):
            for key, side in (("left", stage.left), ("right", stage.right)):
                if isinstance(side.writes, str):
                    with within(*["then"] * depth, key, "writes"):
                        find_writer(side.writes)
        recipe = with_sizes(recipe)
    except RecipeError as error:
        message = str(error).removeprefix(str(path)).lstrip(":, ")
        raise RecipeError(f"{path}:{_where(node, error)}: {message}") from error
    return recipe


def read_text(path: Path) -> str:
    """A recipe file's text. Raises UsageError where it cannot be read, RecipeError where it is none."""
    try:
        return read_whole(path, _MAX_FILE).decode()
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise RecipeError(f"{path}: larger than {_MAX_FILE} bytes, which no recipe is") from error
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe file") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not UTF-8 text") from error


def parse(text: str, *, json_only: bool) -> tuple[Any, Any]:
    """The data in a file, and its YAML nodes, which know where they stand. Raises RecipeError with a line, or what parsers do."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_extent(yaml, loader, text.replace("\t", " ") if json_only else text)
        data = json.loads(text) if json_only else None
        reader = loader(text.replace("\t", " ") if json_only else text)  # JSON may be indented by tabs, YAML may not
        node = reader.get_single_node()
        _check_keys(node, set())
        if not json_only and node:
            data = reader.construct_document(node)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{error.lineno}:{error.colno}: cannot be parsed: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{_place(mark)}: cannot be parsed: {error.problem or error.context}") from error
    return data, node


def _check_extent(yaml: Any, loader: Any, text: str) -> None:
    """Refuses what would grow: YAML that is nested deeply, or that says things many times by its aliases.

    It is looked at piece by piece, before anything is made of it.
    """
    depth = count = 0
    counts: dict[str, int] = {}  # how many pieces an anchor stands for
    outer: list[tuple[str | None, int]] = []  # of what lies around a piece: its anchor, and the count where it begins
    for event in yaml.parse(text, Loader=loader):
        count += 1
        if isinstance(event, yaml.AliasEvent):
            if any(name == event.anchor for name, _ in outer):
                raise RecipeError(f"{_place(event.start_mark)}: *{event.anchor} lies in itself; write it out")
            count += counts.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            outer.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            name, start = outer.pop()
            if name is not None:
                counts[name] = count - start
        depth = len(outer)
        if depth > _DEEPEST or count > _MOST:
            problem = f"nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"more than {_MOST} items, those of aliases counted"
            raise RecipeError(f"{_place(event.start_mark)}: {problem}, which no recipe has")


def _check_keys(node: Any, visited: set[int]) -> None:
    """Raises RecipeError where a key stands twice in one mapping."""
    if id(node) in visited or node is None or isinstance(node.value, str):
        return
    visited.add(id(node))
    keys: set[str] = set()
    for item in node.value:
        if isinstance(item, tuple):
            key = item[0]
            if isinstance(key.value, str) and key.value in keys:
                raise RecipeError(f"{_place(key.start_mark)}: {key.value!r} a second time; remove one")
            keys.add(str(key.value))
        for child in _children(item):
            _check_keys(child, visited)


def _place(mark: Any, columns: int = 0) -> str:
    return f"{mark.line + 1}:{mark.column + 1 + columns}"


def _where(node: Any, error: RecipeError) -> str:
    """``line:column`` of the key or item at an error's place; for a notation that of the character."""
    mark = node.start_mark if node else None
    for key in error.place:
        pairs = [item if isinstance(item, tuple) else (item, item) for item in node.value] if isinstance(node.value, list) else []
        texts = {str(pair[0].value): pair for pair in pairs}
        kind = next((kind for kind in KINDS if kind in texts), "left")
        pair = pairs[key] if isinstance(key, int) else texts.get(key) or texts.get(kind if key == "left" else "")
        if pair is None:
            break
        mark, node = pair[0].start_mark, pair[1]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NotationError):
        cause = cause.__cause__
    scalar = _scalar(node, cause.text) if cause is not None else None
    if cause is not None and scalar is not None:
        plain = scalar.start_mark.line == scalar.end_mark.line and "\\" not in scalar.value
        inside = scalar.value.find(cause.text) + cause.position + (scalar.style in ("'", '"'))
        return _place(scalar.start_mark, inside if plain else 0)
    return _place(mark) if mark else "1:1"


def _scalar(node: Any, text: str) -> Any:
    """The first text below a node that has this in it."""
    if isinstance(node.value, str):
        return node if text in node.value else None
    for item in node.value:
        for child in _children(item):
            scalar = _scalar(child, text)
            if scalar is not None:
                return scalar
    return None


def _children(item: Any) -> tuple[Any, ...]:
    """The nodes of an item of a list, which is one, or of a mapping, which is its key and its value."""
    return item if isinstance(item, tuple) else (item,)


def run(path: Path, name: str | None) -> Recipe:
    """The recipe in a Python file, which is run: its ``RECIPE``, or the one of its ``RECIPES`` that is called ``name``.

    Raises:
        UsageError: the file cannot be read, or has several and no name is given.
        RecipeError: it cannot be run, or holds none.
    """
    code = read_text(path)
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(code, str(path), "exec"), names)  # noqa: S102 - its user named it on the command line to have it run
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        line = lines[-1] if lines else 1
        raise RecipeError(f"{path}:{line}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    value = names.get("RECIPE", names.get("RECIPES", ()))
    recipes = list(value) if isinstance(value, list | tuple) else [value]
    if not recipes or not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise RecipeError(f"{path}: found no recipe: it must set RECIPE to a Recipe, or RECIPES to a tuple of them")
    matches = [recipe for recipe in recipes if name in (None, recipe.name)]
    if len(matches) != 1:
        raise UsageError(f"{path}: name one of its recipes: {', '.join(f'{path}:{recipe.name}' for recipe in recipes)}")
    return with_sizes(matches[0])
