"""Names matched with facts: which rule takes which tensors together, which are dropped, and what is left over or missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode
from streamconv.notation import expressions
from streamconv.notation.names import Matcher, Values, nearest
from streamconv.notation.names import parse as parse_names
from streamconv.recipe.facts import Drop, Fact, Rule, capture_of
from streamconv.recipe.sizes import Numbering, Sizes


@dataclass
class Group:
    """The tensors that one instance of a rule takes: (list choice, counts) -> names, of which all but the first are copies of it."""

    values: Values
    members: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[tuple[int, ...], str]] = field(default_factory=dict)


class Grouping:
    """The tensors of a checkpoint by the rules that take them.

    Args:
        facts: those that hold.
        sizes: of their axes.
        label: says what to call a tensor in a message.
        others: facts whose conditions do not hold.

    Attributes:
        dropped: names that a rule drops -> that rule.
    """

    def __init__(self, facts: Sequence[Fact], sizes: Sizes, label: Callable[[str], str], others: Sequence[Fact] = ()) -> None:
        self._facts, self._sizes, self._label, self._title = facts, sizes, label, sizes.title
        self._others = others
        self.dropped: dict[str, str] = {}

    def run(self, entries: Mapping[str, AnyNode]) -> list[tuple[Rule, dict[tuple[object, ...], Group]]]:
        """The rules with what they take of ``entries``: the values of the for-each captures -> the tensors."""
        facts = [fact for fact in self._facts if isinstance(fact, Rule | Drop)]
        matcher = Matcher([parse_names(fact.left) for fact in facts])
        sides = [self._numberings(fact) for fact in facts]
        groups: list[dict[tuple[object, ...], Group]] = [{} for _ in facts]
        has_match = [False] * len(facts)
        unmatched = []
        for name in entries:
            matches: list[tuple[int, Values]] = []
            for k, numbers in matcher.match(name):
                captures = self._hold(facts[k], numbers, *sides[k])
                if captures is not None:
                    matches.append((k, captures))
            if len(matches) > 1:
                matches = _narrowest(facts, matches)
            if not matches:
                unmatched.append(name)
                continue
            if len(matches) > 1:
                both = " and ".join(repr(facts[k].left) for k, _ in matches[:2])
                raise CoverageError(f"{self._title}: {name} matches two rules, {both}: make one of them narrower")
            number, values = matches[0]
            fact = facts[number]
            has_match[number] = True
            if isinstance(fact, Drop):
                self.dropped[name] = fact.left
                continue
            binding = fact.binding
            key = tuple([values[left] for left, _ in binding.each])
            group = groups[number].get(key)
            if group is None:
                group = groups[number][key] = Group({left: values[left] for left, _ in binding.each})
            only = binding.left_only
            copies = group.members.setdefault((_numbers(values, only.lists), _numbers(values, only.counts)), {})
            copies[_numbers(values, only.alike)] = name
        without_match = [fact for fact, has_any in zip(facts, has_match, strict=True) if not has_any]
        self._check_coverage(facts, without_match, unmatched, entries)
        instances_of = [(fact, group) for fact, group in zip(facts, groups, strict=True) if isinstance(fact, Rule)]
        self._check_complete([(rule, instances) for rule, instances in instances_of if instances and not _is_sparse(rule)])
        return instances_of

    def _numberings(self, fact: Rule | Drop) -> tuple[Numbering, Numbering | None]:
        """The names on the left of a fact, and those on its right if their numbers are other ones."""
        right = self._sizes.numbering(fact, fact.binding.right) if isinstance(fact, Rule) else None
        return self._sizes.numbering(fact, parse_names(fact.left)), right if right and right.shifts else None

    def _hold(self, fact: Rule | Drop, numbers: Values, left: Numbering, right: Numbering | None) -> Values | None:
        """The values of captures for the numbers in a name, or None where the fact is not for it."""
        values = left.read(numbers) if left.shifts or left.places else numbers
        if values is None or (fact.where and not expressions.evaluate(fact.where, {**self._sizes.scope, **values})):
            return None
        if isinstance(fact, Rule) and right and not right.has({theirs: values[mine] for mine, theirs in fact.binding.each}):
            return None
        return values

    def _is_optional(self, fact: Rule | Drop) -> bool:
        """Whether a fact may match nothing."""
        return bool(expressions.evaluate(fact.optional, self._sizes.scope)) if isinstance(fact.optional, str) else fact.optional

    def _check_coverage(
        self, facts: Sequence[Rule | Drop], without_match: Sequence[Rule | Drop], unmatched: list[str], entries: Mapping[str, AnyNode]
    ) -> None:
        """Raises CoverageError where a tensor has no rule, or a rule that must match anything matches nothing."""
        unused = [fact for fact in without_match if not self._is_optional(fact)]
        unused.sort(key=lambda fact: isinstance(fact, Drop))
        if unmatched:
            near = nearest(unmatched[0], [fact.left for fact in facts])
            hint = f"; the nearest rule is {near[0]!r}" if near else ""
            more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
            do = "nothing is dropped silently: use a recipe that knows it, or one that drops it by name"
            if self._lacks_config(unmatched[0]):
                do = "config.json is missing, which says whether one is: --sidecars-from a folder of the model brings it along"
            raise CoverageError(f"{self._title}: {self._label(unmatched[0])}{more}: no rule for it{hint}; {do}")
        if unused:
            fact = unused[0]
            near = nearest(fact.left, entries)
            hint = f"; the nearest tensor is {near[0]}" if near else ""
            more = f" and {len(unused) - 1} more rules" if len(unused) > 1 else ""
            conditions = [fact.when, f"not ({fact.optional})" if fact.optional else None]
            when = f" (the rule holds when {' and '.join(filter(None, conditions))})" if any(conditions) else ""
            raise CoverageError(
                f"{self._title}: rule {fact.left!r}{more}: no tensor for it{hint}; is this the right recipe and source?{when}"
            )

    def _lacks_config(self, name: str) -> bool:
        """Whether a rule would take a tensor if the model's config, which is not there, said so."""
        scope = self._sizes.scope
        if scope.get("config") or scope.get("sidecar"):
            return False
        patterns = [parse_names(fact.left) for fact in self._others if isinstance(fact, Rule)]
        return bool(Matcher(patterns).match(name))

    def _check_complete(self, instances_of: Sequence[tuple[Rule, Mapping[tuple[object, ...], Group]]]) -> None:
        """Raises CoverageError where a rule has some of its names and not all."""
        ends = self._ends(instances_of)
        for rule, instances in instances_of:
            left = rule.binding.left
            names = [name for name, _ in rule.binding.each]
            choices: list[Sequence[int]] = []
            for k, name in enumerate(names):
                if name in ends:
                    choices.append(range(ends[name]))
                elif name.startswith("list"):
                    choices.append(range(len(capture_of(left, name).alternatives)))
                else:
                    choices.append(sorted({int(str(key[k])) for key in instances}))
            count = math.prod(map(len, choices))
            if len(instances) != count:  # numbers may be huge: a gap comes early
                values: Values = {capture.name: 0 for capture in left.captures}
                values |= dict(zip(names, _first_gap(choices, instances), strict=True))
                name = self._sizes.numbering(rule, left).write(values)
                group = next(iter(instances.values()))
                copies = next(iter(group.members.values()))
                there = next(iter(copies.values()))
                raise CoverageError(
                    f"{self._title}: {name} is missing, while {self._label(there)} is there: {count} of its kind go "
                    f"together, {len(instances)} were found; mend the source, or let the rule be sparse"
                )

    def _ends(self, instances_of: Sequence[tuple[Rule, Mapping[tuple[object, ...], Group]]]) -> dict[str, int]:
        """The captures that are numbers -> one more than the largest that any rule has, or than ``dims`` say."""
        ends: dict[str, int] = {}
        for rule, instances in instances_of:
            for k, (name, _) in enumerate(rule.binding.each):
                if capture_of(rule.binding.left, name).kind == "int":
                    largest = max(int(str(key[k])) for key in instances)
                    ends[name] = max(ends.get(name, 0), self._sizes.dim(rule, name) or 0, 1 + largest)
        return ends


def _numbers(values: Values, names: Sequence[str]) -> tuple[int, ...]:
    """The values of these captures, which are numbers."""
    return tuple([int(values[name]) for name in names]) if names else ()


def _is_sparse(rule: Rule) -> bool:
    """Whether names of a rule may be missing."""
    return bool(rule.sparse or rule.where or rule.fallback or any(capture.kind == "rest" for capture in rule.binding.left.captures))


def _narrowest(facts: Sequence[Rule | Drop], matches: list[tuple[int, Values]]) -> list[tuple[int, Values]]:
    """Of several facts that match, those with a ``where``, else those that are no fallback."""
    matches = [match for match in matches if facts[match[0]].where] or matches
    return [match for match in matches if not facts[match[0]].fallback] or matches


def grid(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices below ``lengths``, the last one fastest."""
    for number in range(math.prod(lengths)):
        index, rest = [], number
        for length in reversed(lengths):
            rest, digit = divmod(rest, length)
            index.append(digit)
        yield tuple(reversed(index))


def _first_gap(choices: Sequence[Sequence[int]], instances: Collection[tuple[object, ...]]) -> tuple[int, ...]:
    """The first combination of these values, one of each, that is no instance."""
    for index in grid([len(values) for values in choices]):
        combination = tuple(values[n] for values, n in zip(choices, index, strict=True))
        if combination not in instances:
            return combination
    raise AssertionError("fewer instances than combinations")
