"""``--rename``, ``--drop`` and ``--only``: a recipe on the command line, in the name language of recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from streamconv.checkpoint.opening import Checkpoint, ties
from streamconv.conversion.altered import Altered
from streamconv.conversion.companions import weights_of
from streamconv.conversion.options import Options
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode
from streamconv.notation.names import parse as parse_names
from streamconv.recipe import Conversion, Drop, Recipe, Rule

ARROW = "->"
_STAR = re.compile(r"\*(?![^{}]*\})")  # of a glob, and no capture's own
_EXPECTED = f"expected 'PATTERN {ARROW} PATTERN', such as 'model.{{rest*}} {ARROW} {{rest*}}'"
_OTHERS = "--only does not name it"


def rename(options: Options, checkpoint: Checkpoint) -> Altered | None:
    """A checkpoint whose tensors are those that ``--only`` and ``--drop`` leave, under the names of ``--rename``; None: none is given.

    All patterns are of names in SRC: of several renames the first that takes a name says the new one, and two tensors may change places.

    Raises:
        UsageError: a rename without an arrow, or a checkpoint of components.
        CoverageError: a pattern that nothing matches, two tensors of one name, or a part of a quantized weight.
        NotationError: a pattern that cannot be read; it points at the character.
    """
    if not names_change(options):
        return None
    if "" not in checkpoint.components:
        others = ", ".join(checkpoint.components)
        raise UsageError(f"{checkpoint.path}: consists of {others}, and --rename, --drop and --only are of one model: give one as SRC")
    contents = checkpoint.components[""]
    rest = dict(contents.entries)
    dropped = _leave_out(options, rest, checkpoint.config)
    names: dict[str, str] = dict.fromkeys(rest, "")
    for text in options.rename:
        if ARROW not in text:
            raise UsageError(f"--rename {text!r}: {_EXPECTED}")
        for row in _apply("--rename", rule_of("--rename", text), rest, checkpoint.config).rows:
            (name,) = row.sources
            names[name] = row.target
            del rest[name]
    former: dict[str, str] = {}
    for name, new in names.items():
        if former.setdefault(new or name, name) != name:
            raise CoverageError(f"--rename: {former[new or name]} and {name} would both be {new or name}: give one another name")
    weights_of(checkpoint).check_names({name: new or name for name, new in names.items()}, "--only and --drop", "--rename")
    own = {key: value for key, value in contents.metadata.items() if key not in ties(contents)}
    renamed = replace(contents, entries={new: contents.entries[name] for new, name in former.items()}, metadata=own)
    return Altered(checkpoint.with_contents(renamed), former=former, dropped=dropped)


def names_change(options: Options) -> bool:
    """Whether tensors are called otherwise than in SRC, or left out."""
    return any(map(list, (options.rename, options.drop, options.only)))


def _leave_out(options: Options, rest: dict[str, AnyNode], config: Mapping[str, Any]) -> dict[str, str]:
    """Takes out of ``rest`` what is not to stay, and gives it, with the reason."""
    only, dropped = list(options.only), dict[str, str]()
    if only:
        kept = {name for text in only for name in _matches("--only", text, rest, config)}
        dropped = {name: _OTHERS for name in rest if name not in kept}
    others = {name: node for name, node in rest.items() if name not in dropped}
    for text in options.drop:
        dropped |= {name: text for name in _matches("--drop", text, others, config) if name not in dropped}
    for name in dropped:
        del rest[name]
    if not rest:
        raise CoverageError("--only and --drop leave no tensor: there is nothing to convert")
    return dropped


def _matches(option: str, text: str, entries: Mapping[str, AnyNode], config: Mapping[str, Any]) -> Iterator[str]:
    """The names that a pattern matches. Raises CoverageError: none."""
    pattern = _starred(text)
    parse_names(pattern)
    yield from _apply(option, Rule(pattern, pattern, sparse=True), entries, config).outputs


def _apply(option: str, rule: Rule, entries: Mapping[str, AnyNode], config: Mapping[str, Any]) -> Conversion:
    """What a rule makes of the tensors that it takes. Raises CoverageError where it takes none."""
    others = Drop("{name*}", "another option's", fallback=True)
    return Recipe(f"of {option}", "what an option says", (rule, others)).apply(entries, config, {})


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
