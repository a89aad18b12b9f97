"""A first draft of a recipe, from the names and shapes of two checkpoints.

Numbers in names are folded, shapes are matched exactly, names decide between equal shapes; what is left over is tried as parts of
a fused tensor, as a stack, or as a transpose. Shapes cannot show a permutation, so every draft is to be compared with a reference.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import chain, combinations, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

from streamconv.checkpoint.opening import open_checkpoint
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError, StreamconvError, UsageError
from streamconv.graph.node import Source
from streamconv.notation.names import natural_key
from streamconv.recipe import Recipe

SCHEMA = Path(__file__).with_name("recipe.schema.json")
Shape = tuple[int, ...]
_COUNTS = "ijklmnop"
_AXES = "abcdefgh"
_BUFFER = re.compile(r"inv_freq|rope\.freqs|rotary|position_ids|num_batches_tracked|masked_bias|attn\.bias$")
_NUMBER = re.compile(r"(?:(?<=[./])|^)(0|[1-9][0-9]*)(?=[./]|$)")
# Words of names that families have for the same thing.
_SAME = {
    "attention": "self_attn attn attention self attn_self", "mlp": "feed_forward ffn mlp ff", "q": "wq q_proj query q query_proj",
    "k": "wk k_proj key k key_proj", "v": "wv v_proj value v value_proj", "o": "wo o_proj o out_proj projection_layer dense proj c_proj",
    "gate": "w1 gate_proj gate", "down": "w2 down_proj down fc2", "up": "w3 up_proj up fc1",
    "first": "attention_norm input_layernorm norm1 ln_1 layernorm_before input_norm",
    "second": "ffn_norm post_attention_layernorm norm2 ln_2 layernorm_after",
    "embed": "tok_embeddings embed_tokens wte word_embeddings embed embedding embeddings", "head": "output lm_head head embed_out",
    "last": "norm ln_f final_layernorm final_norm", "qkv": "qkv qkv_proj query_key_value wqkv c_attn",
}  # fmt: skip
_CONCEPT: dict[str, str] = {}
for _concept, _words in _SAME.items():
    _CONCEPT.update(dict.fromkeys(_words.split(), _concept))


class Series(NamedTuple):
    """Tensors whose names differ in numbers only: the texts around the numbers, the values of each number, and the shape they share."""

    texts: tuple[str, ...]
    numbers: tuple[frozenset[int], ...]
    shape: Shape

    @property
    def captures(self) -> list[str]:
        """What its numbers are called in patterns."""
        return [*_COUNTS[: len(self.numbers)]]

    @property
    def pattern(self) -> str:
        """The pattern of the names."""
        first, *rest = (text.replace("{", "{{").replace("}", "}}") for text in self.texts)
        return first + "".join(f"{{{name}}}{text}" for name, text in zip(self.captures, rest, strict=True))

    @property
    def words(self) -> frozenset[str]:
        """The words of the names, those for the same thing as one."""
        words = re.split(r"[./]", ".".join(self.texts))
        return frozenset(_CONCEPT.get(word.lower(), word.lower()) for word in words if word not in ("", "weight"))


class _Row(NamedTuple):
    """A tensor: the texts around the numbers in its name, these numbers, and its shape."""

    texts: tuple[str, ...]
    numbers: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Line:
    """One fact of a draft, as YAML fields, and why it is a guess; ``certain`` if it is none."""

    fields: Mapping[str, Any]
    guess: str = ""
    active: bool = True


@dataclass
class Draft:
    """A recipe file's text, the numbers of the lines that are guesses, and why its inverse does not bring the source back, if so."""

    text: str
    guesses: dict[int, str] = field(default_factory=dict)
    rules: int = 0
    unmade: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    back: str = ""

    @property
    def account(self) -> str:
        """What is left to do, in a few lines."""
        lines = [f"{self.rules} rules, {len(self.guesses)} of them guessed"]
        lines += [f"  line {number}: {why}" for number, why in self.guesses.items()]
        lines += [f"  nothing makes {name}" for name in self.unmade] + [f"  nothing takes {name}" for name in self.unused]
        lines += [f"  no way back: {self.back}"] if self.back else []
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """What ``recipes --new --json`` prints."""
        guesses = [{"line": line, "why": why} for line, why in self.guesses.items()]
        return {
            "recipe": self.text,
            "rules": self.rules,
            "guesses": guesses,
            "unmade": self.unmade,
            "unused": self.unused,
            "no_way_back": self.back,
        }


def read_shapes(path: str) -> dict[str, Shape]:
    """Names and shapes of a checkpoint, or of a JSON file: ``{name: shape}``, or what ``inspect --json`` prints.

    Raises:
        StreamconvError: it is neither.
    """
    if not path.endswith(".json") or path.endswith(".index.json"):
        return {name: entry.shape for name, entry in open_checkpoint(path).items()}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = {row["name"]: row["shape"] for row in data["tensors"]} if isinstance(data.get("tensors"), list) else data
        return {str(name): tuple(map(int, shape)) for name, shape in rows.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give a checkpoint, or a JSON file of name -> shape") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: expected JSON of name -> shape ({str(error)[:100]}); 'inspect --json' prints one") from error


def fold(shapes: Mapping[str, Shape]) -> list[Series]:
    """Tensors by their names with the numbers folded, as far as all of a series have one shape and no number is missing.

    >>> from streamconv.diagnose.draft import fold
    >>> [(series.pattern, series.shape) for series in fold({"h.0.w": (4, 2), "h.1.w": (4, 2), "top": (2,)})]
    [('h.{i}.w', (4, 2)), ('top', (2,))]
    """
    groups: defaultdict[tuple[str, ...], list[_Row]] = defaultdict(list)
    for name, shape in shapes.items():
        pieces = _NUMBER.split(name)
        texts = tuple(pieces[::2])
        groups[texts].append(_Row(texts, tuple(map(int, pieces[1::2])), shape))
    folds = chain.from_iterable(map(_fold_rows, groups.values()))
    return sorted(folds, key=lambda series: natural_key(series.pattern))


def _fold_rows(rows: list[_Row]) -> Iterator[Series]:
    """The series of tensors whose names have the same texts."""
    numbers = tuple(map(frozenset, zip(*(row.numbers for row in rows), strict=True)))
    if len({row.shape for row in rows}) == 1 and math.prod(map(len, numbers)) == len(rows):
        yield Series(rows[0].texts, numbers, rows[0].shape)
        return
    divisions = [_divide(rows, place) for place in range(len(numbers))]
    for part in min(divisions, key=_count_shapes):
        yield from _fold_rows(part)


def _divide(rows: list[_Row], place: int) -> list[list[_Row]]:
    """Tensors by one number of their names, which becomes text."""
    parts: defaultdict[int, list[_Row]] = defaultdict(list)
    for texts, numbers, shape in rows:
        text = f"{texts[place]}{numbers[place]}{texts[place + 1]}"
        row = _Row((*texts[:place], text, *texts[place + 2 :]), numbers[:place] + numbers[place + 1 :], shape)
        parts[numbers[place]].append(row)
    return list(parts.values())


def _count_shapes(parts: list[list[_Row]]) -> tuple[int, int]:
    """How many shapes there are in all parts, and how many parts: the fewer, the more alike the tensors of each are."""
    shapes = [{row.shape for row in part} for part in parts]
    return sum(map(len, shapes)), len(parts)


def draft(source: Mapping[str, Shape], target: Mapping[str, Shape], name: str, about: str = "") -> Draft:
    """Drafts the recipe that makes ``target`` from ``source``.

    Raises:
        CoverageError: nothing of the one looks like anything of the other.
    """
    matching = _Matching(fold(source), fold(target))
    lines = matching.run()
    if not any(line.active for line in lines):
        raise CoverageError(f"{about or name}: no tensor of the one has a shape that anything of the other could be made from or into")
    result = _write(lines, name, about)
    result.unmade = [series.pattern for series in matching.targets]
    result.unused = [series.pattern for series in matching.sources if not _BUFFER.search(series.pattern)]
    import yaml

    recipe = Recipe.from_dict(yaml.safe_load(result.text), name)
    if not result.unused:
        result.back = _why_not_back(recipe, source, target)
    return result


def _why_not_back(recipe: Recipe, source: Mapping[str, Shape], target: Mapping[str, Shape]) -> str:
    """What keeps a draft's inverse from making the source's names and shapes of the target's; "": nothing."""
    entries = {name: Source(TensorSpec(DTYPES["float32"], shape), ()) for name, shape in target.items()}
    try:
        outputs = recipe.inverse(f"{recipe.name}-back").apply(entries).outputs
    except StreamconvError as error:
        return str(error)
    shapes = {name: node.spec.shape for name, node in outputs.items()}
    absent = [name for name, shape in source.items() if shapes.get(name) != shape and not _BUFFER.search(name)]
    if not absent:
        return ""
    more = f", nor are {len(absent) - 1} more" if len(absent) > 1 else ""
    return f"{absent[0]} is not made again{more}"


class _Matching:
    """What is still without a counterpart, and the lines so far, by the source's order."""

    def __init__(self, sources: list[Series], targets: list[Series]) -> None:
        self.all_sources = list(sources)
        self.sources, self.targets = sources, targets
        self.largest = _largest([*sources, *targets])
        self.lines: list[tuple[int, Line]] = []
        self.partners: dict[Series, Series] = {}

    def run(self) -> list[Line]:
        """The lines of a draft: of series as they are, of parts and wholes, of other shapes, of ties, and of what is left over."""
        self._match_equal_shapes()
        for backward in (False, True):
            for parts, whole, line in self._joins(backward=backward):
                sources, targets = ([whole], parts) if backward else (parts, [whole])
                if set(sources) <= set(self.sources) and set(targets) <= set(self.targets):
                    self._add(sources, targets, line)
        self._match_other_shapes()
        ties = list(self._ties())
        for series in self.sources:
            is_buffer = _BUFFER.search(series.pattern) is not None
            fields = {"drop": series.pattern, "reason": "the model computes it" if is_buffer else "say why it is not needed"}
            line = Line(fields, "looks like a buffer" if is_buffer else "", active=is_buffer)
            self.lines.append((self.all_sources.index(series), line))
        return [line for _, line in sorted(self.lines, key=lambda entry: entry[0])] + ties

    def _add(self, sources: Sequence[Series], targets: Sequence[Series], line: Line) -> None:
        """Adds the line that makes these targets from these sources, which then have a counterpart."""
        each = min((series.numbers for series in (*sources, *targets)), key=len)
        if any(len(numbers) <= self.largest[place] for place, numbers in enumerate(each)):
            line = replace(line, fields={**line.fields, "sparse": True})
        self.lines.append((min(map(self.all_sources.index, sources)), line))
        self.sources = [series for series in self.sources if series not in sources]
        self.targets = [series for series in self.targets if series not in targets]
        if len(sources) == len(targets) == 1:
            self.partners[sources[0]] = targets[0]

    def _match_equal_shapes(self) -> None:
        """The same shape and the same numbers, by the likeness of names where there are several."""
        sources_of: defaultdict[tuple[Any, ...], list[Series]] = defaultdict(list)
        targets_of: defaultdict[tuple[Any, ...], list[Series]] = defaultdict(list)
        for series in self.sources:
            sources_of[series.numbers, series.shape].append(series)
        for series in self.targets:
            targets_of[series.numbers, series.shape].append(series)
        for kind, sources in sources_of.items():
            targets = targets_of[kind]
            for a, b, sure in _pairs(sources, targets):
                why = "" if sure else f"by name, among {max(len(sources), len(targets))} of shape {list(a.shape)}"
                self._add([a], [b], Line({"rule": a.pattern, "right": b.pattern}, why))

    def _joins(self, *, backward: bool) -> Iterator[tuple[list[Series], Series, Line]]:
        """Wholes that parts fuse or stack to, the likeliest parts first; ``backward``: the wholes are on the source's side."""
        all_parts, wholes = (self.targets, self.sources) if backward else (self.sources, self.targets)
        for whole in list(wholes):
            count = len(whole.numbers)
            groups: defaultdict[tuple[frozenset[int], ...], list[Series]] = defaultdict(list)
            for part in all_parts:
                if part.shape and part.numbers[:count] == whole.numbers and len(part.numbers) - count in (0, 1):
                    groups[part.numbers].append(part)
            for numbers, group in groups.items():
                near = sorted(group, key=lambda part: -_score(part, whole))[:8]
                stack = {_COUNTS[count]: len(numbers[count])} if len(numbers) > count else {}
                sizes = range(1 if stack else 2, 5)
                for combination in chain.from_iterable(combinations(near, size) for size in sizes):
                    parts = sorted(combination, key=_usual_order)
                    layout = _join_layout([part.shape for part in parts], whole.shape, stack)
                    pattern = _common_pattern(parts) if layout else None
                    if layout and pattern:
                        yield parts, whole, self._join(parts, pattern, whole, layout, backward=backward)

    def _join(self, parts: list[Series], pattern: str, whole: Series, layout: tuple[str, str], *, backward: bool) -> Line:
        """The line for parts, whose names have a ``pattern``, and the whole of them."""
        names = [pattern, whole.pattern]
        sides = list(layout)
        if backward:
            names.reverse()
            sides.reverse()
        fields: dict[str, Any] = {"rule": names[0], "right": names[1], "layout": " -> ".join(sides)}
        if len(parts) > 1:  # which the way back, or this one, cannot tell from shapes
            fields["dims"] = {_AXES[k]: part.shape[0] for k, part in enumerate(parts)}
        how = ["stacked"] * (len(parts[0].numbers) > len(whole.numbers))
        how += ["fused in this order, not interleaved"] if len(parts) > 1 else []
        return Line(fields, f"by shape; {' and '.join(how)}")

    def _match_other_shapes(self) -> None:
        """One tensor each, with axes in another order, or of size 1 gone."""
        for a in list(self.sources):
            candidates = [b for b in self.targets if b.numbers == a.numbers and _move_layout(a.shape, b.shape)]
            if candidates:
                b = max(candidates, key=lambda target: _score(a, target))
                fields = {"rule": a.pattern, "right": b.pattern, "layout": _move_layout(a.shape, b.shape)}
                self._add([a], [b], Line(fields, "by shape; axes moved"))

    def _ties(self) -> Iterator[Line]:
        """Targets that have the shape of an embedding that is used already, and the like of sources."""
        embeddings = [(a, b) for a, b in self.partners.items() if not a.numbers and len(a.shape) == 2 and "embed" in a.words | b.words]
        for head in [b for b in self.targets if "head" in b.words]:
            for a, b in embeddings:
                if a.shape == head.shape:
                    self.targets.remove(head)
                    fields = {"tie": a.pattern, "stored": b.pattern, "right": head.pattern}
                    yield Line(fields, "the head repeats the embedding; add when: tie_word_embeddings if it need not")
                    break


def _largest(folds: Iterable[Series]) -> dict[int, int]:
    """The largest number that a capture has anywhere, by its place in a name."""
    largest: dict[int, int] = {}
    for series in folds:
        for place, numbers in enumerate(series.numbers):
            largest[place] = max(largest.get(place, 0), *numbers)
    return largest


def _usual_order(part: Series) -> tuple[int, Any]:
    """What sorts the parts of a fused tensor as most families have them."""
    usual = ("q", "k", "v", "gate", "up")
    return min((usual.index(word) for word in part.words if word in usual), default=len(usual)), natural_key(part.pattern)


def _score(a: Series, b: Series) -> float:
    """How alike two names are, from 0 to 2."""
    common = len(a.words & b.words) / max(1, len(a.words | b.words))
    return common + SequenceMatcher(None, a.pattern, b.pattern, autojunk=False).ratio()


def _pairs(sources: list[Series], targets: list[Series]) -> Iterator[tuple[Series, Series, bool]]:
    """Pairs in the order of their likeness, and whether there was no other choice, or none as good for either."""
    candidates = [(_score(a, b), -k, a, b) for a, (k, b) in product(sources, enumerate(targets))]
    candidates.sort(key=lambda row: row[:2], reverse=True)
    partners: set[Series] = set()
    alone = len(sources) == len(targets) == 1
    for score, _, a, b in candidates:
        if a in partners or b in partners or (len(sources) != len(targets) and not a.words & b.words):
            continue
        same = a.texts == b.texts
        partners |= {a, b}
        yield a, b, alone or same or score >= 2


def _common_pattern(parts: Sequence[Series]) -> str | None:
    """One pattern for several names: what they share around a list of what they do not; None where that holds a number."""
    patterns = [part.pattern for part in parts]
    if len(patterns) == 1:
        return patterns[0]
    pieces = [re.split(r"(?<=[._/])|(?=[._/])", pattern) for pattern in patterns]
    first = _count_common(pieces)
    rest = [list(reversed(piece[first:])) for piece in pieces]
    last = _count_common(rest)
    middles = ["".join(reversed(piece[last:])) for piece in rest]
    if any(set("{},:*?") & set(middle) for middle in middles) or len(set(middles)) < len(middles):
        return None
    return "".join(pieces[0][:first]) + "{" + ",".join(middles) + "}" + "".join(reversed(rest[0][:last]))


def _count_common(rows: Iterable[Sequence[str]]) -> int:
    """How many items all rows begin with."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _join_layout(parts: Sequence[Shape], whole: Shape, stack: Mapping[str, int]) -> tuple[str, str] | None:
    """The layouts of tensors, and of what they become along their first axis, stacked along the axis ``stack``, axes perhaps moved."""
    tail = parts[0][1:]
    if any(shape[1:] != tail for shape in parts) or len(whole) != len(parts[0]) + len(stack) or len(whole) > 4:
        return None
    own = _AXES[: len(parts)]
    first = own if len(parts) == 1 else f"({' + '.join(own)})"
    axes = {first: sum(shape[0] for shape in parts), **dict(zip("efg", tail, strict=False))}
    rest = list(axes)[1:]
    for order in permutations(axes) if stack else [tuple(axes)]:
        if (*stack.values(), *(axes[axis] for axis in order)) == whole:
            inputs = [" ".join([*stack, axis, *rest]) for axis in own]
            return ", ".join(inputs), " ".join([*stack, *order])
    return None


def _move_layout(source: Shape, target: Shape) -> str | None:
    """The layout of a transpose, or of axes of size 1 that come or go."""
    if sorted(source) == sorted(target) and source != target and len(source) <= 4:
        for order in permutations(range(len(source))):
            if tuple(source[k] for k in order) == target:
                return f"{' '.join(_AXES[: len(source)])} -> {' '.join(_AXES[k] for k in order)}"
    real = [size for size in source if size != 1]
    if real and real == [size for size in target if size != 1] and source != target:
        sides = []
        for shape in (source, target):
            names = iter(_AXES)
            sides.append(" ".join("1" if size == 1 else next(names) for size in shape))
        return " -> ".join(sides)
    return None


def _write(lines: Sequence[Line], name: str, about: str) -> Draft:
    """The file's text."""
    result = Draft("")
    head = [
        f"# yaml-language-server: $schema={SCHEMA}",
        *([f"# drafted from {about}"] if about else []),
        "# Shapes cannot show a permutation (rotary q and k, interleaved heads): compare the result with a reference.",
        f"name: {json.dumps(name, ensure_ascii=False)}",
        'summary: ""',
        "rules:",
    ]
    rows = list(head)
    for line in lines:
        for k, (key, value) in enumerate(line.fields.items()):
            row = f"{'- ' if k == 0 else '  '}{key}: {json.dumps(value, ensure_ascii=False)}"
            if k == 0 and line.active:
                result.rules += 1
                if line.guess:
                    result.guesses[len(rows) + 1] = line.guess
                    row += f"  # guessed: {line.guess}"
            rows.append(f"  {row}" if line.active else f"  # {row}")
    result.text = "\n".join(rows) + "\n"
    return result
