"""What changed between two checkpoints, tensor by tensor: the result of `diff`, in words and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.changes.distance import Distance
from streamconv.notation.folding import fold, fold_names, kind_of
from streamconv.notebook import table
from streamconv.text import join_lines
from streamconv.units import format_size

WORST, SHOWN = 10, 30  # tensors that changed most, and lines of anything else, that people are told of

HEAD = ("kind", "tensors", "changed", "relative L2", "cosine", "at most", "most in a layer")
"""What a table of kinds has in its columns."""

STATES = {
    "equal": "equal",
    "unread": "of the same shape and dtype",
    "rounded": "rounded",
    "changed": "changed",
    "moved": "moved",
    "dtype": "of another dtype",
    "shape": "of another shape",
    "only_a": "only in A",
    "only_b": "only in B",
}
"""What may have become of a tensor, and how people are told of it."""


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that is not what it was.

    Attributes:
        name: in B; of one that only A has, in A.
        state: a key of `STATES`.
        a: dtype and shape in A.
        b: dtype and shape in B.
        source: the name in A of one that moved.
        distance: how far one is, that was read, from what it was.
    """

    name: str
    state: str
    a: str = ""
    b: str = ""
    source: str = ""
    distance: Distance | None = None

    def summary(self) -> dict[str, Any]:
        """What ``diff --json`` says of it."""
        row = {"name": self.name, "state": self.state}
        row |= {key: text for key, text in (("from", self.source), ("a", self.a), ("b", self.b)) if text}
        return row | (_summarize(self.distance) if self.distance else {})

    @property
    def spec(self) -> str:
        """Dtype and shape, and those that it had if they were others."""
        return self.a if self.a == self.b else " -> ".join(filter(None, (self.a, self.b)))


@dataclass(frozen=True)
class KeyDiff:
    """A key of config.json, dotted if it lies deeper, that has another value; None: it has none there, which JSON's null is, too."""

    key: str
    a: object
    b: object

    def __str__(self) -> str:
        if self.a is None or self.b is None:
            side, value = ("A", self.a) if self.b is None else ("B", self.b)
            return f"{self.key} only in {side}: {_shorten(value)}"
        return f"{self.key}: {_shorten(self.a)} -> {_shorten(self.b)}"


@dataclass
class Kind:
    """Tensors whose names differ in numbers of layers and experts only.

    Attributes:
        name: theirs, with ``*`` for these numbers.
        counts: how many are in which state, equal ones not counted.
        distance: of all that was read and is not equal.
        points: the first number of each of these, and how far it is from what it was, as a part of its norm.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    distance: Distance = field(default_factory=Distance)
    points: list[tuple[int, float]] = field(default_factory=list)

    @property
    def worst(self) -> tuple[int, float]:
        """The number of the one that changed most, and by how much."""
        return max(self.points, key=lambda point: point[1], default=(0, 0.0))

    def summary(self) -> dict[str, Any]:
        """What ``diff --json`` says of it."""
        row: dict[str, Any] = {"kind": self.name, "states": dict(self.counts)}
        return row | (_summarize(self.distance) | {"worst": list(self.worst)} if self.points else {})

    def cells(self) -> tuple[str, ...]:
        """A row of a table of kinds; see `HEAD`."""
        number, most = self.worst
        where = f"{most:.3g} in {number}" if len(self.points) > 1 else ""
        return (self.name, str(len(self.points)), *describe_columns(self.distance), where)


@dataclass
class Diff:
    """What changed from A to B.

    Attributes:
        tensors_a: how many tensors A has.
        tensors_b: how many B has.
        counts: how many tensors are in which state; see `STATES`.
        sizes: their bytes, in B if they are there.
        tensors: those that are not equal, in the order of A, then of B.
        elsewhere: how many equal ones are in a file of another name.
        config: keys of config.json with other values.
        headers: whether no tensor was read.
        notes: on other sources that went into A.
    """

    tensors_a: int = 0
    tensors_b: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    tensors: list[TensorDiff] = field(default_factory=list)
    elsewhere: int = 0
    config: list[KeyDiff] = field(default_factory=list)
    headers: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs, as far as was looked."""
        return not (self.tensors or self.config)

    @property
    def distance(self) -> Distance:
        """Of all tensors that changed or were rounded, from what they were."""
        return sum((row.distance for row in self._measured()), Distance())

    def kinds(self) -> list[Kind]:
        """Kinds of tensors, those that changed most first."""
        kinds: dict[str, Kind] = {}
        for row in self.tensors:
            name, number = kind_of(row.name)
            kind = kinds.setdefault(name, Kind(name))
            kind.counts[row.state] += 1
            if row.distance is not None:
                kind.distance += row.distance
                kind.points.append((number, row.distance.relative_l2 or 0.0))
        return sorted(kinds.values(), key=lambda kind: -kind.worst[1])

    def worst(self) -> list[Any]:
        """Those tensors of which numbers changed, the most first; such as were all zeros before them."""
        rows = [row for row in self._measured() if row.distance.changed]
        return sorted(rows, key=lambda row: (row.distance.relative_l2 is not None, -(row.distance.relative_l2 or 0.0)))

    def _measured(self) -> Iterator[Any]:
        return (row for row in self.tensors if row.distance is not None)

    def summary(self) -> dict[str, Any]:
        """What ``diff --json`` prints; docs/cookbook.md lists the keys."""
        return {
            "equal": self.equal,
            "headers": self.headers,
            "totals": {state: {"tensors": self.counts[state], "bytes": self.sizes[state]} for state in STATES if self.counts[state]},
            "elsewhere": self.elsewhere,
            "numbers": _summarize(self.distance),
            "config": [{"key": row.key, "a": _as_json(row.a), "b": _as_json(row.b)} for row in self.config],
            "kinds": [kind.summary() for kind in self.kinds()],
            "tensors": [row.summary() for row in self.tensors],
            **({"notes": self.notes} if self.notes else {}),
        }

    def __repr__(self) -> str:
        return f"<Diff of {self.tensors_a} tensors with {self.tensors_b}: {self._describe_counts()}>"

    def _repr_html_(self) -> str:
        title, *others = str(self).split("\n")
        return table(title, [], [(row,) for row in others])

    def _describe_counts(self) -> str:
        return ", ".join(f"{self.counts[state]} {text}" for state, text in STATES.items() if self.counts[state]) or "none"

    def lines(self) -> Iterator[str]:
        """In words: totals, what was moved, is missing or new, then kinds of tensors, and the worst."""
        verdict = "no differences" if self.equal else "different"
        scope = " by their headers" if self.headers else ""
        yield f"{self.tensors_a} tensors compared with {self.tensors_b}{scope}: {verdict}"
        for state, text in STATES.items():
            if not self.counts[state]:
                continue
            more = f", {self.elsewhere} of them in files of other names" if state == "equal" and self.elsewhere else ""
            more = f": {describe_distance(self._distance_of(state))}" if state in ("changed", "rounded") else more
            yield f"  {self.counts[state]} {text}, {format_size(self.sizes[state])}{more}"
        yield from _list("config.json", [str(row) for row in self.config])
        moved = [row for row in self.tensors if row.state == "moved"]
        yield from _list("moved", [" -> ".join(kind.texts) for kind in fold((None, (row.source, row.name)) for row in moved)])
        for state in ("shape", "dtype"):
            rows = [row for row in self.tensors if row.state == state]
            folds = fold(((row.a, row.b), (row.name,)) for row in rows)
            yield from _list(STATES[state], [f"{kind.texts[0]}: {rows[kind.members[0]].a} -> {rows[kind.members[0]].b}" for kind in folds])
        for state in ("only_a", "only_b"):
            yield from _list(STATES[state], fold_names([row.name for row in self.tensors if row.state == state]))
        kinds = [kind for kind in self.kinds() if kind.distance.changed]
        yield from _tabulate([HEAD, *(kind.cells() for kind in kinds)])
        worst = [(row.name, row.spec, *describe_columns(row.distance)) for row in self.worst()[:WORST]]
        yield from _tabulate([("most changed", "", *HEAD[2:-1]), *worst])
        yield from (f"note: {note}" for note in self.notes)

    def _distance_of(self, state: str) -> Distance:
        return sum((row.distance for row in self._measured() if row.state == state), Distance())

    def __str__(self) -> str:
        return join_lines(self.lines())


def diff_configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[KeyDiff]:
    """Keys whose values are not the same in two configs, in the order of the first."""
    left, right = dict(_flatten(a)), dict(_flatten(b))
    keys = [*left, *(key for key in right if key not in left)]
    pairs = [(key, left.get(key), right.get(key)) for key in keys]
    return [KeyDiff(key, ours, theirs) for key, ours, theirs in pairs if json.dumps(ours) != json.dumps(theirs)]


def _flatten(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield above + key, value


def _as_json(value: object) -> object:
    """A value as strict JSON has it: one with NaN or Infinity in it, which configs may hold, as its text."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(value)
    return value


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _list(title: str, texts: Iterable[str]) -> Iterator[str]:
    """A title, and lines below it."""
    lines = list(texts)
    if lines:
        yield f"{title}:"
        yield from (f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"  ... and {len(lines) - SHOWN} more"


def _summarize(distance: Distance) -> dict[str, Any]:
    if not distance.is_measured:
        return {"numbers": distance.numel}
    return {
        "numbers": distance.numel,
        "changed": distance.changed,
        "share": distance.share,
        "max_abs": distance.max_abs,
        "relative_l2": distance.relative_l2,
        "cosine": distance.cosine,
        "nonfinite": distance.nonfinite,
        **({"rounding": distance.rounding} if distance.rounding else {}),
    }


def describe_distance(distance: Distance) -> str:
    """How far numbers are from what they were, in words."""
    if not distance.is_measured:
        return "other bytes, which are no numbers by themselves"
    parts = [distance.rounding] if distance.rounding else []
    if distance.changed:
        share, relative, cosine, most = describe_columns(distance)
        parts += [f"{share} of the numbers", f"relative L2 {relative}", *([f"cosine {cosine}"] if cosine else []), f"at most {most}"]
    if distance.nonfinite:
        parts.append(f"{distance.nonfinite} not finite")
    return ", ".join(parts) or "the same numbers"


def describe_columns(distance: Distance) -> tuple[str, str, str, str]:
    """The share of the numbers that changed, relative L2, cosine, and the largest difference."""
    relative, cosine = distance.relative_l2, distance.cosine
    return (
        f"{100 * distance.share:.3g}%",
        ("unknown" if distance.squares_a else "of zeros") if relative is None else f"{relative:.3g}",
        "" if cosine is None else f"{cosine:.6f}",
        f"{distance.max_abs:.3g}",
    )


def _tabulate(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows below their head, in columns; nothing where there is only the head."""
    if len(rows) < 2:
        return
    shown = rows[: SHOWN + 1]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for number, row in enumerate(shown):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"{'  ' if number else ''}{cells[0]}{'' if number else '  '}  {'  '.join(cells[1:])}".rstrip()
    if len(rows) > len(shown):
        yield f"  ... and {len(rows) - len(shown)} more"
