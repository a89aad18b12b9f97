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
    """The tensors of a checkpoint by the rules that take them. ``label`` says what to call a tensor in a message.

    Attributes:
        dropped: names that a rule drops -> that rule.
    """

    def __init__(self, facts: Sequence[Fact], sizes: Sizes, label: Callable[[str], str]) -> None:
        self._facts, self._sizes, self._label, self._title = facts, sizes, label, sizes.title
        self.dropped: dict[str, str] = {}

    def run(self, entries: Mapping[str, AnyNode]) -> list[tuple[Rule, dict[tuple[object, ...], Group]]]:
        """The rules with what they take of ``entries``: the values of the for-each captures -> the tensors."""
        facts = [fact for fact in self._facts if isinstance(fact, Rule | Drop)]
        matcher = Matcher([parse_names(fact.left) for fact in facts])
        sides = [self._numberings(fact) for fact in facts]
        groups: list[dict[tuple[object, ...], Group]] = [{} for _ in facts]
        used = [False] * len(facts)
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
            used[number] = True
            if isinstance(fact, Drop):
                self.dropped[name] = fact.left
                continue
            binding = fact.binding
            key = tuple(values[left] for left, _ in binding.each)
            group = groups[number].setdefault(key, Group({left: values[left] for left, _ in binding.each}))
            member = (tuple(int(values[n]) for n in binding.left_lists), tuple(int(values[n]) for n in binding.left_counts))
            group.members.setdefault(member, {})[tuple(int(values[n]) for n in binding.left_alike)] = name
        self._check_coverage(facts, used, unmatched, entries)
        instances = [(fact, group) for fact, group in zip(facts, groups, strict=True) if isinstance(fact, Rule)]
        self._check_complete([(rule, group) for rule, group in instances if group and not _is_sparse(rule)])
        return instances

    def _numberings(self, fact: Rule | Drop) -> tuple[Numbering, Numbering | None]:
        """The names on the left of a fact, and those on its right if their numbers are other ones."""
        right = self._sizes.numbering(fact, fact.binding.right) if isinstance(fact, Rule) else None
        return self._sizes.numbering(fact, parse_names(fact.left)), right if right and right.shifts else None

    def _hold(self, fact: Rule | Drop, numbers: Values, left: Numbering, right: Numbering | None) -> Values | None:
        """The values of captures for the numbers in a name, or None where the fact is not for it."""
        values = left.read(numbers)
        if values is None or (fact.where and not expressions.evaluate(fact.where, {**self._sizes.scope, **values})):
            return None
        if isinstance(fact, Rule) and right and not right.has({theirs: values[mine] for mine, theirs in fact.binding.each}):
            return None
        return values

    def _is_optional(self, fact: Rule | Drop) -> bool:
        """Whether a fact may match nothing."""
        return bool(expressions.evaluate(fact.optional, self._sizes.scope)) if isinstance(fact.optional, str) else fact.optional

    def _check_coverage(self, facts: Sequence[Rule | Drop], used: list[bool], unmatched: list[str], entries: Mapping[str, AnyNode]) -> None:
        missing = [fact for fact, has_match in zip(facts, used, strict=True) if not has_match and not self._is_optional(fact)]
        unused = sorted(missing, key=lambda fact: isinstance(fact, Drop))
        if unmatched:
            hint = ""
            if near := nearest(unmatched[0], [fact.left for fact in facts]):
                hint = f"; the nearest rule is {near[0]!r}"
            more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
            raise CoverageError(
                f"{self._title}: {self._label(unmatched[0])}{more}: no rule for it{hint}; "
                "nothing is dropped silently: use a recipe that knows it, or one that drops it by name"
            )
        if unused:
            hint = ""
            if near := nearest(unused[0].left, entries):
                hint = f"; the nearest tensor is {near[0]}"
            more = f" and {len(unused) - 1} more rules" if len(unused) > 1 else ""
            needs = [unused[0].when, f"not ({unused[0].optional})" if unused[0].optional else None]
            when = f" (the rule holds when {' and '.join(filter(None, needs))})" if any(needs) else ""
            raise CoverageError(
                f"{self._title}: rule {unused[0].left!r}{more}: no tensor for it{hint}; is this the right recipe and source?{when}"
            )

    def _check_complete(self, instances_of: Sequence[tuple[Rule, Mapping[tuple[object, ...], Group]]]) -> None:
        """Raises CoverageError where a rule has some of its names and not all."""
        numbers: dict[str, int] = {}
        for rule, instances in instances_of:
            for k, (name, _) in enumerate(rule.binding.each):
                if capture_of(rule.binding.left, name).kind == "int":
                    numbers[name] = max(
                        numbers.get(name, 0), self._sizes.dim(rule, name) or 0, *(1 + int(str(key[k])) for key in instances)
                    )
        for rule, instances in instances_of:
            names = [name for name, _ in rule.binding.each]
            choices: list[Sequence[int]] = [
                range(numbers[name]) if name in numbers
                else range(len(capture_of(rule.binding.left, name).alternatives)) if name.startswith("list")
                else sorted({int(str(key[k])) for key in instances})
                for k, name in enumerate(names)
            ]  # fmt: skip
            if len(instances) != math.prod(map(len, choices)):  # numbers may be huge: something is missing early
                missing = _first_missing(choices, instances)
                values: Values = {capture.name: 0 for capture in rule.binding.left.captures}
                values |= dict(zip(names, missing, strict=True))
                name = self._sizes.numbering(rule, rule.binding.left).write(values)
                there = next(name for group in instances.values() for alike in group.members.values() for name in alike.values())
                raise CoverageError(
                    f"{self._title}: {name} is missing, while {self._label(there)} is there: {math.prod(map(len, choices))} of its kind go "
                    f"together, {len(instances)} were found; mend the source, or let the rule be sparse"
                )


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


def _first_missing(choices: Sequence[Sequence[int]], instances: Collection[tuple[object, ...]]) -> tuple[int, ...]:
    """The first combination of these values, one of each, that is no instance."""
    for index in grid([len(values) for values in choices]):
        combination = tuple(values[n] for values, n in zip(choices, index, strict=True))
        if combination not in instances:
            return combination
    raise AssertionError("fewer instances than combinations")
