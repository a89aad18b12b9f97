"""Recipes: what a family's layouts have to do with each other, declared once and read in both directions.

A recipe is a list of facts. Most are a `Rule`: names on the left correspond to names on the right, with a layout between them.
`Recipe.apply` turns a checkpoint into target nodes, `Recipe.inverse` swaps the sides.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from streamconv import expressions
from streamconv.axes import Layout
from streamconv.axes import parse as parse_layout
from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import CoverageError, RecipeError, UsageError
from streamconv.formats import Source
from streamconv.graph import AnyNode, apply, rearrange
from streamconv.names import Matcher, Pattern, nearest
from streamconv.names import parse as parse_names
from streamconv.ops import Cast, Rearrange

MOST_PARTS = 1_000_000  # tensors that one tensor can be taken apart into
Dim = int | str | Mapping[str, "int | str"]
"""A size: a number, an expression over config and options, or one of these for each alternative of a for-each list."""


@dataclass(frozen=True)
class Rule:
    """``left`` names correspond to ``right`` names.

    A capture or list that stands on both sides is a for-each; on one side it enumerates tensors: a capture counts along a
    leading axis of its name, a list gives the layout's tensors in order.

    Attributes:
        layout: how the left tensors become the right ones; None: a new name only.
        dims: sizes of axes that shapes do not give, beside the recipe's.
        when: an expression; the rule holds where it is true.
        optional: the rule may match nothing.
        cast: dtype of the right side; the way back keeps what is stored.
    """

    left: str
    right: str
    layout: str | None = None
    dims: Mapping[str, Dim] = field(default_factory=dict)
    when: str | None = None
    optional: bool = False
    cast: str | None = None
    flipped: bool = False

    def flip(self) -> Rule:
        layout = str(parse_layout(self.layout).flip()) if self.layout else None
        return replace(self, left=self.right, right=self.left, layout=layout, flipped=not self.flipped)

    @cached_property
    def binding(self) -> _Binding:
        return _bind(self)


@dataclass(frozen=True)
class Drop:
    """``left`` names have no counterpart. The way back does not make them (``reason`` says why that is right)."""

    left: str
    reason: str
    when: str | None = None
    optional: bool = True
    flipped: bool = False

    def flip(self) -> Drop:
        return replace(self, flipped=not self.flipped)


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


Fact = Rule | Drop | Tie


@dataclass(frozen=True)
class Option:
    """What ``--set`` accepts: its type follows from ``default``, an expression where it is a string in ``{}``; None: from nowhere."""

    help: str
    default: int | str | bool | None = None
    choices: tuple[str, ...] = ()
    kind: str = ""

    def read(self, name: str, text: object) -> Any:
        """The value of ``--set name=text``. Raises UsageError."""
        kind = self.kind or ("str" if self.default is None or isinstance(self.default, str) else type(self.default).__name__)
        given = str(text).strip()
        if kind == "bool":
            if given.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
                return given.lower() in ("true", "1", "yes", "on")
        elif kind == "int":
            if given.lstrip("-").isdigit():
                return int(given)
        elif not self.choices or given in self.choices:
            return given
        expected = f"one of {', '.join(self.choices)}" if self.choices else {"bool": "true or false", "int": "a whole number"}[kind]
        raise UsageError(f"--set {name}={given}: expected {expected} ({self.help})")


class Row(NamedTuple):
    """Which sources a target tensor is made of, by which layout ("" where only the name changes)."""

    target: str
    sources: tuple[str, ...]
    layout: str
    spec: TensorSpec


@dataclass(frozen=True)
class Conversion:
    """What a recipe makes of a checkpoint: target nodes in tensor order, and what to say about them."""

    outputs: dict[str, AnyNode]
    rows: list[Row]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replicas: list[tuple[AnyNode, AnyNode, tuple[str, str]]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


Recast = Callable[[str, TensorSpec], str | None]
"""Target name and spec -> the dtype it shall have, or None to keep it."""


@dataclass(frozen=True)
class Recipe:
    """A family's facts between a left and a right layout.

    Attributes:
        name: ``family-src2dst``.
        summary: one line.
        rules: the facts.
        dims: axis sizes that shapes do not give.
        options: what ``--set`` accepts, by name.
        source_format: container of the left side.
        target_format: container of the right side.
        reference: the script and version that the facts come from.
        source_aliases: (pattern, pattern): other names that left tensors go by, and the names that rules use.
        target_aliases: the same for the right side; they count when it is the source.
        config: ``module:function`` that makes the target's config.json from (config, options), or None to leave it as it is.
        inverse_config: the same for the way back.
    """

    name: str
    summary: str
    rules: tuple[Fact, ...]
    dims: Mapping[str, Dim] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    source_format: str = "safetensors"
    target_format: str = "safetensors"
    reference: str = ""
    source_aliases: tuple[tuple[str, str], ...] = ()
    target_aliases: tuple[tuple[str, str], ...] = ()
    config: str | None = None
    inverse_config: str | None = None

    def __post_init__(self) -> None:
        try:
            _check_sizes(self.dims)
            for option in self.options.values():
                if isinstance(option.default, str) and option.default.startswith("{"):
                    expressions.check(option.default[1:-1])
            for pair in (*self.source_aliases, *self.target_aliases):
                _check_alias(*pair)
        except RecipeError as error:
            raise RecipeError(f"recipe {self.name}: {error}") from error
        for fact in self.rules:
            try:
                for pattern in (fact.left, *([] if isinstance(fact, Drop) else [fact.right])):
                    parse_names(pattern)
                if isinstance(fact, Rule):
                    _ = fact.binding
                    _check_sizes(fact.dims)
                if fact.when:
                    expressions.check(fact.when)
                if isinstance(fact, Rule) and fact.cast:
                    parse_dtype(fact.cast)
            except (RecipeError, UsageError) as error:
                raise RecipeError(f"recipe {self.name}, rule {fact.left!r}: {error}") from error

    def inverse(self, name: str, summary: str = "") -> Recipe:
        """The recipe in the other direction. `lost` says what it cannot bring back."""
        return replace(
            self,
            name=name,
            summary=summary or f"the way back of {self.name}",
            rules=tuple(fact.flip() for fact in self.rules),
            source_format=self.target_format,
            target_format=self.source_format,
            source_aliases=self.target_aliases,
            target_aliases=self.source_aliases,
            config=self.inverse_config,
            inverse_config=self.config,
        )

    @property
    def lost(self) -> list[str]:
        """What this direction does not bring back, a line for each rule that says so."""
        drops = [f"{fact.left}: not made again ({fact.reason})" for fact in self.rules if isinstance(fact, Drop) and fact.flipped]
        casts = [
            f"{fact.left}: keeps its dtype, the other direction casts to {fact.cast}"
            for fact in self.rules
            if isinstance(fact, Rule) and fact.cast and fact.flipped
        ]
        return drops + casts

    def read_options(self, given: Mapping[str, object], scope: Mapping[str, Any]) -> dict[str, Any]:
        """The options' values: those given, else their defaults in ``scope``.

        Raises:
            UsageError: an option that the recipe does not have, or a value that it cannot take.
        """
        _check_options(given, self.options, f"recipe {self.name} has no such option; it has")
        values: dict[str, Any] = {}
        for name, option in self.options.items():
            default = option.default
            if name in given:
                values[name] = option.read(name, given[name])
            elif isinstance(default, str) and default.startswith("{"):
                values[name] = expressions.evaluate(default[1:-1], scope)
            else:
                values[name] = default
        return values

    def apply(
        self,
        entries: Mapping[str, Source],
        config: Mapping[str, Any] | None = None,
        options: Mapping[str, object] | None = None,
        *,
        sidecar: Mapping[str, Any] | None = None,
        recast: Recast = lambda _name, _spec: None,
    ) -> Conversion:
        """The target nodes for the tensors ``entries``.

        Args:
            entries: name -> stored tensor, in tensor order.
            config: the source's config.json.
            options: ``--set`` values.
            sidecar: the config.json of the target-side folder, where one is given.
            recast: which dtype a target shall have.

        Raises:
            CoverageError: tensors without a rule, rules without tensors, targets made twice, shapes or dtypes that do not fit.
            UsageError: options that do not exist.
        """
        scope = {**(config or {}), "config": config or {}, "sidecar": sidecar or {}}
        return _Application(self, entries, scope, options or {}, recast).run()

    # Data ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values, as a recipe file holds it."""
        data = _without_defaults(self)
        data["rules"] = [{type(fact).__name__.lower(): fact.left, **_without_defaults(fact, "left")} for fact in self.rules]
        data["options"] = {name: _without_defaults(option) for name, option in self.options.items()}
        return {key: value for key, value in data.items() if value not in ({}, ())}

    @classmethod
    def from_dict(cls, data: object, where: str = "recipe") -> Recipe:
        """Reads what `to_dict` gives.

        Raises:
            RecipeError: unknown or missing fields, or values of the wrong kind.
        """
        table = _object(data, where)
        kinds: dict[str, type[Fact]] = {"rule": Rule, "drop": Drop, "tie": Tie}
        facts = []
        rules = table.get("rules")
        if not isinstance(rules, list) or not rules:
            raise RecipeError(f"{where}: 'rules' must be a list of at least one rule")
        for number, row in enumerate(rules, 1):
            fact = dict(_object(row, f"{where}, rule {number}"))
            kind = next((kind for kind in kinds if kind in fact), None)
            if kind is None:
                raise RecipeError(
                    f"{where}, rule {number}: expected one of {', '.join(kinds)}, found {', '.join(map(str, fact)) or 'nothing'}"
                )
            if "left" in fact:
                raise RecipeError(f"{where}, rule {number}: unknown field 'left'; the left side stands after {kind!r}")
            fact["left"] = fact.pop(kind)
            facts.append(_build(kinds[kind], fact, f"{where}, rule {number}"))
        options = {
            str(name): _build(Option, {"help": "", **_object(row, f"{where}, option {name}")}, f"{where}, option {name}")
            for name, row in _object(table.get("options", {}), f"{where}, options").items()
        }
        recipe: Recipe = _build(cls, {"summary": "", **table, "rules": tuple(facts), "options": options}, where)
        return recipe


def _check_options(given: Mapping[str, object], known: Mapping[str, Option], problem: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"--set {unknown[0]}: {problem}: {', '.join(sorted(known)) or 'none'}")


def _check_sizes(dims: Mapping[str, Dim]) -> None:
    """Raises NotationError where a size is no expression."""
    for size in dims.values():
        for one in size.values() if isinstance(size, Mapping) else (size,):
            if isinstance(one, str):
                expressions.check(one)


def _check_alias(other: str, known: str) -> None:
    """Raises RecipeError where two names of a tensor do not have the same captures."""
    first, second = ({(capture.name, capture.kind) for capture in parse_names(text).captures} for text in (other, known))
    if first != second:
        raise RecipeError(f"the names {other!r} and {known!r} of one tensor must have the same captures")


def _object(data: object, where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{where}: expected a mapping, found {type(data).__name__}")
    return data


def _is_dims(value: object) -> bool:
    sizes = value.values() if isinstance(value, dict) else ()
    return isinstance(value, dict) and all(
        type(size) in {int, str} or (isinstance(size, dict) and all(type(n) in {int, str} for n in size.values())) for size in sizes
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


# What a field of a recipe file must be; a field that is not here is text.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "optional": (lambda value: isinstance(value, bool), "true or false"),
    "flipped": (lambda value: isinstance(value, bool), "true or false"),
    "dims": (_is_dims, "a mapping of axes to numbers, expressions, or one of these for each alternative"),
    "choices": (_is_texts, "a list of texts"),
    "default": (lambda value: value is None or isinstance(value, int | str), "text, a whole number, true or false"),
    "kind": (lambda value: value in ("", "bool", "int", "str"), "bool, int or str"),
    "rules": (lambda value: isinstance(value, tuple), "a list"),
    "options": (lambda value: isinstance(value, dict), "a mapping"),
    "source_aliases": (lambda value: isinstance(value, list) and all(map(_is_pair, value)), "a list of pairs of texts"),
    "target_aliases": (lambda value: isinstance(value, list) and all(map(_is_pair, value)), "a list of pairs of texts"),
}


def _is_pair(value: object) -> bool:
    return _is_texts(value) and len(value) == 2  # type: ignore[arg-type]


def _build(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise RecipeError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(fields)}")
    for name, value in values.items():
        fits, expected = _VALUES.get(name, (lambda given: isinstance(given, str), "text"))
        if not fits(value):
            raise RecipeError(f"{where}: {name} must be {expected}, found {value!r}")
    required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise RecipeError(f"{where}: missing {', '.join(missing)}")
    lists = {name: tuple(map(tuple, value)) for name, value in values.items() if name.endswith("_aliases")}
    lists |= {name: tuple(value) for name, value in values.items() if name == "choices"}
    return kind(**{**values, **lists})


def _without_defaults(item: Any, *leave: str) -> dict[str, Any]:
    found = {}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.name not in leave and value != default:
            found[f.name] = [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, tuple) else value
    return found


# Names to tensors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Binding:
    """How a rule's captures on both sides correspond.

    ``each`` pairs the for-each captures (left name, right name); ``lists`` and ``counts`` are those that enumerate tensors on
    the left or right, by capture name in order of appearance.
    """

    left: Pattern
    right: Pattern
    layout: Layout | None
    each: tuple[tuple[str, str], ...]
    left_lists: tuple[str, ...]
    right_lists: tuple[str, ...]
    left_counts: tuple[str, ...]
    right_counts: tuple[str, ...]


def _bind(rule: Rule) -> _Binding:
    left, right = parse_names(rule.left), parse_names(rule.right)
    layout = parse_layout(rule.layout) if rule.layout else None
    widths = (len(layout.left), len(layout.right)) if layout else (1, 1)
    lists = [[c for c in side.captures if c.kind == "list"] for side in (left, right)]
    paired: list[tuple[str, str]] = []
    if widths == (1, 1):
        if [len(c.alternatives) for c in lists[0]] != [len(c.alternatives) for c in lists[1]]:
            raise RecipeError(f"lists differ in number or length from {rule.right!r}; a layout with commas would enumerate them")
        paired = [(a.name, b.name) for a, b in zip(*lists, strict=True)]
    else:
        free = list(lists[1])
        for mine in lists[0]:
            same = next((c for c in free if c.alternatives == mine.alternatives), None)
            if same is not None:
                free.remove(same)
                paired.append((mine.name, same.name))
    names = [{c.name for c in side.captures if c.kind != "list"} for side in (left, right)]
    plain = [c for c in left.captures if c.kind != "list" and c.name in names[1]]
    if rests := [
        c.name for side, other in ((left, 1), (right, 0)) for c in side.captures if c.kind == "rest" and c.name not in names[other]
    ]:
        raise RecipeError(f"{{{rests[0]}*}} must stand on both sides")
    counts = [
        tuple(c.name for c in side.captures if c.kind == "int" and c.name not in names[1 - k]) for k, side in enumerate((left, right))
    ]
    single = [tuple(c.name for c in lists[k] if c.name not in {pair[k] for pair in paired}) for k in (0, 1)]
    for k, side in enumerate((left, right)):
        made = 1
        for capture in side.captures:
            made *= len(capture.alternatives) if capture.name in single[k] else 1
        if made != widths[k]:
            raise RecipeError(f"{side.text!r} names {made} tensors for each match, the layout {rule.layout!r} has {widths[k]} on that side")
        for tensor in (layout.left, layout.right)[k] if layout else ():
            if tensor.factors[: len(counts[k])] != counts[k]:
                raise RecipeError(
                    f"{side.text!r} enumerates {', '.join(counts[k])}: the layout's tensors there must begin with {' '.join(counts[k])}"
                )
    if counts != [(), ()] and not layout:
        raise RecipeError(f"{', '.join((*counts[0], *counts[1]))} stand on one side only: that takes a layout")
    each = (*((c.name, c.name) for c in plain), *paired)
    return _Binding(left, right, layout, each, single[0], single[1], counts[0], counts[1])


@dataclass
class _Group:
    """The tensors that one instance of a rule takes: (list choice, counts) -> name."""

    values: dict[str, int | str]
    members: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = field(default_factory=dict)


class _Application:
    """One application of a recipe to a checkpoint."""

    def __init__(
        self, recipe: Recipe, entries: Mapping[str, Source], scope: dict[str, Any], given: Mapping[str, object], recast: Recast
    ) -> None:
        self.recipe, self.recast = recipe, recast
        self.names = self._canonical(entries)
        self.entries = {name: entries[stored] for name, stored in self.names.items()}
        self.order = {name: k for k, name in enumerate(self.entries)}
        scope = {**scope, "has": lambda text: any(parse_names(text).match(name) is not None for name in self.entries)}
        self.options = recipe.read_options(given, scope)
        self.scope = {**scope, **self.options}
        self.facts = [fact for fact in recipe.rules if not fact.when or expressions.evaluate(fact.when, self.scope)]
        self.outputs: dict[str, tuple[int, AnyNode, Row]] = {}
        self.dropped: list[str] = []
        self.notes: list[str] = []
        self.replicas: list[tuple[AnyNode, AnyNode, tuple[str, str]]] = []
        self._cache: dict[object, list[Rearrange]] = {}

    def _canonical(self, entries: Mapping[str, Source]) -> dict[str, str]:
        """Rule-side name -> stored name."""
        if not self.recipe.source_aliases:
            return {name: name for name in entries}
        patterns = [(parse_names(a), parse_names(b)) for a, b in self.recipe.source_aliases]
        matcher = Matcher([a for a, _ in patterns])
        found: dict[str, str] = {}
        for name in entries:
            match = matcher.match(name)
            known = patterns[match[0][0]][1].format(match[0][1]) if match else name
            if known in found:
                raise CoverageError(f"{name} and {found[known]} are two names of one tensor, {known}: remove one of them")
            found[known] = name
        return found

    def run(self) -> Conversion:
        entries = self._take_replicas()
        groups = self._match(entries)
        for rule, instances in groups:
            for group in instances.values():
                self._build(rule, group)
        self._make_ties()
        if not self.outputs:
            raise CoverageError(f"recipe {self.recipe.name}: nothing to convert, the source holds no tensor that a rule keeps")
        made = sorted(self.outputs.items(), key=lambda item: item[1][0])
        return Conversion(
            {name: node for name, (_, node, _) in made},
            [row for _, (_, _, row) in made],
            self.dropped,
            self.notes,
            self.replicas,
            self.options,
        )

    def _take_replicas(self) -> dict[str, Source]:
        """The entries without those that only repeat another."""
        entries = dict(self.entries)
        for tie in self.facts:
            if isinstance(tie, Tie) and tie.flipped and tie.right in entries and tie.stored in entries:
                found, kept = entries[tie.right], entries[tie.stored]
                if found.spec != kept.spec:
                    raise CoverageError(
                        f"recipe {self.recipe.name}: {self.names[tie.right]} should repeat {self.names[tie.stored]} and is {found.spec}, "
                        f"not {kept.spec}: mend the source, or set the options so that they are not tied"
                    )
                self.replicas.append((found, kept, (self.names[tie.right], self.names[tie.stored])))
                del entries[tie.right]
                self.dropped.append(self.names[tie.right])
        return entries

    def _match(self, entries: Mapping[str, Source]) -> list[tuple[Rule, dict[tuple[object, ...], _Group]]]:
        facts = [fact for fact in self.facts if isinstance(fact, Rule) or (isinstance(fact, Drop) and not fact.flipped)]
        matcher = Matcher([parse_names(fact.left) for fact in facts])
        groups: list[dict[tuple[object, ...], _Group]] = [{} for _ in facts]
        used = [False] * len(facts)
        unmatched = []
        for name in entries:
            found = matcher.match(name)
            if not found:
                unmatched.append(name)
                continue
            if len(found) > 1:
                both = " and ".join(repr(facts[k].left) for k, _ in found[:2])
                raise CoverageError(f"recipe {self.recipe.name}: {name} matches two rules, {both}: make one of them narrower")
            number, values = found[0]
            fact = facts[number]
            used[number] = True
            if isinstance(fact, Drop):
                self.dropped.append(self.names[name])
                continue
            binding = fact.binding
            key = tuple(values[left] for left, _ in binding.each)
            group = groups[number].setdefault(key, _Group({left: values[left] for left, _ in binding.each}))
            place = (tuple(int(values[n]) for n in binding.left_lists), tuple(int(values[n]) for n in binding.left_counts))
            group.members[place] = name
        self._check_coverage(facts, used, unmatched, entries)
        return [(fact, group) for fact, group in zip(facts, groups, strict=True) if isinstance(fact, Rule)]

    def _check_coverage(self, facts: Sequence[Fact], used: list[bool], unmatched: list[str], entries: Mapping[str, Source]) -> None:
        unused = [fact.left for fact, seen in zip(facts, used, strict=True) if not seen and not (isinstance(fact, Drop) or fact.optional)]  # type: ignore[union-attr]
        if unmatched:
            hint = ""
            if near := nearest(unmatched[0], [fact.left for fact in facts]):
                hint = f"; the nearest rule is {near[0]!r}"
            more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
            raise CoverageError(
                f"recipe {self.recipe.name}: {self.names[unmatched[0]]}{more}: no rule for it{hint}; "
                "nothing is dropped silently: use a recipe that knows it, or one that drops it by name"
            )
        if unused:
            hint = ""
            if near := nearest(unused[0], entries):
                hint = f"; the nearest tensor is {near[0]}"
            more = f" and {len(unused) - 1} more rules" if len(unused) > 1 else ""
            raise CoverageError(
                f"recipe {self.recipe.name}: rule {unused[0]!r}{more}: no tensor for it{hint}; is this the right recipe and source?"
            )

    # One group -------------------------------------------------------------------------------------------------

    def _build(self, rule: Rule, group: _Group) -> None:
        binding = rule.binding
        stacks, lengths = self._stacks(rule, group)
        names = [name for stack in stacks for name in stack]
        nodes: list[AnyNode] = [self.entries[name] for name in names]
        first = min(self.order[name] for name in names)
        values: dict[str, int | str] = {right: group.values[left] for left, right in binding.each}
        where = f"recipe {self.recipe.name}, {names[0]}: "
        if binding.layout is None:
            self._emit(rule, binding.right.format(values), nodes[0], names, first)
            return
        shapes = [(*lengths, *self.entries[stack[0]].spec.shape) for stack in stacks]
        for stack, shape in zip(stacks, shapes, strict=True):
            if odd := next((n for n in stack if self.entries[n].spec.shape != shape[len(lengths) :]), None):
                raise CoverageError(
                    f"{where}{odd} has shape {self.entries[odd].spec.shape}, the others of its group {shape[len(lengths) :]}"
                )
        ops = self._ops(rule, group, tuple(shapes), tuple(len(stack) for stack in stacks), where)
        choices = itertools.product(*(range(len(_capture(binding.right, n).alternatives)) for n in binding.right_lists))
        ready = iter(ops)
        for choice in choices:
            chosen = {**values, **dict(zip(binding.right_lists, choice, strict=True))}
            sizes = ops[0].sizes
            for counts in itertools.product(*(range(sizes[n]) for n in binding.right_counts)):
                target = binding.right.format({**chosen, **dict(zip(binding.right_counts, counts, strict=True))})
                op = next(ready)
                try:
                    made = rearrange(op, tuple(self._one_dtype(rule, target, nodes)))
                except CoverageError as error:
                    raise CoverageError(f"{where}{error}") from error
                self._emit(rule, target, made, names, first, layout=rule.layout)

    def _stacks(self, rule: Rule, group: _Group) -> tuple[list[list[str]], tuple[int, ...]]:
        """For each left tensor of the layout the names behind it, and the sizes of the leading axes that they count along."""
        binding = rule.binding
        choices = list(itertools.product(*(range(len(_capture(binding.left, n).alternatives)) for n in binding.left_lists)))
        lengths = tuple(1 + max(counts[k] for _, counts in group.members) for k in range(len(binding.left_counts)))
        together = len(choices) * math.prod(lengths)
        if len(group.members) != together:  # indices may be huge: the grid is not made, something is missing early in it
            missing = next((c, g) for g in _grid(lengths) for c in choices if (c, g) not in group.members)
            values = {
                **group.values,
                **dict(zip(binding.left_lists, missing[0], strict=True)),
                **dict(zip(binding.left_counts, missing[1], strict=True)),
            }
            present = next(iter(group.members.values()))
            raise CoverageError(
                f"recipe {self.recipe.name}: {binding.left.format(values)} is missing, while {present} is there: "
                f"{together} tensors go together, {len(group.members)} were found"
            )
        return [[group.members[choice, counts] for counts in _grid(lengths)] for choice in choices], lengths

    def _ops(self, rule: Rule, group: _Group, shapes: tuple[tuple[int, ...], ...], stacks: tuple[int, ...], where: str) -> list[Rearrange]:
        """The op for each target, in order; the same for all groups with the same shapes and alternatives."""
        binding = rule.binding
        assert binding.layout is not None
        chosen = tuple(
            _capture(side, pair[k]).alternatives[int(group.values[pair[0]])]
            for k, side in sorted(enumerate((binding.left, binding.right)), reverse=rule.flipped)
            for pair in binding.each
            if _capture(side, pair[k]).kind == "list"
        )
        key = (id(rule), shapes, stacks, chosen)
        if key not in self._cache:
            layout = binding.layout.spread([len(shape) for shape in shapes])
            sizes = layout.solve(shapes, lambda axis: self._dim(rule, axis, chosen), where)
            leading = len(binding.right_counts)
            parts = range(math.prod(sizes[name] for name in binding.right_counts))
            if len(parts) > MOST_PARTS:
                raise CoverageError(f"{where}{rule.right!r} would make {len(parts)} tensors of it, which no model has")
            self._cache[key] = [
                Rearrange(str(layout), sizes, stacks, output, leading, part) for output in range(len(layout.right)) for part in parts
            ]
        return self._cache[key]

    def _dim(self, rule: Rule, axis: str, chosen: tuple[str, ...]) -> int | None:
        given: Any = rule.dims.get(axis, self.recipe.dims.get(axis))
        if isinstance(given, Mapping):
            given = next((given[choice] for choice in chosen if choice in given), None)
        value = expressions.evaluate(given, self.scope) if isinstance(given, str) else given
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CoverageError(f"recipe {self.recipe.name}: the size of axis {axis}, {given!r}, is {value!r}, not a whole number")
        return value

    def _one_dtype(self, rule: Rule, target: str, nodes: list[AnyNode]) -> Iterator[AnyNode]:
        """The inputs, cast to what the target shall have where they differ among themselves."""
        mixed = len({node.spec.dtype.name for node in nodes}) > 1
        for node in nodes:
            wanted = (self.recast(target, node.spec) or self._cast(rule)) if mixed else None
            yield apply(Cast(wanted), node) if wanted and wanted != node.spec.dtype.name else node

    @staticmethod
    def _cast(rule: Rule) -> str | None:
        return parse_dtype(rule.cast).name if rule.cast and not rule.flipped else None

    def _emit(self, rule: Rule, target: str, node: AnyNode, names: list[str], first: int, *, layout: str | None = None) -> None:
        wanted = self.recast(target, node.spec) or self._cast(rule)
        if wanted and wanted != node.spec.dtype.name:
            node = apply(Cast(wanted), node)
        if target in self.outputs:
            raise CoverageError(
                f"recipe {self.recipe.name}: {target} is made twice, from {self.outputs[target][2].sources[0]} and from {names[0]}"
            )
        row = Row(target, tuple(self.names[name] for name in names), layout or "", node.spec)
        self.outputs[target] = (first, node, row)

    def _make_ties(self) -> None:
        for tie in self.facts:
            if isinstance(tie, Tie) and not tie.flipped and tie.right not in self.outputs and tie.left in self.entries:
                self._emit(Rule(tie.left, tie.right), tie.right, self.entries[tie.left], [tie.left], self.order[tie.left])
                self.notes.append(f"{tie.right} repeats {self.names[tie.left]}: the source ties them")


def _grid(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices below ``lengths``, the last one fastest."""
    for number in range(math.prod(lengths)):
        index, rest = [], number
        for length in reversed(lengths):
            rest, digit = divmod(rest, length)
            index.append(digit)
        yield tuple(reversed(index))


def _capture(pattern: Pattern, name: str) -> Any:
    return next(capture for capture in pattern.captures if capture.name == name)


IDENTITY_OPTIONS = {
    "root": Option("the key of the dict of tensors in a file that torch.save wrote, dotted if it lies deeper"),
    "tied": Option("keep: tensors that are one and the same are stored once; copy: each of them", "keep", ("keep", "copy")),
}
"""What ``--set`` accepts without a recipe."""


def read_identity_options(given: Mapping[str, object]) -> dict[str, Any]:
    """The values of these options. Raises UsageError."""
    _check_options(given, IDENTITY_OPTIONS, "there is no recipe to take it; without one there are")
    return {name: option.read(name, given[name]) if name in given else option.default for name, option in IDENTITY_OPTIONS.items()}


def identity(entries: Mapping[str, Source], recast: Recast = lambda _name, _spec: None) -> Conversion:
    """The conversion without a recipe: every tensor under its own name, cast where that is asked for."""
    outputs: dict[str, AnyNode] = {}
    rows = []
    for name, source in entries.items():
        wanted = recast(name, source.spec)
        node = apply(Cast(wanted), source) if wanted and wanted != source.spec.dtype.name else source
        outputs[name] = node
        rows.append(Row(name, (name,), "", node.spec))
    return Conversion(outputs, rows)
