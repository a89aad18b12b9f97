"""Names matched with facts: which rule takes which tensors together, which are dropped, and what is left over or missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode
from streamconv.notation import expressions
from streamconv.notation.names import Matcher, nearest
from streamconv.notation.names import parse as parse_names
from streamconv.recipe.facts import Drop, Fact, Rule, Tie, capture_of
from streamconv.recipe.sizes import Sizes

Values = dict[str, int | str]


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
        facts = [fact for fact in self._facts if isinstance(fact, Rule) or (isinstance(fact, Drop) and not fact.flipped)]
        matcher = Matcher([parse_names(fact.left) for fact in facts])
        places = [self._sizes.places(fact) for fact in facts]
        offsets = [self._sizes.offsets(fact) for fact in facts]
        groups: list[dict[tuple[object, ...], Group]] = [{} for _ in facts]
        used = [False] * len(facts)
        unmatched = []
        for name in entries:
            found = [
                (k, shifted)
                for k, values in matcher.match(name)
                if (shifted := self._hold(facts[k], values, offsets[k], places[k])) is not None
            ]
            if len(found) > 1:
                found = _narrowest(facts, found)
            if not found:
                unmatched.append(name)
                continue
            if len(found) > 1:
                both = " and ".join(repr(facts[k].left) for k, _ in found[:2])
                raise CoverageError(f"{self._title}: {name} matches two rules, {both}: make one of them narrower")
            number, values = found[0]
            fact = facts[number]
            used[number] = True
            if isinstance(fact, Drop):
                self.dropped[name] = fact.left
                continue
            binding = fact.binding
            key = tuple(values[left] for left, _ in binding.each)
            group = groups[number].setdefault(key, Group({left: values[left] for left, _ in binding.each}))
            place = (tuple(int(values[n]) for n in binding.left_lists), tuple(int(values[n]) for n in binding.left_counts))
            group.members.setdefault(place, {})[tuple(int(values[n]) for n in binding.left_alike)] = name
        self._check_coverage(facts, used, unmatched, entries)
        instances = [(fact, group) for fact, group in zip(facts, groups, strict=True) if isinstance(fact, Rule)]
        self._check_complete([(rule, group) for rule, group in instances if rule.complete and group])
        return instances

    def _hold(self, fact: Fact, values: Values, offsets: Mapping[str, int], places: Mapping[str, int]) -> Values | None:
        """The values as the right side counts them, or None where the fact is not for them."""
        if any(values.get(name, place) != place for name, place in places.items()):
            return None
        if isinstance(fact, Tie) or (fact.where and not expressions.evaluate(fact.where, {**self._sizes.scope, **values})):
            return None
        shifted = {name: int(values[name]) - offset for name, offset in offsets.items()}
        return None if any(number < 0 for number in shifted.values()) else {**values, **shifted}

    def _check_coverage(self, facts: Sequence[Fact], used: list[bool], unmatched: list[str], entries: Mapping[str, AnyNode]) -> None:
        needed = [fact for fact, seen in zip(facts, used, strict=True) if not seen and not isinstance(fact, Tie) and not fact.optional]
        unused = sorted(needed, key=lambda fact: isinstance(fact, Drop))
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
            when = f" (the rule holds when {unused[0].when})" if unused[0].when else ""
            raise CoverageError(
                f"{self._title}: rule {unused[0].left!r}{more}: no tensor for it{hint}; is this the right recipe and source?{when}"
            )

    def _check_complete(self, found: Sequence[tuple[Rule, Mapping[tuple[object, ...], Group]]]) -> None:
        """Raises CoverageError where a rule has some of its names and not all."""
        numbers: dict[str, int] = {}
        for rule, instances in found:
            for k, (name, _) in enumerate(rule.binding.each):
                if capture_of(rule.binding.left, name).kind == "int":
                    numbers[name] = max(
                        numbers.get(name, 0), self._sizes.dim(rule, name) or 0, *(1 + int(str(key[k])) for key in instances)
                    )
        for rule, instances in found:
            names = [name for name, _ in rule.binding.each]
            choices: list[Sequence[int]] = [
                range(numbers[name]) if name in numbers
                else range(len(capture_of(rule.binding.left, name).alternatives)) if name.startswith("list")
                else sorted({int(str(key[k])) for key in instances})
                for k, name in enumerate(names)
            ]  # fmt: skip
            if len(instances) != math.prod(map(len, choices)):  # numbers may be huge: something is missing early
                index = ([c[n] for c, n in zip(choices, place, strict=True)] for place in grid([len(c) for c in choices]))
                missing = next(one for one in index if tuple(one) not in instances)
                values = {capture.name: 0 for capture in rule.binding.left.captures} | dict(zip(names, missing, strict=True))
                there = next(name for group in instances.values() for alike in group.members.values() for name in alike.values())
                raise CoverageError(
                    f"{self._title}: {rule.binding.left.format(values)} is missing, while {self._label(there)} is there: "
                    f"{math.prod(map(len, choices))} of its kind go together, {len(instances)} were found; mend the source"
                )


def _narrowest(facts: Sequence[Fact], found: list[tuple[int, Values]]) -> list[tuple[int, Values]]:
    """Of several facts that match, those with a ``where``, else those that are no fallback."""
    found = [one for one in found if getattr(facts[one[0]], "where", None)] or found
    return [one for one in found if not getattr(facts[one[0]], "fallback", False)] or found


def grid(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices below ``lengths``, the last one fastest."""
    for number in range(math.prod(lengths)):
        index, rest = [], number
        for length in reversed(lengths):
            rest, digit = divmod(rest, length)
            index.append(digit)
        yield tuple(reversed(index))
