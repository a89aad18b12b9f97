"""What a recipe says, for people and programs."""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Drop, Fact, Make, Recipe, Tie
from streamconv.text import join_lines


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """One row of ``recipes --json``."""
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "source_format": recipe.source.format,
        "target_format": recipe.target.format,
        "options": [
            {"name": name, "help": option.help, "default": option.default, "choices": option.choices}
            for name, option in recipe.settings.items()
        ],
        "reference": recipe.reference,
    }


def explain_recipe(recipe: Recipe) -> str:
    """What ``recipes NAME`` prints: every rule and option, and where the facts come from."""
    lines = [f"{recipe.name}: {recipe.summary}", f"  {recipe.source.format} -> {recipe.target.format}"]
    if recipe.reference:
        lines.append(f"  facts from {recipe.reference}")
    lines += [f"  --set {name}=...  {option.help}" for name, option in recipe.settings.items()]
    stages = recipe.stages
    for stage in stages:
        for fact in stage.rules:
            lines += _explain_fact(fact)
    for stage in stages:
        lines += [f"  requires {condition}" for condition in stage.requires]
    lines += [f"  lost: {line}" for line in recipe.lost]
    return join_lines(lines)


def _explain_fact(fact: Fact) -> list[str]:
    """A fact in two lines, or three: which names, what becomes of them, by which layout."""
    when = f"   when {fact.when}" if fact.when else ""
    if isinstance(fact, Drop):
        return [f"  {fact.left}", f"   dropped: {fact.reason}{when}"]
    if isinstance(fact, Make):
        return [f"  {fact.right}", f"   {'made' if fact.op else 'not made'}: {fact.reason}{when}"]
    if isinstance(fact, Tie):
        how = f"left out where it repeats {fact.stored}" if fact.flipped else f"repeats {fact.left} where nothing else makes it"
        return [f"  {fact.right}", f"   {how}{when}"]
    optional = "  (optional)" if fact.optional else ""
    if isinstance(fact.optional, str):
        optional = f"  (optional when {fact.optional})"
    how = " ".join(filter(None, (str(fact.op.get("op", "")), fact.layout)))
    return [f"  {fact.left}", f"   -> {fact.right}{optional}{when}", *([f"      {how}"] if how else [])]
