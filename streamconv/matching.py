"""Which recipes fit a checkpoint, and which one its config.json points at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv import recipes
from streamconv.checkpoint import Checkpoint, open_checkpoint, read_config
from streamconv.errors import StreamconvError
from streamconv.recipe import Recipe
from streamconv.sides import open_side


@dataclass(frozen=True)
class Match:
    """How well a recipe fits a checkpoint: the shares of its tensors that have a rule, and of the rules that must have a tensor.

    ``fits``: nothing is left over, missing or of the wrong shape; ``named``: it goes by the model type that config.json says.
    """

    recipe: Recipe
    tensors: float
    rules: float
    fits: bool
    named: bool


def match_recipes(src: str | os.PathLike[str]) -> list[str]:
    """The names of the recipes that fit a checkpoint, the likeliest first. Raises as `rank_recipes`."""
    return [match.recipe.name for match in rank_recipes(src) if match.fits]


def rank_recipes(src: str | os.PathLike[str]) -> list[Match]:
    """The recipes that fit a checkpoint and then the others, the nearest first; those without rules, which ask a library, are left out.

    Raises:
        StreamconvError: it cannot be read.
    """
    found = []
    opened: dict[tuple[Any, ...], Checkpoint | None] = {}
    for recipe in recipes.registry().values():
        side = recipe.source
        key = (side.ranks, side.files, side.config)
        if key not in opened:
            try:
                opened[key] = open_side(src, side)
            except StreamconvError:
                opened[key] = None
        if recipe.rules and (checkpoint := opened[key]):
            found.append(_match(recipe, checkpoint))
    if not any(opened.values()):
        open_checkpoint(src)  # which says what is wrong with it
    return sorted(found, key=lambda match: (-match.fits, -match.named, -match.tensors * match.rules, match.recipe.name))


def _match(recipe: Recipe, checkpoint: Checkpoint) -> Match:
    entries = checkpoint.contents.entries
    tensors, rules, fits = 0.0, 0.0, False
    try:
        tensors, rules = recipe.coverage(entries)
        if tensors == 1:
            recipe.apply(entries, checkpoint.config)
            fits = True
    except Exception:  # noqa: BLE001, S110 - whatever keeps it from being applied, it does not fit
        pass
    return Match(recipe, tensors, rules, fits, recipes.is_named(recipe, checkpoint.config))


def suggest_recipes(src: str | os.PathLike[str]) -> list[str]:
    """The recipes that go by the model type in a checkpoint's config.json and have a rule for each of its tensors."""
    config = read_config(Path(src) if Path(src).is_dir() else Path(src).parent)
    named = [recipe for recipe in recipes.registry().values() if recipes.is_named(recipe, config)] if config.get("model_type") else []
    entries = open_checkpoint(src).contents.entries if named else {}
    return [recipe.name for recipe in named if recipe.coverage(entries) == (1, 1)]
