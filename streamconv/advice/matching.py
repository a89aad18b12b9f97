"""Which recipes fit a checkpoint, and which one its config.json points at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

from streamconv import recipes
from streamconv.advice.goals import GOALS, LAYOUT, OPTION, Goal
from streamconv.checkpoint.opening import Checkpoint, choose_files, find_checkpoint, open_checkpoint, read_config
from streamconv.errors import StreamconvError
from streamconv.formats.registry import containers
from streamconv.recipe import Recipe, Side
from streamconv.stage import begin
from streamconv.storage.folder import AnyPath, Location

LIBRARY = "transformers"
COUNTS = ("size", "model_parallel")  # options that say how many ranks there are to be, and have to be given
SIZE = 1  # of these, to see whether all else fits
RELATED: Mapping[str, tuple[str, ...]] = {
    "mcore": ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3"),
    "qwen": ("qwen2", "qwen2_moe"),
    "qwen2_5": ("qwen2",),
    "mixtral-8x7b": ("mixtral",),
    "deepseek3": ("deepseek_v3",),
    "gpt": ("gpt2",),
    "glm": ("chatglm",),
    "glm-n": ("chatglm", "glm"),
    "chatglm2": ("chatglm",),
    "chatglm3": ("chatglm",),
    "baichuan2": ("baichuan",),
    "cogvlm2": ("cogvlm",),
    "wizardcoder": ("gpt_bigcode",),
    "mae": ("vit_mae",),
    "telechat2": ("telechat",),
    "qwenvl": ("qwen",),
}
"""Families of recipes -> the model types of their configs, where these are not what the family is called."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Match:
    """How well a recipe fits a checkpoint: the shares of its tensors that have a rule, and of the rules that must have a tensor.

    ``fits``: nothing is left over, missing or of the wrong shape; ``named``: it goes by the model type that config.json says; ``needs``: a
    package that knows the facts, and is not asked, or not there to be: it may fit; ``config``: what the recipe takes for the source's.
    """

    recipe: Recipe
    tensors: float
    rules: float
    fits: bool
    named: bool
    needs: str = ""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)


def match_recipes(src: AnyPath) -> list[str]:
    """The names of the recipes that fit a checkpoint, the likeliest first. Raises as `rank_recipes`."""
    return [match.recipe.name for match in rank_recipes(src) if match.fits]


def rank_recipes(
    src: AnyPath,
    *,
    library: bool = False,
    among: Callable[[str], bool] | None = None,
    prepare: Callable[[Checkpoint], Checkpoint] | None = None,
) -> list[Match]:
    """The recipes that fit a checkpoint and then the others, the nearest first.

    Args:
        src: where it is.
        library: those too that have no rules of their own and ask transformers, which is loaded for it if it is there.
        among: only those of such names; those of others are not loaded, nor is transformers without ``library``.
        prepare: what is done to the checkpoint before a recipe sees it.

    Raises:
        StreamconvError: it cannot be read.
    """
    location, _ = find_checkpoint(src)
    readings = _Readings(location, prepare)
    matches: list[Match] = []
    candidates = list(recipes.registry().values()) if among is None else recipes.select(among)
    for number, recipe in enumerate(candidates, 1):
        begin(f"trying recipe {number} of {len(candidates)}: {recipe.name}")
        reading = readings.get(recipe.source) if recipe.rules or library or among else None
        if reading is not None:
            checkpoint, kinds = reading
            matches.append(
                _match(recipe, checkpoint, kinds) if recipe.rules else _match_library(recipe, checkpoint, tries=library or not among)
            )
    if not matches and among is None:
        open_checkpoint(location)  # which says what is wrong with it
    return sorted(matches, key=_nearness)


def _nearness(match: Match) -> tuple[int, bool, int, float, str]:
    """What sorts matches, the likeliest first."""
    return -match.fits, bool(match.needs), -match.named, -match.tensors * match.rules, match.recipe.name


def suggest_merging(src: Location) -> list[str]:
    """The recipes that make one model of a checkpoint's ranks, the likeliest first."""
    with suppress(StreamconvError):
        fitting = [match.recipe for match in rank_recipes(src) if match.fits]
        merging = [recipe.name for recipe in fitting if recipe.source.ranks and not recipe.target.ranks]
        if merging:
            return merging
    with suppress(StreamconvError):
        return _merging_by_plan(src)
    return []


def _merging_by_plan(src: Location) -> list[str]:
    """Those that go by a plan of tensors, not by rules, for ranks: of the family whose names these are, else for any."""
    for_ranks = [recipe for recipe in recipes.registry().values() if not recipe.rules and recipe.source.ranks]
    candidates = [recipe for recipe in for_ranks if choose_files(src, recipe.source.ranks, ())[1]]
    if not candidates:
        return []
    from streamconv.conversion.sides import open_side  # where something is opened, and not to look at names

    kinds = _count_kinds(name.partition("/")[2] for name in open_side(src, candidates[0].source))
    own = [recipe.name for recipe in candidates if recipe.then and recipe.then.coverage(kinds)[0] == 1]
    return own or [recipe.name for recipe in candidates if not recipe.then]


class _Readings:
    """A checkpoint as different sides read it, each reading of its files once."""

    def __init__(self, src: Location, prepare: Callable[[Checkpoint], Checkpoint] | None = None) -> None:
        self._src, self._prepare = src, prepare
        self._files: dict[tuple[tuple[str, ...], ...], tuple[list[str], bool] | None] = {}
        self._readings: dict[str, tuple[Checkpoint, dict[str, int]] | None] = {}

    def get(self, side: Side) -> tuple[Checkpoint, dict[str, int]] | None:
        """The checkpoint and the kinds of its names; None where a side cannot read it."""
        patterns = (side.ranks, side.files)
        if patterns not in self._files:
            self._files[patterns] = _try(partial(choose_files, self._src, *patterns))
        key = repr(self._files[patterns])
        if key not in self._readings:
            self._readings[key] = self._read(side)
        reading = self._readings[key]
        if reading is None:
            return None
        checkpoint, kinds = reading
        return Checkpoint(checkpoint.location, checkpoint.contents, side.config), kinds

    def _read(self, side: Side) -> tuple[Checkpoint, dict[str, int]] | None:
        """The model's own component, which is what a recipe is for, and the kinds of its names; None where a side cannot read it."""
        from streamconv.conversion.sides import open_side

        checkpoint = _try(partial(open_side, self._src, side))
        if checkpoint and self._prepare:
            checkpoint = _try(partial(self._prepare, checkpoint))
        own = checkpoint.components.get("") if checkpoint else None
        return (Checkpoint(checkpoint.location, own), _count_kinds(own.entries)) if checkpoint and own else None


def _try(call: Callable[[], _Result]) -> _Result | None:
    """What a call gives, or None where the checkpoint is not as it expects."""
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
        both_by_rank = containers()[recipe.source.format].by_rank == containers()[checkpoint.format].by_rank
        if tensors == 1 and rules in {0, 1} and both_by_rank:  # all that can be seen from names: now their shapes, which takes much longer
            recipe.apply(checkpoint.contents.entries, checkpoint.config)
            fits = True
    except Exception:  # noqa: BLE001, S110 - whatever keeps it from being applied, it does not fit
        pass
    return Match(recipe, tensors, rules, fits, recipes.is_named(recipe.name, checkpoint.config), config=checkpoint.config)


def _match_library(recipe: Recipe, checkpoint: Checkpoint, *, tries: bool = True) -> Match:
    """A recipe without rules: tried, unless it asks transformers and that is not to be, or not there: then it may fit by its config."""
    from streamconv.library.parallel import TensorParallel

    needs = "" if isinstance(recipe, TensorParallel) and recipe.own else LIBRARY
    config = checkpoint.config
    both_by_rank = bool(recipe.source.ranks) == any("/" in name for name in checkpoint)
    no_match = Match(recipe, 0.0, 0.0, fits=False, named=False, config=config)
    if not both_by_rank or (needs and not (config.get("model_type") and config.get("architectures"))):
        return no_match
    if needs and (not tries or find_spec(LIBRARY) is None):
        return replace(no_match, needs=needs)
    try:
        recipe.apply(checkpoint.contents.entries, config, {name: SIZE for name in recipe.settings if name in COUNTS})
    except Exception:  # noqa: BLE001 - as above
        return no_match
    return Match(recipe, 1.0, 1.0, fits=True, named=False, needs=needs, config=config)


def suggest_recipes(src: AnyPath, names: Iterable[str]) -> list[str]:
    """The recipes that go by the model type in a checkpoint's config.json and have a rule for each tensor of these names."""
    location, _ = find_checkpoint(src)
    config = read_config(location.folder)
    if not config.get("model_type"):
        return []
    candidates = recipes.select(lambda name: recipes.is_named(name, config))
    kinds = _count_kinds(name for name in names if "/" not in name) if candidates else {}
    return [recipe.name for recipe in candidates if recipe.coverage(kinds) == (1, 1)]


def name_ways(src: AnyPath, names: Iterable[str]) -> list[str]:
    """What `suggest_recipes` suggests as options, the shortest that mean it: words of ``--to`` where these lead to no other recipe."""
    ways = suggest_recipes(src, names)
    config = read_config(find_checkpoint(src)[0].folder) if ways else {}
    words = {name: word for name in ways if (word := _find_word(name, config))}
    others = [name for name in ways if name not in words]
    options = {OPTION: dict.fromkeys(words.values()), "--recipe": others}
    return [f"{option} {' or '.join(values)}" for option, values in options.items() if values]


def _find_word(name: str, config: Mapping[str, Any]) -> str:
    """The word of ``--to`` that leads to a recipe and to no other of the model's family; none: ""."""
    return next((goal.word for goal in GOALS if goal.kind == LAYOUT and _of_family(goal, config) == [name]), "")


def _of_family(goal: Goal, config: Mapping[str, Any]) -> list[str]:
    """The recipes that lead to a goal and are of the family of a config's model type."""
    kind = str(config.get("model_type"))
    leading = [name for name in recipes.list_names() if goal.leads(name)]
    return [name for name in leading if recipes.is_named(name, config) or kind in RELATED.get(name.rpartition("-")[0], ())]
