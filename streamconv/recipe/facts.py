"""What recipes are made of: facts about names and tensors on two sides, each of which can be read from either side.

``left`` and ``right`` are patterns of names (see `names`), ``layout`` is the notation of `axes`, sizes and conditions are
`expressions` over the source's config and the recipe's options; ``given`` lists the options that were set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from streamconv.dtypes import dtype_name
from streamconv.errors import RecipeError, UsageError
from streamconv.notation.axes import Layout, Tensor
from streamconv.notation.axes import parse as parse_layout
from streamconv.notation.names import Capture, Pattern
from streamconv.notation.names import parse as parse_names
from streamconv.recipe.model import Writer
from streamconv.recipe.steps import undo
from streamconv.storage.filenames import find_fault

MOST = 4096  # items of a list or mapping in a recipe file; nobody has written a tenth of that
MOST_SHARDS = 100_000
Size = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | str
Dim = Size | Annotated[Mapping[str, Size], Meta(max_length=MOST)]
"""A size: a number, an expression over config and options, or one of these for each alternative of a for-each list.

Shapes come before expressions, unless one begins with ``=``: then shapes must agree, as they must with numbers.
"""
Dims = Annotated[Mapping[str, Dim], Meta(max_length=MOST)]
Step = Annotated[Mapping[str, Size | float], Meta(max_length=MOST)]
"""A step of `steps`: its name under ``op``, and what it takes: numbers or expressions."""
Texts = Annotated[tuple[str, ...], Meta(max_length=MOST)]


@dataclass(frozen=True)
class Rule:
    """``left`` names correspond to ``right`` names.

    A capture or list that stands on both sides is a for-each; on one side it enumerates tensors: a capture counts along a
    leading axis of its name, a list gives the layout's tensors in order. Of numbers with arithmetic (see `names`), ``{i+n}`` is ``{i}``
    of the other side; ``{i=n}`` stands on one side and counts nothing; ``{r=*}`` does, all whose tensors are one and the same, of which
    ``dims`` say how many there are; and ``{r//k}`` counts tensors of which k that follow each other are: the first is read, all are
    written.

    Attributes:
        layout: how the left tensors become the right ones; None: a new name only.
        dims: sizes of axes that shapes do not give, beside the recipe's; expressions of names may use them too.
        when: an expression; the rule holds where it is true.
        where: an expression that may use the captures; the rule is for the names for which it is true, before rules without one.
        optional: the rule may match nothing; or an expression, where it is true.
        fallback: the rule is for names that no other one matches.
        sparse: names may be missing. Else, where the rule matches anything, none is: every number up to the largest that any such rule has
            for a capture called so (and those that ``dims`` say), with every alternative; of a list with a label only those that it has at
            all. Rules with ``where``, ``fallback`` or ``{name*}`` are sparse, as nobody can say what their names are.
        partial: of the tensors that a list on the left names only the first must be there, the ``op`` takes those that are; the way back
            makes the first.
        cast: dtype of the right side, unless ``--dtype`` asks for another; the way back keeps what is stored.
        firm: ``cast`` holds whatever ``--dtype`` asks for.
        op: what is done to the left tensors beyond a layout: its name under ``op``, and what it takes (see `steps`).
        undo: the same for the way back; arithmetic needs none.
    """

    left: str
    right: str
    layout: str | None = None
    dims: Dims = field(default_factory=dict)
    when: str | None = None
    where: str | None = None
    optional: bool | str = False
    fallback: bool = False
    sparse: bool = False
    partial: bool = False
    cast: str | None = None
    firm: bool = False
    op: Step = field(default_factory=dict)
    undo: Step = field(default_factory=dict)
    flipped: bool = False

    def __post_init__(self) -> None:
        if self.cast is not None:  # a dtype of torch or numpy will do
            object.__setattr__(self, "cast", dtype_name(self.cast))
        if not self.undo:
            object.__setattr__(self, "undo", undo(self.op))

    def flip(self) -> Rule:
        layout = str(parse_layout(self.layout).flip()) if self.layout else None
        return replace(self, left=self.right, right=self.left, layout=layout, op=self.undo, undo=self.op, flipped=not self.flipped)

    @cached_property
    def binding(self) -> Binding:
        return _bind(self)


@dataclass(frozen=True)
class Drop:
    """``left`` names have no counterpart; ``reason`` says why that is right. The way back is a `Make`.

    Attributes:
        op: how the way back makes them; nothing: it does not.
        dims: how many there are of a name that counts, for the way back.
        when: as for a `Rule`; ``where``, ``optional`` and ``fallback`` too.
    """

    left: str
    reason: str
    when: str | None = None
    where: str | None = None
    optional: bool | str = True
    fallback: bool = False
    op: Step = field(default_factory=dict)
    dims: Dims = field(default_factory=dict)

    def flip(self) -> Make:
        return Make(self.left, self.reason, self.when, self.where, self.optional, self.fallback, self.op, self.dims)


@dataclass(frozen=True)
class Make:
    """``right`` names have no counterpart: ``op`` makes them (see `steps`), or nothing does.

    The way back is a `Drop`, which has the same fields.
    """

    right: str
    reason: str
    when: str | None = None
    where: str | None = None
    optional: bool | str = True
    fallback: bool = False
    op: Step = field(default_factory=dict)
    dims: Dims = field(default_factory=dict)

    def flip(self) -> Drop:
        return Drop(self.right, self.reason, self.when, self.where, self.optional, self.fallback, self.op, self.dims)


@dataclass(frozen=True)
class Tie:
    """Where the left side stores one tensor for two, ``left`` stands for ``right`` too.

    Forward, ``right`` is made from ``left``'s tensor where nothing else makes it. Backward, where ``when`` holds, ``right`` must
    hold the same bytes as ``left``'s counterpart and is left out.

    Attributes:
        left: name on the left side that is stored.
        right: name on the right side that repeats it.
        stored: name on the right side of ``left``'s counterpart.
        when: an expression; where it is false the tie does not hold.
    """

    left: str
    right: str
    stored: str
    when: str | None = None
    flipped: bool = False

    def flip(self) -> Tie:
        return replace(self, flipped=not self.flipped)


Fact = Rule | Drop | Make | Tie


def sparse(*facts: Fact) -> tuple[Fact, ...]:
    """These facts, of whose rules' names any may be missing."""
    return tuple(replace(fact, sparse=True) if isinstance(fact, Rule) else fact for fact in facts)


def pattern_of(fact: Fact) -> str:
    """The names that a fact is known by."""
    return fact.right if isinstance(fact, Make) else fact.left


@dataclass(frozen=True)
class Option:
    """What ``--set`` accepts: its type follows from ``default``, an expression where it is a string in ``{}``; None: from nowhere.

    One that is ``required`` must get a value; ``also`` are other names that it goes by.
    """

    help: str = ""
    default: Annotated[int | str | bool | None, Meta()] = None  # null may be said in a file
    choices: Texts = ()
    kind: Literal["", "bool", "int", "str"] = ""
    required: bool = False
    also: Texts = ()

    def read(self, name: str, text: object) -> Any:
        """The value of ``--set name=text``. Raises UsageError."""
        kind = self.kind or ("str" if self.default is None or isinstance(self.default, str) else type(self.default).__name__)
        value = str(text).strip()
        if kind == "bool":
            if value.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
                return value.lower() in ("true", "1", "yes", "on")
        elif kind == "int":
            if re.fullmatch(r"[+-]?[0-9]{1,18}", value):
                return int(value)
        elif not self.choices or value in self.choices:
            return value
        kinds = {"bool": "true or false", "int": "a whole number"}
        values = f"one of {', '.join(self.choices)}" if self.choices else kinds[kind]
        raise UsageError(f"--set {name}={value[:100]}: expected {values} ({self.help})")


def from_config(**keys: str) -> dict[str, Option]:
    """Whole numbers that config.json gives, here or in the target's folder, unless ``--set`` does: option -> key, with dots, or several."""
    options = {}
    for name, text in keys.items():
        names = text.split()
        places = [f"config.{key}" for key in names] + [f"sidecar.{key}" for key in names]
        options[name] = Option(f"{' or '.join(names)} of config.json", default=f"{{{' or '.join(places)}}}", kind="int")
    return options


@dataclass(frozen=True)
class Side:
    """How the checkpoints on one side of a recipe are stored.

    Attributes:
        format: the container.
        ranks: patterns of the names of files that hold the same names each, one for each rank: tensors are ``<file>/<name>``. The
            first that any file has counts.
        files: patterns of the names of the weight files, where they are not what the container calls them, or an index's name.
        stem: how the names of new files start, where that is not what the container calls them; with a suffix: the one file's name.
        shards: over how many files, called by the pattern ``stem`` of ``{n}``, whole tensors are spread; 0: by their sizes.
        index: the name of a file beside new ones that says only in which of them each tensor is, instead of the container's own index.
        root: the key below which new files hold their tensors, in a container that nests them.
        config: the name of the file with the model's config.
        aliases: (pattern, pattern): other names that tensors of the source go by, and the names that rules use.
        writes: the function that makes the target's JSON files from a `Model`: name -> contents; or the name of a recipe, for the one of
            its target. None: files stay as they are.
        expects: names of files that come with such a checkpoint and that no recipe makes, such as the tokenizer's.
    """

    format: str = "safetensors"
    ranks: Texts = ()
    files: Texts = ()
    stem: str | None = None
    shards: Annotated[int, Meta(ge=0, le=MOST_SHARDS)] = 0
    index: str | None = None
    root: str | None = None
    config: str = "config.json"
    aliases: Annotated[tuple[tuple[str, str], ...], Meta(max_length=MOST)] = ()
    writes: Writer | str | None = None
    expects: Texts = ()

    def __post_init__(self) -> None:
        names = [(key, getattr(self, key)) for key in ("stem", "index", "config")]
        for key in ("ranks", "files", "expects"):
            names += [(key, text) for text in getattr(self, key)]
        for key, text in names:
            fault = None if text is None else find_fault(text)
            if fault:
                error = RecipeError(f"{key} {text!r} {fault}: give the name of a file in the checkpoint's folder")
                error.place = (key,)
                raise error


PLAIN = Side()


@dataclass(frozen=True)
class Binding:
    """How a rule's captures on both sides correspond.

    ``each`` pairs the for-each captures (left name, right name); ``left_only`` and ``right_only`` are the others of either side.
    """

    left: Pattern
    right: Pattern
    layout: Layout | None
    each: tuple[tuple[str, str], ...]
    left_only: Enumeration
    right_only: Enumeration


class Enumeration(NamedTuple):
    """The captures that stand on one side of a rule only and enumerate tensors there, by name in order of appearance.

    ``lists`` say the tensors, ``counts`` are numbers along a leading axis, ``alike`` are those whose tensors are all the same, and
    ``repeats`` says of a count how many that follow each other are.
    """

    lists: tuple[str, ...]
    counts: tuple[str, ...]
    alike: tuple[str, ...]
    repeats: Mapping[str, str]


def capture_of(pattern: Pattern, name: str) -> Capture:
    """The capture of that name."""
    return next(capture for capture in pattern.captures if capture.name == name)


def _bind(rule: Rule) -> Binding:
    left, right = parse_names(rule.left), parse_names(rule.right)
    layout = parse_layout(rule.layout) if rule.layout else None
    several = layout is not None and (len(layout.left), len(layout.right)) != (1, 1)
    pairs = _pair_lists(rule, _lists(left), _lists(right), several=several)
    left_names, right_names = _names_of_values(left), _names_of_values(right)
    for side, other_names in ((left, right_names), (right, left_names)):
        for capture in side.captures:
            if capture.kind == "rest" and capture.name not in other_names:
                raise RecipeError(f"{{{capture.name}*}} must stand on both sides")
    left_only = _enumerate(left, right_names, {name for name, _ in pairs})
    right_only = _enumerate(right, left_names, {name for _, name in pairs})
    _check_width(rule, left, left_only, layout.left if layout else None, rule.op)
    _check_width(rule, right, right_only, layout.right if layout else None, rule.undo)
    counts = left_only.counts + right_only.counts
    if counts and not layout:
        raise RecipeError(f"{', '.join(counts)} stand on one side only: that takes a layout")
    plain = [(c.name, c.name) for c in left.captures if c.kind != "list" and c.name in right_names]
    return Binding(left, right, layout, (*plain, *pairs), left_only, right_only)


def _lists(side: Pattern) -> list[Capture]:
    return [capture for capture in side.captures if capture.kind == "list"]


def _names_of_values(side: Pattern) -> set[str]:
    """The names of the captures that are no lists."""
    return {capture.name for capture in side.captures if capture.kind != "list"}


def _enumerate(side: Pattern, other_names: set[str], pairs: set[str]) -> Enumeration:
    """What one side of a rule enumerates: all but numbers that are among ``other_names`` of the other side, and lists among ``pairs``."""
    own = []
    for capture in side.captures:
        if capture.kind != "int":
            continue
        if capture.name not in other_names:
            own.append(capture)
        elif capture.operator in ("=", "//"):
            raise RecipeError(f"{{{capture.name}{capture.operator}{capture.operand}}} must stand on one side only")
    return Enumeration(
        lists=tuple(capture.name for capture in _lists(side) if capture.name not in pairs),
        counts=tuple(capture.name for capture in own if capture.operator != "="),
        alike=tuple(capture.name for capture in own if (capture.operator, capture.operand) == ("=", "*")),
        repeats={capture.name: capture.operand for capture in own if capture.operator == "//"},
    )


def _check_width(rule: Rule, side: Pattern, enumeration: Enumeration, tensors: Sequence[Tensor] | None, step: Step) -> None:
    """Raises RecipeError where the layout's ``tensors`` of a side (None: no layout) are not those that its names enumerate."""
    count = math.prod(len(capture.alternatives) for capture in side.captures if capture.name in enumeration.lists)
    width = 1 if tensors is None else len(tensors)
    takes_any_number = tensors is None and step
    if count != width and not takes_any_number:
        raise RecipeError(f"{side.text!r} names {count} tensors for each match, the layout {rule.layout!r} has {width} on that side")
    counts = enumeration.counts
    for tensor in tensors or ():
        if tensor.factors[: len(counts)] != counts:
            raise RecipeError(
                f"{side.text!r} enumerates {', '.join(counts)}: the layout's tensors there must begin with {' '.join(counts)}"
            )


def _pair_lists(rule: Rule, left: list[Capture], right: list[Capture], *, several: bool) -> list[tuple[str, str]]:
    """The lists that stand on both sides: in order where each tensor becomes one, else those with the same alternatives."""
    if not several and not (rule.op or rule.undo):
        if [len(c.alternatives) for c in left] != [len(c.alternatives) for c in right]:
            raise RecipeError(f"lists differ in number or length from {rule.right!r}; a layout with commas would enumerate them")
        return [(mine.name, theirs.name) for mine, theirs in zip(left, right, strict=True)]
    pairs, free = [], list(right)
    for mine in left:
        same = next((theirs for theirs in free if theirs.alternatives == mine.alternatives), None)
        if same is not None:
            free.remove(same)
            pairs.append((mine.name, same.name))
    return pairs
