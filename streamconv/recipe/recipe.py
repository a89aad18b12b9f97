"""Recipes: what a family's layouts have to do with each other, declared once and read in both directions.

A recipe is a list of `facts`. `Recipe.apply` turns a checkpoint into target nodes, `Recipe.inverse` swaps the sides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from msgspec import Meta

from streamconv.dtypes import parse_dtype
from streamconv.errors import CoverageError, NotationError, RecipeError, UsageError
from streamconv.graph.node import AnyNode
from streamconv.notation import expressions
from streamconv.notation.names import LONGEST, Matcher
from streamconv.notation.names import parse as parse_names
from streamconv.recipe import declaration, steps, vocabulary
from streamconv.recipe.application import Application, Conversion, Recast, canonical, identity, keep_dtype
from streamconv.recipe.facts import MOST, PLAIN, Dim, Dims, Drop, Fact, Make, Option, Rule, Side, Tie, from_config, pattern_of, sparse
from streamconv.recipe.model import Model, Writer
from streamconv.recipe.sizes import near_keys, plain_names, scope_of
from streamconv.recipe.vocabulary import resize_vocab
from streamconv.rows import Row
from streamconv.text import did_you_mean

__all__ = [
    "PLAIN", "Conversion", "Dim", "Drop", "Fact", "Make", "Model", "Option", "Recast", "Recipe", "Rule", "Side", "Tie", "Writer",
    "chain", "from_config", "identity", "read_identity_options", "sparse",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A family's facts between a left and a right layout.

    Attributes:
        name: ``family-src2dst``.
        summary: one line.
        rules: the facts.
        dims: axis sizes that shapes do not give.
        options: what ``--set`` accepts, by name.
        requires: expressions over options, config and tensors that must hold, and what to say where one does not, with options in {}.
        config: keys of the target's config.json, with dots if they are within others, and expressions of what these say; without a
            value a key stays as it is.
        left: how checkpoints of the source are stored.
        right: how those of the target are.
        reference: the script and version that the facts come from.
        then: a recipe that takes what this one makes, before anything is written: such as the partition of tensors over ranks.

    >>> rules = streamconv.Rule("layers.{i}.b", "h.{i}.bias"), streamconv.Rule("w", "top", "a b -> b a")
    >>> recipe = streamconv.Recipe("toy-a2b", "biases under other names, a matrix transposed", rules)
    >>> plan = streamconv.plan("model", "toy", recipe=recipe, max_memory="4GB")
    >>> [(row.target, str(row.spec)) for row in plan.mapping]
    [('h.0.bias', 'float32[2]'), ('h.1.bias', 'float32[2]'), ('top', 'float32[3, 2]')]
    >>> recipe.inverse("toy-b2a").rules[1].layout
    'b a -> a b'
    """

    name: str = ""
    summary: str = ""
    rules: tuple[Fact, ...] = ()
    dims: Dims = field(default_factory=dict)
    options: Annotated[Mapping[str, Option], Meta(max_length=MOST)] = field(default_factory=dict)
    requires: Annotated[Mapping[str, str], Meta(max_length=MOST)] = field(default_factory=dict)
    config: Annotated[Mapping[str, str], Meta(max_length=MOST)] = field(default_factory=dict)
    left: Side = PLAIN
    right: Side = PLAIN
    reference: str = ""
    then: Recipe | None = None

    def __post_init__(self) -> None:
        if not self.name.isprintable():
            raise RecipeError(f"recipe {self.name!r}: its name must be of printable characters")
        if self.then and (self.then.name or self.then.summary or self.then.reference):  # a stage goes by the name of the whole
            object.__setattr__(self, "then", replace(self.then, name="", summary="", reference=""))
        try:
            _check_sizes(self.dims)
            for expression in (*self.requires, *self.config.values()):
                expressions.check(expression)
            for option in self.options.values():
                if isinstance(option.default, str) and option.default.startswith("{"):
                    expressions.check(option.default[1:-1])
            for side in (self.left, self.right):
                for pair in side.aliases:
                    _check_alias(*pair)
                for pattern in (*side.ranks, *side.files):
                    plain_names(pattern)
        except RecipeError as error:
            raise RecipeError(f"recipe {self.name}: {error}") from error
        for number, fact in enumerate(self.rules):
            with declaration.within("rules", number):
                try:
                    _check_fact(fact)
                except (RecipeError, UsageError) as error:
                    fault = RecipeError(f"recipe {self.name}, rule {pattern_of(fact)[:200]!r}: {error}")
                    fault.place = error.place if isinstance(error, RecipeError) else ()
                    raise fault from error

    @property
    def stages(self) -> list[Recipe]:
        """This recipe and those that follow, each by itself."""
        return [replace(self, then=None), *(self.then.stages if self.then else [])]

    @property
    def source(self) -> Side:
        """How the checkpoints are stored that it reads."""
        return self.left

    @property
    def target(self) -> Side:
        """How the checkpoints are stored that it makes."""
        return self.then.target if self.then else self.right

    @property
    def settings(self) -> dict[str, Option]:
        """What ``--set`` accepts, those of later stages included."""
        return {**(self.then.settings if self.then else {}), **self.options}

    def inverse(self, name: str, summary: str = "") -> Recipe:
        """The recipe in the other direction. `lost` says what it cannot bring back."""
        whole = chain(*(stage.flip() for stage in reversed(self.stages)))
        return replace(whole, name=name, summary=summary or f"the way back of {self.name}", reference=self.reference)

    def flip(self) -> Recipe:
        """One stage of `inverse`; what a config said before it does not know."""
        rules = tuple(fact.flip() for fact in self.rules)
        return replace(self, name="", summary="", reference="", rules=rules, config={}, left=self.right, right=self.left)

    @property
    def lost(self) -> list[str]:
        """What this direction does not bring back, a line for each rule that says so."""
        facts = [fact for stage in self.stages for fact in stage.rules]
        rules = [fact for fact in facts if isinstance(fact, Rule) and fact.flipped]
        arithmetic = [rule for rule in rules if rule.undo.get("op") in steps.ARITHMETIC]
        return [
            *(f"{fact.right}: not made again ({fact.reason})" for fact in facts if isinstance(fact, Make) and not fact.op),
            *(f"{rule.left}: keeps its dtype, the other direction casts to {rule.cast}" for rule in rules if rule.cast),
            *(f"{rule.left}: the {rule.undo['op']} of the other direction is not undone" for rule in rules if rule.undo and not rule.op),
            *(
                f"{rule.left}: {rule.undo['op']} of the other direction is undone up to rounding"
                for rule in arithmetic
                if not steps.is_exact(rule.undo)
            ),
            *(
                f"{rule.right}: all are as the first was, which the other direction takes for all"
                for rule in rules
                if rule.binding.right_only.alike
            ),
        ]

    def _by_own_names(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """The values of ``--set`` by the options' own names. Raises UsageError where an option has two."""
        own: dict[str, str] = {}
        for name, option in self.settings.items():
            own |= dict.fromkeys(option.also, name)
        values: dict[str, object] = {}
        for key, value in arguments.items():
            name = own.get(key, key)
            if name in values:
                raise UsageError(f"--set {key}: it is {name} by another name, which is given too: leave one out")
            values[name] = value
        return values

    def read_options(self, arguments: Mapping[str, object], scope: Mapping[str, Any]) -> dict[str, Any]:
        """The options' values: those given, else their defaults in ``scope``, where options that come before count.

        Raises:
            CoverageError: an option that must have a value and has none.
            UsageError: an option that the recipe does not have, or a value that it cannot take.
        """
        options = self.settings
        _check_options(arguments, options, f"recipe {self.name} has no such option; it has")
        values: dict[str, Any] = {}
        for name, option in options.items():
            default = option.default
            if name in arguments:
                values[name] = option.read(name, arguments[name])
            elif isinstance(default, str) and default.startswith("{"):
                values[name] = expressions.evaluate(default[1:-1], {**scope, **values})
            else:
                values[name] = default
            if option.required and values[name] is None:
                where = ", or that file" if option.default else ""
                raise CoverageError(
                    f"recipe {self.name}: no value for {name} ({option.help}): give --set {name}=...{where}{near_keys(default, scope)}"
                )
        return values

    def apply(
        self,
        entries: Mapping[str, AnyNode],
        config: Mapping[str, Any] | None = None,
        options: Mapping[str, object] | None = None,
        *,
        sidecar: Mapping[str, Any] | None = None,
        recast: Recast = keep_dtype,
    ) -> Conversion:
        """The target nodes for the tensors ``entries``.

        Args:
            entries: name -> stored tensor, or a layout of stored pieces, in tensor order.
            config: the source's config.json.
            options: ``--set`` values.
            sidecar: the config.json of the target-side folder, where one is given.
            recast: which dtype a target shall have.

        Raises:
            CoverageError: tensors without a rule, rules without tensors, targets made twice, shapes or dtypes that do not fit.
            UsageError: options that do not exist.
        """
        names = canonical(entries, self.source.aliases)
        nodes: Mapping[str, AnyNode] = {name: entries[source] for name, source in names.items()}
        rows = {name: Row(name, (source,), "", entries[source].spec) for name, source in names.items()}
        arguments = self._by_own_names(options or {})
        scope = {**(config or {}), "config": config or {}, "sidecar": sidecar or {}, "given": list(arguments)}
        resizing = {key for key in vocabulary.OPTIONS if key not in self.settings} if "resize_vocab" in arguments else set()
        values = self.read_options({key: value for key, value in arguments.items() if key not in resizing}, scope_of(nodes, scope))
        conversions: list[Conversion] = []
        keys: dict[str, Any] = {}
        for stage in self.stages:
            own = {key: expressions.evaluate(text, scope_of(nodes, {**scope, **values})) for key, text in stage.config.items()}
            keys |= {key: value for key, value in own.items() if value is not None}
            casts = recast if len(conversions) == len(self.stages) - 1 else keep_dtype
            conversions.append(replace(stage, name=self.name).make(nodes, rows, scope, values, casts))
            nodes, rows = conversions[-1].outputs, {row.target: row for row in conversions[-1].rows}
        whole = Conversion(conversions[-1].outputs, conversions[-1].rows, options=values, keys=keys)
        for conversion in conversions:
            whole.dropped.extend(conversion.dropped)
            whole.notes.extend(conversion.notes)
            whole.replicas.extend(conversion.replicas)
            whole.reasons.update(conversion.reasons)
            whole.tied.extend(conversion.tied)
        return resize_vocab(whole, _read(vocabulary.OPTIONS, {key: arguments[key] for key in resizing & set(arguments)}))

    def coverage(self, names: Mapping[str, int]) -> tuple[float, float]:
        """The shares of a checkpoint's tensors that have a rule, and of the rules without condition that have one of them; by names only.

        ``names`` says how many tensors each stands for. The second share is 0 where none was found, also because rules take any name;
        below 1 otherwise, the recipe cannot fit.
        """
        rules = [fact for fact in self.rules if isinstance(fact, Rule | Drop)]
        ties = [fact for fact in self.rules if isinstance(fact, Tie) and fact.flipped]
        matcher = Matcher([parse_names(fact.left) for fact in rules] + [parse_names(tie.right) for tie in ties])
        matches_of = {source: matcher.match(name) for name, source in canonical(names, self.source.aliases).items()}
        count = sum(names[source] for source, matches in matches_of.items() if matches)
        numbers = {number for number, _ in itertools.chain.from_iterable(matches_of.values())}
        required = {number for number, fact in enumerate(rules) if isinstance(fact, Rule) and _must_match(fact)}
        share = len(numbers & required) / len(required) if required else 0.0
        return count / max(sum(names.values()), 1), share

    def make(
        self, nodes: Mapping[str, AnyNode], rows: Mapping[str, Row], scope: Mapping[str, Any], values: Mapping[str, Any], recast: Recast
    ) -> Conversion:
        """One stage of `apply`: what this recipe, without the ones that follow, makes of tensors that ``rows`` say the origin of."""
        title = f"recipe {self.name}"
        scope = {**scope, **values}
        return Application(title, self.rules, self.dims, self.requires, entries=nodes, scope=scope, rows=rows, recast=recast).run()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values, as a recipe file holds it, which says by the recipe's name what its functions are."""
        return self._to_dict(self.name)

    def _to_dict(self, whole: str) -> dict[str, Any]:
        """A stage of the recipe ``whole`` as JSON values."""
        data = declaration.without_defaults(self)
        data["rules"] = [declaration.row_of(fact) for fact in self.rules]
        data["options"] = {name: declaration.without_defaults(option) for name, option in self.options.items()}
        for key, side, name in (("left", self.left, f"{whole}:inverse"), ("right", self.right, whole)):
            data[key] = declaration.without_defaults(side) | ({"writes": name} if callable(side.writes) else {})
        data["then"] = self.then._to_dict(whole) if self.then else {}
        return {key: value for key, value in data.items() if value not in ({}, ())}

    @classmethod
    def from_dict(cls, data: object, where: str = "recipe") -> Recipe:
        """Reads what `to_dict` gives.

        Raises:
            RecipeError: unknown or missing fields, or values of the wrong kind.
        """
        table = declaration.table(data, where)
        fields: dict[str, Any] = {"rules": declaration.facts(table.get("rules"), where)}
        with declaration.within("options"):
            fields["options"] = declaration.options(table.get("options", {}), where)
        for name in ("left", "right"):
            if name in table:
                with declaration.within(name):
                    fields[name] = declaration.build(Side, table[name], f"{where}, {name}")
        if "then" in table:
            with declaration.within("then"):
                fields["then"] = cls.from_dict(table["then"], f"{where}, then")
        recipe: Recipe = declaration.build(cls, {**table, **fields}, where, fields)
        return recipe


def chain(first: Recipe, *others: Recipe) -> Recipe:
    """Recipes one after the other as one: each takes what the one before it makes.

    >>> first = streamconv.Recipe(rules=(streamconv.Rule("w", "v"),))
    >>> second = streamconv.Recipe(rules=(streamconv.Rule("v", "u"),))
    >>> [stage.rules[0].right for stage in streamconv.recipe.chain(first, second).stages]
    ['v', 'u']
    """
    if not others:
        return first
    return replace(first, then=chain(*others))


def _check_options(arguments: Mapping[str, object], options: Mapping[str, Option], problem: str) -> None:
    """Raises UsageError, which says ``problem`` and what there is, where an argument is none of the options."""
    unknown = sorted(set(arguments) - set(options))
    if unknown:
        names = sorted(options)
        examples = ", ".join(names[:MOST_NAMED]) or "none"
        more = ", ..." if len(names) > MOST_NAMED else ""
        raise UsageError(f"--set {unknown[0]}: {problem}: {examples}{more}{did_you_mean(unknown[0], names)}")


def _check_sizes(dims: Mapping[str, Dim]) -> None:
    """Raises NotationError where a size is no expression."""
    for dim in dims.values():
        sizes = dim.values() if isinstance(dim, Mapping) else (dim,)
        for size in sizes:
            if isinstance(size, str):
                expressions.check(size.removeprefix("="))


def _check_alias(alias: str, name: str) -> None:
    """Raises RecipeError where two names of a tensor do not have the same captures."""
    if _captures(alias) != _captures(name):
        raise RecipeError(f"the names {alias!r} and {name!r} of one tensor must have the same captures")


def _captures(name: str) -> set[tuple[str, str]]:
    """The captures of a name pattern: what each is called, and its kind."""
    return {(capture.name, capture.kind) for capture in plain_names(name).captures}


def _check_fact(fact: Fact) -> None:
    """Raises RecipeError or UsageError where something in a fact cannot be read."""
    for pattern in [pattern_of(fact), *([fact.right] if isinstance(fact, Rule | Tie) else [])]:
        parse_names(pattern)
    if fact.when:
        expressions.check(fact.when)
    if isinstance(fact, Tie):
        return
    for condition in (fact.where, fact.optional):
        if isinstance(condition, str):
            expressions.check(condition)
    _check_sizes(fact.dims)
    steps.check(fact.op)
    if isinstance(fact, Rule):
        if fact.layout and len(fact.layout) > LONGEST:
            raise NotationError(f"a layout of {len(fact.layout)} characters, {LONGEST} at most", fact.layout, LONGEST)
        _ = fact.binding
        steps.check(fact.undo, "undo")
        if fact.cast:
            parse_dtype(fact.cast)


def _must_match(rule: Rule) -> bool:
    """Whether a rule holds without condition, of names that it says."""
    return not (rule.optional or rule.when or re.fullmatch(r"\{\w+\*\}", rule.left))


MOST_NAMED = 12  # names of options in a message
IDENTITY_OPTIONS = {
    "root": Option("the key of the dict of tensors in a file that torch.save wrote, dotted if it lies deeper"),
    "tied": Option("keep: tensors that are one and the same are stored once; copy: each of them", "keep", ("keep", "copy")),
    **vocabulary.OPTIONS,
}
"""What ``--set`` accepts without a recipe."""


def read_identity_options(arguments: Mapping[str, object]) -> dict[str, Any]:
    """The values of these options. Raises UsageError."""
    _check_options(arguments, IDENTITY_OPTIONS, "there is no recipe to take it; without one there are")
    return _read(IDENTITY_OPTIONS, arguments)


def _read(options: Mapping[str, Option], arguments: Mapping[str, object]) -> dict[str, Any]:
    """The options' values: those that arguments say, else their defaults."""
    return {name: option.read(name, arguments[name]) if name in arguments else option.default for name, option in options.items()}
