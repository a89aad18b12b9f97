"""Sizes of a recipe file's layouts and expressions that nothing else gives: ``--set`` takes them by the names they have there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from streamconv.notation.axes import parse as parse_layout
from streamconv.notation.expressions import find_names
from streamconv.notation.names import Capture
from streamconv.notation.names import parse as parse_names
from streamconv.recipe.facts import Dim, Fact, Option, Rule, Tie, pattern_of
from streamconv.recipe.recipe import Recipe

_OTHER = ("config", "sidecar", "given")  # which stand for whole files


def with_sizes(recipe: Recipe) -> Recipe:
    """A recipe that has options for the sizes of its axes, and for the numbers that its expressions take from config.json."""
    settings = recipe.settings
    names = [name for name in dict.fromkeys(_expression_names(recipe)) if name not in settings and name not in _OTHER]
    options = {name: Option(f"{name} of config.json", default=f"{{{name}}}", kind="int") for name in names}
    axes = [axis for axis in dict.fromkeys(_axes(recipe.rules)) if axis not in settings and axis not in options]
    options |= {axis: Option(f"the size of axis {axis}, where shapes do not give it", kind="int") for axis in axes}
    dims: dict[str, Dim] = {axis: axis for axis in axes}
    dims |= {axis: _after_option(axis, size, axes) for axis, size in recipe.dims.items()}
    rules = tuple(_with_own(fact, axes) for fact in recipe.rules)
    then = with_sizes(recipe.then) if recipe.then else None
    return replace(recipe, rules=rules, dims=dims, options={**recipe.options, **options}, then=then)


def _after_option(axis: str, size: Dim, axes: Iterable[str]) -> Dim:
    """A size that an option comes before, where the recipe does not insist."""
    insists = not isinstance(size, str) or size.startswith("=")
    return size if insists or axis not in axes else f"{axis} or ({size})"


def _with_own(fact: Fact, axes: Iterable[str]) -> Fact:
    if not isinstance(fact, Rule) or not fact.dims:
        return fact
    return replace(fact, dims={axis: _after_option(axis, size, axes) for axis, size in fact.dims.items()})


def _axes(facts: Iterable[Fact]) -> Iterator[str]:
    """The axes of all layouts, but for those that count tensors."""
    for fact in facts:
        if isinstance(fact, Rule) and fact.layout:
            captures = {capture.name for capture in _captures(fact)}
            yield from (axis for axis in parse_layout(fact.layout).axes if axis.isidentifier() and axis not in captures)


def _expression_names(recipe: Recipe) -> Iterator[str]:
    """The names in the expressions that sizes are."""
    yield from _names(recipe.dims.values(), ())
    for fact in recipe.rules:
        if isinstance(fact, Tie):
            continue
        captures = _captures(fact)
        numbers = {capture.name: capture.operand for capture in captures if capture.operator and capture.operand != "*"}
        names = [capture.name for capture in captures] + [*recipe.dims, *fact.dims]
        yield from _names(numbers.values(), names)
        for sizes in (fact.dims, fact.op, fact.undo if isinstance(fact, Rule) else {}):
            yield from _names((size for key, size in sizes.items() if key != "op"), [capture.name for capture in captures])


def _captures(fact: Fact) -> list[Capture]:
    """The captures of a fact's names, of a rule's on both sides."""
    captures = list(parse_names(pattern_of(fact)).captures)
    if isinstance(fact, Rule):
        captures += parse_names(fact.right).captures
    return captures


def _names(sizes: Iterable[Dim | float], captures: Iterable[str]) -> Iterator[str]:
    for size in sizes:
        if isinstance(size, Mapping):
            yield from _names(size.values(), captures)
        elif isinstance(size, str):
            yield from (name for name in find_names(size.removeprefix("=")) if name not in captures)
