"""Patterns of tensor names, such as ``"model.layers.{i}.self_attn.{q,k,v}_proj.weight"``.

    text         itself; ``{{`` and ``}}`` are literal braces
    {i}          a number without leading zeros (of at most 18 digits, as all numbers here)
    {r:02}       a number padded with zeros to two digits, more where it needs them: consolidated.{r:02}.pth
    {e?_}        nothing (0), or "_" and a number from 1 on: dense_h_to_4h{e?_}.weight
    {q,k,v}      one of these texts, one of which may be empty; its value is the index, its label "list0", "list1", ...
    {part:q,k}   the same with a label, which the first colon ends
    {name*}      one or more characters of any kind; once per pattern at most

A capture written twice must be written alike and stands for the same value: ``layers.{i}.x.{i}``. Numbers may come with arithmetic,
which is for who uses the pattern to do (here the number is what stands in the name), before the digits or the prefix, if any:

    {i+n}        the number i + n, so that i counts from 0 where names count from n; {i-n} likewise
    {i=n}        the number n; it stands for nothing that counts
    {r=*:02}     any number: all names hold the same tensor
    {r//k:02}    any number r; k names that follow each other hold the same tensor
"""

from __future__ import annotations

import difflib
import fnmatch
import heapq
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from typing import Literal, NamedTuple

from streamconv.errors import NotationError, RecipeError
from streamconv.notation import expressions

__all__ = ["Capture", "Matcher", "Pattern", "Values", "natural_key", "nearest", "overlap", "parse"]

Values = dict[str, int | str]
_Atoms = tuple["str | Capture", ...]

_TOKEN = re.compile(r"[^{}]+|(?P<brace>\{\{|\}\})|\{(?P<body>[^{}]*)\}")
_BODY = re.compile(
    r"(?:(?P<label>[^,:]*):)?(?P<list>[^,]*,.*)"
    r"|(?P<name>[^,:?*=+/-]*)(?:(?P<operator>[+=-]|//)(?P<operand>[^,:?]+))?"
    r"(?:(?P<rest>\*)|\?(?P<prefix>.*)|:0(?P<width>[1-9]|1[0-7]))?",
    re.DOTALL,
)
_DIGITS = "0123456789"
_NO_DIGITS = dict.fromkeys(map(ord, _DIGITS))
_MAX_DIGITS = 18
MOST_CAPTURES = 32  # in a pattern
LONGEST = 8192  # characters of a pattern


@dataclass(frozen=True)
class Capture:
    """A variable part of a pattern; ``prefix`` is a text where the number is optional.

    ``operator`` and ``operand`` are a number's arithmetic: "+", "-", "//" or "=" and an expression, "=" and "*", or both empty.
    """

    name: str
    kind: Literal["int", "list", "rest"]
    alternatives: tuple[str, ...] = ()
    width: int = 1
    prefix: str | None = None
    operator: str = ""
    operand: str = ""

    @property
    def expression(self) -> str:
        """The regular expression of its texts; each text belongs to one value, each value has one text."""
        if self.kind == "rest":
            return ".+"
        if self.kind == "list":
            return "|".join(map(re.escape, self.alternatives))
        if self.prefix is not None:
            return f"(?:{re.escape(self.prefix)}[1-9][0-9]{{0,{_MAX_DIGITS - 1}}})?"
        return f"[1-9][0-9]{{{self.width},{_MAX_DIGITS - 1}}}|[0-9]{{{self.width}}}"

    def decode(self, text: str) -> int | str:
        """The value of a text that ``expression`` matches."""
        if self.kind == "int":
            return int(text[len(self.prefix or "") :] or 0)
        return text if self.kind == "rest" else self.alternatives.index(text)

    def encode(self, value: int | str) -> str:
        """The text of a value."""
        if self.kind == "rest" and isinstance(value, str) and value:
            return value
        limit = len(self.alternatives) if self.kind == "list" else 10**_MAX_DIGITS
        if self.kind == "rest" or not isinstance(value, int) or not 0 <= value < limit:
            expected = "a text that is not empty" if self.kind == "rest" else f"a whole number from 0 to {limit - 1}"
            raise RecipeError(f"{self.name!r} in a name: expected {expected}, found {value!r}")
        if self.kind == "list":
            return self.alternatives[value]
        if self.prefix is None:
            return f"{value:0{self.width}d}"
        return f"{self.prefix}{value:d}" if value else ""


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; ``captures`` are distinct, in order of first appearance."""

    text: str
    captures: tuple[Capture, ...]
    atoms: _Atoms = field(repr=False, compare=False)
    regex: re.Pattern[str] = field(repr=False, compare=False)

    def match(self, name: str) -> Values | None:
        """The values that make this name (the same ones every time where several would), or None."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        return {capture.name: capture.decode(text) for capture, text in zip(self.captures, match.groups(), strict=True)}

    def format(self, values: Mapping[str, int | str]) -> str:
        """The name that these values make; values of other captures are ignored."""
        missing = [capture.name for capture in self.captures if capture.name not in values]
        if missing:
            raise RecipeError(f"{self.text!r} needs a value for {', '.join(missing)}; given: {', '.join(values) or 'none'}")
        return "".join(atom if isinstance(atom, str) else atom.encode(values[atom.name]) for atom in self.atoms)

    @cached_property
    def automaton(self) -> tuple[list[list[tuple[str, int]]], set[int]]:
        """A finite automaton of the names, and more: repeats may differ. Per state (characters or "" for any, next state); final states."""
        steps: list[list[tuple[str, int]]] = [[]]

        def extend(states: set[int], labels: Iterable[str], loop: str | None = None) -> set[int]:
            for label in labels:
                steps.append([])
                for state in states:
                    steps[state].append((label, len(steps) - 1))
                states = {len(steps) - 1}
            if loop is not None:
                steps[-1].append((loop, len(steps) - 1))
            return states

        states = {0}
        for atom in self.atoms:
            if isinstance(atom, str):
                states = extend(states, atom)
            elif atom.kind == "rest":
                states = extend(states, [""], loop="")
            elif atom.kind == "list":
                states = set().union(*[extend(states, alternative) for alternative in atom.alternatives])
            elif atom.prefix is not None:
                states = states | extend(states, [*atom.prefix, _DIGITS[1:]], loop=_DIGITS)
            else:
                exactly = [_DIGITS] * atom.width
                states = extend(states, exactly) | extend(states, [_DIGITS[1:], *exactly], loop=_DIGITS)
        return steps, states


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Parse a pattern; NotationError points at the character that does not fit."""
    if not text:
        raise NotationError("a pattern cannot be empty", text, 0)
    if len(text) > LONGEST:
        raise NotationError(f"a pattern of {len(text)} characters, {LONGEST} at most", text, LONGEST)
    atoms: list[str | Capture] = []
    captures: dict[str, Capture] = {}
    expression, at, lists = "", 0, 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise NotationError("'{' is not closed" if text[at] == "{" else "'}' without '{' (a literal brace is '}}')", text, at)
        if token["body"] is None:
            atoms.append(token[0][: 1 if token["brace"] else None])
            expression += re.escape(str(atoms[-1]))
        else:
            capture = _capture(text, at + 1, token["body"], f"list{lists}")
            lists += capture.name == f"list{lists}"
            if capture.kind == "rest" and any(other.kind == "rest" for other in captures.values()):
                raise NotationError("a second '*' capture: a pattern has one at most", text, at)
            if len(captures) >= MOST_CAPTURES and capture.name not in captures:
                raise NotationError(f"a pattern has at most {MOST_CAPTURES} captures", text, at)
            if captures.setdefault(capture.name, capture) != capture:
                raise NotationError(f"{capture.name!r} was written differently before", text, at)
            expression += f"(?P={capture.name})" if capture in atoms else f"(?P<{capture.name}>{capture.expression})"
            atoms.append(capture)
        at = token.end()
    return Pattern(text, tuple(captures.values()), tuple(atoms), re.compile(expression, re.DOTALL))


def _capture(text: str, at: int, body: str, automatic: str) -> Capture:
    """What stands between braces from text[at] on; a list without a label is called ``automatic``."""
    form = _BODY.fullmatch(body)
    if form is None:
        raise NotationError("expected the like of {i}, {i:02}, {i?_}, {i+1}, {name*}, {a,b} or {label:a,b}", text, at)
    name = form["name"] if form["list"] is None else form["label"]
    if name is not None and not re.fullmatch(r"(?!list[0-9]+\Z)[A-Za-z_][A-Za-z0-9_]*", name):
        problem = "is kept for lists without a label" if name.isidentifier() and name.isascii() else "is no identifier"
        raise NotationError(f"{name!r} {problem}" if name else "a name is missing", text, at)
    if form["list"] is None:
        kind: Literal["int", "rest"] = "rest" if form["rest"] else "int"
        operator, operand = form["operator"] or "", form["operand"] or ""
        _check_operand(text, at + form.start("operand"), operator, operand)
        return Capture(name, kind, width=int(form["width"] or 1), prefix=form["prefix"], operator=operator, operand=operand)
    alternatives = form["list"].split(",")
    at += form.start("list")
    for n, alternative in enumerate(alternatives):
        if alternative in alternatives[:n]:
            raise NotationError(f"{alternative!r} a second time in one list" if any(alternatives) else "an empty list", text, at)
        at += len(alternative) + 1
    return Capture(name or automatic, "list", tuple(alternatives))


def _check_operand(text: str, at: int, operator: str, operand: str) -> None:
    """Raises NotationError where a number's arithmetic cannot be done."""
    if operator == "//" and not re.fullmatch(r"\w+", operand):
        raise NotationError(f"{operand!r} after // is no name and no number", text, at)
    if not operator or (operator, operand) == ("=", "*"):
        return
    try:
        expressions.check(operand)
    except NotationError as error:
        raise NotationError(f"{operand!r} after {operator} is not an expression", text, at + error.position) from None


class _State(NamedTuple):
    """Places (pattern, state of its automaton) that a name's beginning leads to, and where what was met so far led from here."""

    places: frozenset[tuple[int, int]]
    ends: list[int]
    by_char: dict[str, _State]
    by_segment: dict[str, _State]


class Matcher:
    """Many patterns at once: their automata walk together, remember where each segment between dots led, and leave few to be asked."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = tuple(patterns)
        self._automata = [pattern.automaton for pattern in self.patterns]
        self._states: dict[frozenset[tuple[int, int]], _State] = {}
        first = self._state(frozenset((k, 0) for k in range(len(self.patterns))))
        self._start = _State(frozenset(), [], {".": first}, {})  # as if names began with a dot

    def match(self, name: str) -> list[tuple[int, Values]]:
        """As ``[(k, p.match(name)) for k, p in enumerate(patterns)]`` without the Nones."""
        state = self._start
        for segment in name.split("."):
            state = state.by_segment.get(segment) or self._walk(state, segment)
            if not state.places:
                return []
        matches = [(k, self.patterns[k].match(name)) for k in state.ends]
        return [(k, values) for k, values in matches if values is not None]

    def _walk(self, state: _State, segment: str) -> _State:
        target = state
        for char in "." + segment:
            if char not in target.by_char:
                places = set()
                for k, at in target.places:
                    steps = self._automata[k][0][at]
                    places |= {(k, end) for label, end in steps if not label or char in label}
                target.by_char[char] = self._state(frozenset(places))
            target = target.by_char[char]
        return state.by_segment.setdefault(segment, target)

    def _state(self, places: frozenset[tuple[int, int]]) -> _State:
        if places not in self._states:
            self._states[places] = _State(places, sorted({k for k, at in places if at in self._automata[k][1]}), {}, {})
        return self._states[places]


def overlap(a: Pattern, b: Pattern) -> str | None:
    """A name that both match, or None; where a capture is written twice the search is bounded, and may miss names, not invent them."""
    last, other = a.atoms[-1], b.atoms[-1]
    if isinstance(last, str) and isinstance(other, str) and not last.endswith(other) and not other.endswith(last):
        return None
    (a_steps, a_ends), (b_steps, b_ends) = a.automaton, b.automaton
    limit = 32 if "(?P=" in a.regex.pattern + b.regex.pattern else 1
    visits: Counter[tuple[int, int]] = Counter()
    queue = deque([(0, 0, "")])
    while queue:
        s, t, name = queue.popleft()
        if s in a_ends and t in b_ends and a.match(name) is not None and b.match(name) is not None:
            return name
        for (x, i), (y, j) in product(a_steps[s], b_steps[t]):
            char = _common_character(x, y)
            if char is not None and visits[i, j] < limit:
                visits[i, j] += 1
                queue.append((i, j, name + char))
    return None


def _common_character(a: str, b: str) -> str | None:
    """A character of both labels, each of which is one character, [0-9], [1-9] or "" for any; None if there is none."""
    if a in b:
        return (a or b or "x")[0]
    return (b or a)[0] if b in a else None


def select(pattern: str, names: Iterable[str]) -> list[str]:
    """Those names that a pattern or glob matches, or that have ``pattern`` in them if it is neither."""
    if "{" in pattern:
        matcher = parse(pattern)
        return [name for name in names if matcher.match(name) is not None]
    if any(mark in pattern for mark in "*?["):
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return [name for name in names if pattern in name]


def nearest(name: str, candidates: Iterable[str], n: int = 1) -> list[str]:
    """Up to n candidates that look like this name, best first; only those that share words, then numbers, are compared."""
    groups: dict[str, list[str]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.translate(_NO_DIGITS), []).append(candidate)
    words, numbers = set(re.findall("[A-Za-z]+", name)), set(re.findall("[0-9]+", name))

    def common_words(key: str) -> tuple[int, int]:
        return len(words.intersection(re.findall("[A-Za-z]+", key))), -abs(len(key) - len(name))

    def common_numbers(candidate: str) -> int:
        return len(numbers.intersection(re.findall("[0-9]+", candidate)))

    few: list[str] = []
    for key in heapq.nlargest(32, groups, common_words):
        few += heapq.nlargest(n + 3, groups[key], common_numbers)
    return difflib.get_close_matches(name[:400], [candidate for candidate in few if len(candidate) <= 400], n, cutoff=0.5)


def natural_key(name: str) -> tuple[object, ...]:
    """Sorts "x.10" after "x.2"."""
    return tuple((len(part), part) if k % 2 else part for k, part in enumerate(re.split("0*([0-9]+)", name))), name
