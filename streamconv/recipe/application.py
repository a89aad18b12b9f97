"""Facts applied to a checkpoint's names and shapes: which target tensor is made of which sources, and how."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, rearrange
from streamconv.graph.ops import Rearrange
from streamconv.notation import expressions
from streamconv.notation.names import Matcher, Values
from streamconv.notation.names import parse as parse_names
from streamconv.recipe import steps
from streamconv.recipe.facts import Dim, Fact, Make, Rule, Tie, capture_of
from streamconv.recipe.grouping import Group, Grouping, grid
from streamconv.recipe.sizes import Numbering, Sizes, near_keys, scope_of
from streamconv.rows import Row

MOST_SLICES = 1_000_000  # tensors that one tensor can be taken apart into


Replica = tuple[AnyNode, AnyNode, tuple[str, str]]


@dataclass(frozen=True)
class Conversion:
    """What a recipe makes of a checkpoint: target nodes in tensor order, and what to say about them."""

    outputs: dict[str, AnyNode]
    rows: list[Row]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, tuple[int, int]] = field(default_factory=dict)  # key of config.json -> what it was and what it is now
    keys: dict[str, Any] = field(default_factory=dict)  # of config.json, with dots if within others -> what they say now
    reasons: dict[str, str] = field(default_factory=dict)  # of the dropped ones -> the rule that drops it
    tied: list[str] = field(default_factory=list)  # sources and targets that repeat another


Recast = Callable[[str, TensorSpec], str | None]
"""Target name and spec -> the dtype it shall have, or None to keep it."""


def keep_dtype(_name: str, _spec: TensorSpec) -> str | None:
    """The `Recast` that casts nothing."""
    return None


def canonical(entries: Iterable[str], aliases: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The name that rules use -> the stored name. Raises CoverageError where two names stand for one."""
    if not aliases:
        return {name: name for name in entries}
    patterns = [(parse_names(a), parse_names(b)) for a, b in aliases]
    matcher = Matcher([a for a, _ in patterns])
    sources: dict[str, str] = {}
    for source in entries:
        name = source
        matches = matcher.match(source)
        if matches:
            number, values = matches[0]
            name = patterns[number][1].format(values)
        if name in sources:
            raise CoverageError(f"{source} and {sources[name]} are two names of one tensor, {name}: remove one of them")
        sources[name] = source
    return sources


class Application:
    """One application of facts to tensors, which are stored ones or made by the stage before.

    Args:
        title: what messages begin with.
        facts: those of one recipe.
        dims: its sizes.
        requires: its conditions, and what to say where one does not hold.
        entries: the tensors.
        scope: what expressions may use.
        rows: what the tensors are made of.
        recast: which dtype a target shall have.
    """

    def __init__(
        self,
        title: str,
        facts: Sequence[Fact],
        dims: Mapping[str, Dim],
        requires: Mapping[str, str],
        *,
        entries: Mapping[str, AnyNode],
        scope: Mapping[str, Any],
        rows: Mapping[str, Row],
        recast: Recast,
    ) -> None:
        self.title, self.requires, self.recast = title, requires, recast
        self.entries, self.rows = entries, rows
        self.order = {name: k for k, name in enumerate(entries)}
        self.scope = scope_of(entries, scope)
        self.sizes = Sizes(title, dims, self.scope)
        self.facts: list[Fact] = []
        self.others: list[Fact] = []
        for fact in facts:
            holds = not fact.when or expressions.evaluate(fact.when, self.scope)
            (self.facts if holds else self.others).append(fact)
        self.outputs: dict[str, tuple[int, AnyNode, Row]] = {}
        self.dropped: list[str] = []
        self.reasons: dict[str, str] = {}
        self.tied: list[str] = []
        self.notes: list[str] = []
        self.replicas: list[Replica] = []
        self._unread = 0
        self._cache: dict[object, list[Rearrange]] = {}
        self._numbers: dict[object, Any] = {}
        self._names_in = cache(expressions.find_names)

    def run(self) -> Conversion:
        """The conversion; see `Recipe.apply`."""
        if self._changes_nothing():
            self._check_conditions()
            return Conversion(dict(self.entries), [self.rows[name] for name in self.entries])
        entries = self._take_replicas()
        grouping = Grouping(self.facts, self.sizes, self._label, self.others)
        instances_of = grouping.run(entries)
        self.reasons = {self._label(name): rule for name, rule in grouping.dropped.items()}
        self.dropped += self.reasons
        self._check_conditions()
        for rule, instances in instances_of:
            for group in instances.values():
                self._build(rule, group)
        self._make_ties()
        self._make_again()
        if not self.outputs:
            raise CoverageError(f"{self.title}: nothing to convert, the source holds no tensor that a rule keeps")
        if self._unread:
            self.notes.append(f"{self._unread} tensors that ranks or layers repeat are taken from the first of them")
        in_order = sorted(self.outputs.items(), key=lambda item: item[1][0])
        outputs = {name: node for name, (_, node, _) in in_order}
        rows = [row for _, (_, _, row) in in_order]
        return Conversion(outputs, rows, self.dropped, self.notes, self.replicas, reasons=self.reasons, tied=self.tied)

    def _changes_nothing(self) -> bool:
        """Whether every tensor stays what it is, as in a stage whose steps have nothing to do."""
        return self.recast is keep_dtype and bool(self.entries) and bool(self.facts) and all(map(_keeps_all, self.facts))

    def _check_conditions(self) -> None:
        """Raises CoverageError where a condition of the recipe does not hold."""
        for condition, problem in self.requires.items():
            if not expressions.evaluate(condition, self.scope):
                raise CoverageError(f"{self.title}: {problem.format_map(self.scope)}{near_keys(condition, self.scope)}")

    def _label(self, name: str) -> str:
        """What to call a tensor in a message: as it is stored, if it is."""
        sources = self.rows[name].sources
        return sources[0] if len(sources) == 1 else name

    def _take_replicas(self) -> dict[str, AnyNode]:
        """The entries without those that only repeat another."""
        entries = dict(self.entries)
        for tie in self.facts:
            if isinstance(tie, Tie) and tie.flipped and tie.right in entries and tie.stored in entries:
                replica, original = entries[tie.right], entries[tie.stored]
                both = (self._label(tie.right), self._label(tie.stored))
                if replica.spec != original.spec:
                    raise CoverageError(
                        f"{self.title}: {both[0]} should repeat {both[1]} and is {replica.spec}, "
                        f"not {original.spec}: mend the source, or set the options so that they are not tied"
                    )
                self.replicas.append((replica, original, both))
                del entries[tie.right]
                self.dropped.append(both[0])
                self.tied.append(both[0])
        return entries

    # One group -------------------------------------------------------------------------------------------------

    def _build(self, rule: Rule, group: Group) -> None:
        binding = rule.binding
        stacks, lengths, names = self._stacks(rule, group)
        members = list(itertools.chain.from_iterable(stacks))
        nodes = [self.entries[name] for name in members]
        values: Values = {right: group.values[left] for left, right in binding.each}
        right = self.sizes.numbering(rule, binding.right)
        where = f"{self.title}, {names[0]}: "
        if rule.partial:
            values |= dict.fromkeys(binding.right_only.lists, 0)
        if binding.layout is None:
            result = self._step(rule, nodes, group.values, where) if rule.op else nodes[0]
            how = "" if result is nodes[0] else steps.describe(str(rule.op["op"]), self._parameters(rule, group.values))
            for target in self._alike(rule, right, values):
                self._emit(target, result, names, how, rule)
            return
        nodes = [self._step(rule, [node], group.values, where) for node in nodes] if rule.op else nodes
        spec_of = {name: node.spec for name, node in zip(members, nodes, strict=True)}
        specs = [spec_of[stack[0]] for stack in stacks]
        shapes = [(*lengths, *spec.shape) for spec in specs]
        for stack, spec in zip(stacks, specs, strict=True):
            for name in stack:
                if spec_of[name].shape != spec.shape:
                    raise CoverageError(f"{where}{name} has shape {self.entries[name].spec.shape}, the others of its group {spec.shape}")
        ops = self._ops(rule, group, tuple(shapes), tuple(map(len, stacks)), where)
        choices = itertools.product(*(range(len(capture_of(binding.right, n).alternatives)) for n in binding.right_only.lists))
        copies = [self.sizes.repeats(rule, n) for n in binding.right_only.counts]
        sizes, next_op = ops[0].sizes, iter(ops)
        for choice in choices:
            with_choice = {**values, **dict(zip(binding.right_only.lists, choice, strict=True))}
            for counts in itertools.product(*(range(sizes[n]) for n in binding.right_only.counts)):
                op = next(next_op)
                targets: list[str] = []
                for repeat in itertools.product(*map(range, copies)):
                    numbers = [n * c + k for n, c, k in zip(counts, copies, repeat, strict=True)]
                    targets += self._alike(rule, right, {**with_choice, **dict(zip(binding.right_only.counts, numbers, strict=True))})
                try:
                    result = rearrange(op, tuple(self._one_dtype(rule, targets[0], nodes)))
                except CoverageError as error:
                    raise CoverageError(f"{where}{error}") from error
                for target in targets:
                    self._emit(target, result, names, rule.layout or "", rule)

    def _stacks(self, rule: Rule, group: Group) -> tuple[list[list[str]], tuple[int, ...], list[str]]:
        """For each left tensor the names behind it, the sizes of the leading axes that they count along, and all names, copies too."""
        binding = rule.binding
        if not any(binding.left_only) and [*map(len, group.members.values())] == [1]:  # as of most rules
            (name,) = next(iter(group.members.values())).values()
            return [[name]], (), [name]
        members: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
        copies = [self.sizes.repeats(rule, n) for n in binding.left_only.counts]
        repeated = any(count != 1 for count in copies)
        minimums = [(self.sizes.dim(rule, n, firm=True) or 0) * c for n, c in zip(binding.left_only.counts, copies, strict=True)]
        totals = []
        for k, minimum in enumerate(minimums):
            last = max(counts[k] for _, counts in group.members)
            totals.append(max(1 + last, minimum))
        for (choice, counts), alike in sorted(group.members.items()):
            name = alike[min(alike)] if len(alike) > 1 else next(iter(alike.values()))
            places = tuple(n // c for n, c in zip(counts, copies, strict=True)) if repeated else counts
            first = members.setdefault((choice, places), name)
            spec = self.entries[first].spec
            for other in alike.values() if len(alike) > 1 or name != first else ():
                if self.entries[other].spec != spec:
                    raise CoverageError(f"{self.title}: {other} is {self.entries[other].spec} and should repeat {first}, which is {spec}")
            self._unread += len(alike) - (name == first)
        choices = list(itertools.product(*(range(len(capture_of(binding.left, n).alternatives)) for n in binding.left_only.lists)))
        if rule.partial:
            choices = [choice for choice in choices if (choice, ()) in group.members or choice == choices[0]]
        lengths = tuple(-(-n // c) for n, c in zip(totals, copies, strict=True))
        total = len(choices) * math.prod(totals)
        if len(group.members) != total:
            choice, counts = _first_gap(choices, totals, group)
            values = {
                **group.values,
                **dict(zip(binding.left_only.lists, choice, strict=True)),
                **dict(zip(binding.left_only.counts, counts, strict=True)),
                **dict.fromkeys(binding.left_only.alike, 0),
            }
            present = next(iter(members.values()))
            raise CoverageError(
                f"{self.title}: {self.sizes.numbering(rule, binding.left).write(values)} is missing, while {present} is there: "
                f"{total} tensors go together, {len(group.members)} were found"
            )

        def stack(choice: tuple[int, ...]) -> list[str]:
            return [members[choice, counts] for counts in grid(lengths)]

        stacks = [stack(choice) for choice in choices]
        names = dict.fromkeys(itertools.chain.from_iterable(stacks))
        for alike in group.members.values():
            names |= dict.fromkeys(alike.values())
        return stacks, lengths, list(names)

    def _ops(self, rule: Rule, group: Group, shapes: tuple[tuple[int, ...], ...], stacks: tuple[int, ...], where: str) -> list[Rearrange]:
        """The op for each target, in order; the same for all groups with the same shapes and alternatives."""
        binding = rule.binding
        assert binding.layout is not None
        alternatives = _alternatives(rule, group.values)
        key = (id(rule), shapes, stacks, alternatives)
        if key not in self._cache:
            layout = binding.layout.spread([len(shape) for shape in shapes])
            fixed = {}
            for axis in layout.axes:
                size = self.sizes.dim(rule, axis, alternatives, firm=True)
                if size is not None:
                    fixed[axis] = size
            try:
                sizes = layout.solve(shapes, partial(self.sizes.dim, rule, alternatives=alternatives), where, fixed)
            except CoverageError as error:
                raise CoverageError(f"{error}{self.sizes.near(rule)}") from error
            leading = len(binding.right_only.counts)
            slices = math.prod(sizes[name] for name in binding.right_only.counts)
            if slices > MOST_SLICES:
                raise CoverageError(f"{where}{rule.right!r} would make {slices} tensors of it, which no model has")
            numbers = itertools.product(range(len(layout.right)), range(slices))
            self._cache[key] = [Rearrange(str(layout), sizes, stacks, output, leading, part) for output, part in numbers]
        return self._cache[key]

    # Targets ---------------------------------------------------------------------------------------------------

    def _step(self, fact: Rule | Make, nodes: Sequence[AnyNode], values: Values, where: str) -> AnyNode:
        """What a fact's ``op`` makes of nodes."""
        try:
            return steps.take(str(fact.op["op"]), nodes, self._parameters(fact, values), self.entries)
        except CoverageError as error:
            raise CoverageError(f"{where}{error}") from error

    def _parameters(self, fact: Rule | Make, values: Values) -> dict[str, Any]:
        """What a fact's ``op`` takes."""
        parameters: dict[str, Any] = {}
        for key, size in fact.op.items():
            if key == "op":
                continue
            value = self._evaluate(size, values) if isinstance(size, str) else size
            if value is None:
                raise CoverageError(f"{fact.op['op']}: no value for {key}, which is {size!r}: give it with --set, or in config.json")
            parameters[key] = value
        return parameters

    def _evaluate(self, text: str, values: Values) -> Any:
        """An expression for one of the groups of a rule: evaluated once for all groups with the same values of what it names."""
        own = tuple((name, values[name]) for name in self._names_in(text) if name in values)
        if (text, own) not in self._numbers:
            self._numbers[text, own] = expressions.evaluate(text, {**self.scope, **values})
        return self._numbers[text, own]

    def _one_dtype(self, rule: Rule, target: str, nodes: list[AnyNode]) -> Iterator[AnyNode]:
        """The inputs, cast to what the target shall have where they differ among themselves."""
        mixed = len({node.spec.dtype.name for node in nodes}) > 1
        for node in nodes:
            yield steps.cast(node, self._dtype(rule, target, node.spec)) if mixed else node

    def _dtype(self, rule: Rule | None, target: str, spec: TensorSpec) -> str | None:
        """The dtype that a target shall have, None: its own."""
        option = self.recast(target, spec)
        cast = parse_dtype(rule.cast).name if rule and rule.cast and not rule.flipped else None
        return cast or option if rule and rule.firm else option or cast

    def _alike(self, fact: Rule | Make, names: Numbering, values: Values) -> Iterator[str]:
        """The names of a pattern, one for each number of the captures that ``values`` leave open."""
        captures = [name for name in names.open if name not in values]
        counts = [min(self.sizes.count(fact, name), MOST_SLICES + 1) for name in captures]
        if math.prod(counts) > MOST_SLICES:
            raise CoverageError(f"{self.title}: {names.pattern.text!r} would be more than {MOST_SLICES} tensors, which no model has")
        for numbers in itertools.product(*map(range, counts)):
            yield names.write({**values, **dict(zip(captures, numbers, strict=True))})

    def _emit(self, target: str, node: AnyNode, names: Sequence[str], how: str, rule: Rule | None = None) -> None:
        node = steps.cast(node, self._dtype(rule, target, node.spec))
        if target in self.outputs:
            both = [*self.outputs[target][2].sources[:1], *names[:1], "nothing"]
            raise CoverageError(f"{self.title}: {target} is made twice, from {both[0]} and from {both[1]}")
        rows = [self.rows[name] for name in names]
        sources = dict.fromkeys(itertools.chain.from_iterable(row.sources for row in rows))
        layouts = dict.fromkeys([*(row.layout for row in rows), how])
        layout = ", then ".join(filter(None, layouts))
        position = min((self.order[name] for name in names), default=len(self.order))
        self.outputs[target] = (position, node, Row(target, tuple(sources), layout, node.spec))

    def _make_ties(self) -> None:
        for tie in self.facts:
            if isinstance(tie, Tie) and not tie.flipped and tie.right not in self.outputs and tie.left in self.entries:
                self._emit(tie.right, self.entries[tie.left], [tie.left], "")
                self.tied.append(tie.right)
                self.notes.append(f"{tie.right} repeats {self._label(tie.left)}: the source ties them")

    def _make_again(self) -> None:
        """The targets that no source has and that can be computed."""
        for fact in self.facts:
            if isinstance(fact, Make) and fact.op:
                node = self._step(fact, [], {}, f"{self.title}, {fact.right}: ")
                names = [name for name, entry in self.entries.items() if entry is node]
                for target in self._alike(fact, self.sizes.numbering(fact, parse_names(fact.right)), {}):
                    self._emit(target, node, names, steps.describe(str(fact.op["op"]), self._parameters(fact, {})))


def _keeps_all(fact: Fact) -> bool:
    """Whether a fact says of all tensors that they are the same on both sides."""
    if not isinstance(fact, Rule) or fact.left != fact.right or fact.layout or fact.op or fact.cast or fact.where:
        return False
    return [capture.kind for capture in fact.binding.left.captures] == ["rest"] and len(fact.binding.left.atoms) == 1


def _first_gap(choices: Sequence[tuple[int, ...]], totals: Sequence[int], group: Group) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first choice and counts below ``totals`` that no tensor of a group has; there are huge ``totals``, so it looks no further."""
    for counts in grid(totals):
        for choice in choices:
            if (choice, counts) not in group.members:
                return choice, counts
    raise AssertionError("fewer tensors than choices and counts")


def _alternatives(rule: Rule, values: Values) -> tuple[str, ...]:
    """What the for-each lists of a rule say for these values: on the side of its declaration's left, then on the other."""
    binding = rule.binding
    pairs = [pair for pair in binding.each if capture_of(binding.left, pair[0]).kind == "list"]
    left = [capture_of(binding.left, mine).alternatives[int(values[mine])] for mine, _ in pairs]
    right = [capture_of(binding.right, theirs).alternatives[int(values[mine])] for mine, theirs in pairs]
    return (*right, *left) if rule.flipped else (*left, *right)


def identity(entries: Mapping[str, AnyNode], recast: Recast = keep_dtype) -> Conversion:
    """The conversion without a recipe: every tensor under its own name, cast where that is asked for."""
    outputs: dict[str, AnyNode] = {}
    rows = []
    for name, entry in entries.items():
        outputs[name] = steps.cast(entry, recast(name, entry.spec))
        rows.append(Row(name, (name,), "", outputs[name].spec))
    return Conversion(outputs, rows)
