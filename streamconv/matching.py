"""Which recipes fit a checkpoint, and which one its config.json points at."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from streamconv import recipes
from streamconv.checkpoint import CONTAINERS, Checkpoint, choose_files, find_checkpoint, open_checkpoint, read_config
from streamconv.errors import StreamconvError
from streamconv.recipe import Recipe, Side
from streamconv.sides import open_side
from streamconv.storage.remote import Location

_Found = TypeVar("_Found")


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
    src, _ = find_checkpoint(src)
    opened = _Opened(src)
    known = ((recipe, opened.get(recipe.source)) for recipe in recipes.registry().values() if recipe.rules)
    found = [_match(recipe, *read) for recipe, read in known if read]
    if not found:
        open_checkpoint(src)  # which says what is wrong with it
    return sorted(found, key=lambda match: (-match.fits, -match.named, -match.tensors * match.rules, match.recipe.name))


class _Opened:
    """A checkpoint as different sides read it, each reading of its files once."""

    def __init__(self, src: Location) -> None:
        self._src = src
        self._chosen: dict[tuple[tuple[str, ...], ...], tuple[list[str], bool] | None] = {}
        self._read: dict[str, tuple[Checkpoint, dict[str, int]] | None] = {}

    def get(self, side: Side) -> tuple[Checkpoint, dict[str, int]] | None:
        """The checkpoint and the kinds of its names; None where a side cannot read it."""
        patterns = (side.ranks, side.files)
        if patterns not in self._chosen:
            self._chosen[patterns] = self._try(lambda: choose_files(self._src, *patterns))
        key = repr(self._chosen[patterns])
        if key not in self._read:
            checkpoint = self._try(lambda: open_side(self._src, side))
            own = checkpoint.components.get("") if checkpoint else None  # a recipe is for the model's own component
            self._read[key] = (Checkpoint(checkpoint.path, own), _count_kinds(own.entries)) if checkpoint and own else None
        if (known := self._read[key]) is None:
            return None
        return Checkpoint(known[0].path, known[0].contents, side.config), known[1]

    @staticmethod
    def _try(call: Callable[[], _Found]) -> _Found | None:
        try:
            return call()
        except StreamconvError:
            return None


def _count_kinds(names: Iterable[str]) -> dict[str, int]:
    """The first of the names that differ in numbers only -> how many these are: a rule is for all of them, as a rule."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub("[0-9]+", "0", name), []).append(name)
    return {group[0]: len(group) for group in groups.values()}


def _match(recipe: Recipe, checkpoint: Checkpoint, kinds: Mapping[str, int]) -> Match:
    tensors, rules, fits = 0.0, 0.0, False
    try:
        tensors, rules = recipe.coverage(kinds)
        ranked = CONTAINERS[recipe.source.format].by_rank == CONTAINERS[checkpoint.format].by_rank
        if tensors == 1 and rules in {0, 1} and ranked:  # all that can be seen from names: now their shapes, which takes much longer
            recipe.apply(checkpoint.contents.entries, checkpoint.config)
            fits = True
    except Exception:  # noqa: BLE001, S110 - whatever keeps it from being applied, it does not fit
        pass
    return Match(recipe, tensors, rules, fits, recipes.is_named(recipe, checkpoint.config))


def suggest_recipes(src: str | os.PathLike[str]) -> list[str]:
    """The recipes that go by the model type in a checkpoint's config.json and have a rule for each of its tensors."""
    src, _ = find_checkpoint(src)
    config = read_config(src if src.is_dir() else src.parent)
    named = [recipe for recipe in recipes.registry().values() if recipes.is_named(recipe, config)] if config.get("model_type") else []
    kinds = _count_kinds(open_checkpoint(src, components=False)) if named else {}
    return [recipe.name for recipe in named if recipe.coverage(kinds) == (1, 1)]
