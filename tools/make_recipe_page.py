"""Writes docs/recipe-list.md: what each recipe converts, where its facts come from, its options, and what is lost on the way back.

``python -m tools.make_recipe_page``
"""

from __future__ import annotations

from pathlib import Path

from streamconv.recipe import Recipe
from streamconv.recipes import registry

PAGE = Path(__file__).parent.parent / "docs" / "recipe-list.md"
HEAD = """# All recipes

Made of the recipes themselves. `streamconv recipes NAME` also prints each rule, names and layouts; `streamconv recipes --match SRC` says
which fit a checkpoint. Sizes that config.json has are taken from there; `--set NAME=VALUE` says them where it does not.
"""


def page() -> str:
    """The page as Markdown."""
    recipes = registry()
    return "\n".join([HEAD, *(section(recipes[name]) for name in sorted(recipes))])


def section(recipe: Recipe) -> str:
    """What is said of one recipe."""
    lines = [f"## {recipe.name}", "", f"{recipe.summary}. {recipe.source.format} to {recipe.target.format}."]
    if recipe.reference:
        lines[-1] += f" Facts from {recipe.reference}."
    options = [f"| `{name}` | {cell(option.help)} |" for name, option in recipe.settings.items()]
    if options:
        lines += ["", "| `--set` | |", "|---|---|", *options]
    if recipe.lost:
        lines += ["", "Lost on the way back:", "", *(f"- `{one.partition(': ')[0]}`: {one.partition(': ')[2]}" for one in recipe.lost)]
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
