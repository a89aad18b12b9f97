"""``--rename``, ``--drop`` and ``--only``: a recipe on the command line, in the name language of recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from streamconv.conversion.options import Options
from streamconv.errors import UsageError
from streamconv.notation.names import parse as parse_names
from streamconv.recipe import Drop, Recipe, Rule
from streamconv.recipe.facts import Fact

ARROW = "->"
_STAR = re.compile(r"\*(?![^{}]*\})")  # of a glob, and no capture's own
_EXPECTED = f"expected 'PATTERN {ARROW} PATTERN', such as 'model.{{rest*}} {ARROW} {{rest*}}'"
_DROPPED, _OTHERS = "--drop names it", "--only does not name it"


def with_renaming(options: Options, recipe: Recipe | None) -> Recipe | None:
    """The recipe that is asked for, after one of what options say of names, if they say something.

    Raises:
        UsageError: a rename without an arrow.
        NotationError: a pattern that cannot be read; it points at the character.
    """
    facts = list(_facts(options))
    if not facts:
        return recipe
    if recipe is None:
        return Recipe("command-line", "what --rename, --drop and --only say", tuple(facts))
    sides = replace(recipe, rules=tuple(facts), dims={}, requires={}, reference="", then=None)
    return replace(sides, then=recipe)


def _facts(options: Options) -> Iterator[Fact]:
    for text in options.rename:
        if ARROW not in text:
            raise UsageError(f"--rename {text!r}: {_EXPECTED}")
        yield rule_of("--rename", text)
    for text in options.drop:
        pattern = _starred(text)
        parse_names(pattern)
        yield Drop(pattern, _DROPPED, optional=False)
    if options.only:
        for text in options.only:
            pattern = _starred(text)
            parse_names(pattern)
            yield Rule(pattern, pattern, sparse=True)
        yield Drop("{name*}", _OTHERS, fallback=True)
    elif options.rename or options.drop:
        yield Rule("{name*}", "{name*}", fallback=True, optional=True)


def rule_of(option: str, text: str) -> Rule:
    """The rule for what an option says: ``PATTERN -> PATTERN``, or one pattern for names that stay.

    Raises:
        UsageError: an arrow with nothing on a side of it.
        NotationError: a pattern that cannot be read.
    """
    left, arrow, right = text.partition(ARROW)
    if not left.strip() or (arrow and not right.strip()):
        raise UsageError(f"{option} {text!r}: {_EXPECTED}")
    old, new = (_starred(side.strip()) for side in (left, right if arrow else left))
    parse_names(old), parse_names(new)
    return Rule(old, new, sparse=True)


def _starred(text: str) -> str:
    """A pattern with each ``*`` of a glob as a capture of its own."""
    numbers = count(1)
    return _STAR.sub(lambda _: f"{{any{next(numbers)}*}}", text)
