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
from itertools import chain, combinations, permutations
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
_CONCEPT = {word: concept for concept, words in _SAME.items() for word in words.split()}


class Folded(NamedTuple):
    """Tensors whose names differ in numbers only: the texts between the numbers, the values of each number, and the shape they share."""

    parts: tuple[str, ...]
    numbers: tuple[frozenset[int], ...]
    shape: Shape

    def pattern(self, captures: Sequence[str]) -> str:
        """The pattern of the names."""
        texts = [part.replace("{", "{{").replace("}", "}}") for part in self.parts]
        return texts[0] + "".join(f"{{{name}}}{text}" for name, text in zip(captures, texts[1:], strict=True))

    @property
    def words(self) -> frozenset[str]:
        pieces = [piece for part in self.parts for piece in re.split(r"[./]", part) if piece]
        return frozenset(_CONCEPT.get(piece.lower(), piece.lower()) for piece in pieces if piece != "weight")


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
        return {str(name): tuple(int(size) for size in shape) for name, shape in rows.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give a checkpoint, or a JSON file of name -> shape") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: expected JSON of name -> shape ({str(error)[:100]}); 'inspect --json' prints one") from error


def fold(shapes: Mapping[str, Shape]) -> list[Folded]:
    """Names with their numbers folded, as far as all tensors folded together have one shape and no number is missing."""
    folds: list[Folded] = []

    def add(rows: list[tuple[tuple[str, ...], tuple[int, ...], Shape]]) -> None:
        numbers = tuple(frozenset(values) for values in zip(*(row[1] for row in rows), strict=True))
        if len({row[2] for row in rows}) == 1 and math.prod(map(len, numbers)) == len(rows):
            folds.append(Folded(rows[0][0], numbers, rows[0][2]))
            return
        tries = []
        for place in range(len(numbers)):  # keep the number whose parts are most alike
            parts = defaultdict(list)
            for texts, own, shape in rows:
                joined = (*texts[:place], f"{texts[place]}{own[place]}{texts[place + 1]}", *texts[place + 2 :])
                parts[own[place]].append((joined, own[:place] + own[place + 1 :], shape))
            tries.append((sum(len({row[2] for row in part}) for part in parts.values()), len(parts), place, parts))
        *_, fewest_shapes = min(tries, key=lambda entry: entry[:3])
        for part in fewest_shapes.values():
            add(part)

    groups: defaultdict[tuple[str, ...], list[tuple[tuple[str, ...], tuple[int, ...], Shape]]] = defaultdict(list)
    for name, shape in shapes.items():
        pieces = _NUMBER.split(name)
        groups[tuple(pieces[::2])].append((tuple(pieces[::2]), tuple(map(int, pieces[1::2])), shape))
    for group in groups.values():
        add(group)
    return sorted(folds, key=lambda folded: natural_key(_named(folded)))


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
    result.unmade = [_named(folded) for folded in matching.targets]
    result.unused = [_named(folded) for folded in matching.sources if not _BUFFER.search(_named(folded))]
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
    unmade = [name for name, shape in source.items() if shapes.get(name) != shape and not _BUFFER.search(name)]
    return f"{unmade[0]} is not made again{f', nor are {len(unmade) - 1} more' if unmade[1:] else ''}" if unmade else ""


def _named(folded: Folded) -> str:
    return folded.pattern(_captures(folded.numbers))


def _captures(numbers: Sequence[frozenset[int]]) -> list[str]:
    return [*_COUNTS[: len(numbers)]]


class _Matching:
    """What is still without a counterpart, and the lines found so far, by the source's order."""

    def __init__(self, sources: list[Folded], targets: list[Folded]) -> None:
        self.all_sources = list(sources)
        self.sources, self.targets = sources, targets
        self.largest = _largest([*sources, *targets])
        self.lines: list[tuple[int, Line]] = []
        self.partners: dict[Folded, Folded] = {}

    def run(self) -> list[Line]:
        self._one_to_one()
        for flipped in (False, True):
            for parts, whole, line in self._joins(flipped=flipped):
                sources, targets = ([whole], parts) if flipped else (parts, [whole])
                if set(sources) <= set(self.sources) and set(targets) <= set(self.targets):
                    self._add(sources, targets, line)
        self._reshaped()
        ties = list(self._ties())
        for folded in self.sources:
            reason = {"reason": "the model computes it" if _BUFFER.search(_named(folded)) else "say why it is not needed"}
            why = "looks like a buffer" if _BUFFER.search(_named(folded)) else ""
            self.lines.append((self.all_sources.index(folded), Line({"drop": _named(folded), **reason}, why, active=bool(why))))
        return [line for _, line in sorted(self.lines, key=lambda entry: entry[0])] + ties

    def _add(self, sources: Sequence[Folded], targets: Sequence[Folded], line: Line) -> None:
        each = min((folded.numbers for folded in (*sources, *targets)), key=len)
        if any(len(numbers) <= self.largest[place] for place, numbers in enumerate(each)):
            line = replace(line, fields={**line.fields, "sparse": True})
        self.lines.append((min(map(self.all_sources.index, sources)), line))
        self.sources = [folded for folded in self.sources if folded not in sources]
        self.targets = [folded for folded in self.targets if folded not in targets]
        if len(sources) == len(targets) == 1:
            self.partners[sources[0]] = targets[0]

    def _one_to_one(self) -> None:
        """The same shape and the same numbers, by the likeness of names where there are several."""
        kinds: defaultdict[tuple[Any, ...], tuple[list[Folded], list[Folded]]] = defaultdict(lambda: ([], []))
        for side, folded in enumerate((self.sources, self.targets)):
            for one in folded:
                kinds[one.numbers, one.shape][side].append(one)
        for sources, targets in kinds.values():
            for a, b, sure in _pairs(sources, targets):
                names = _captures(a.numbers)
                why = "" if sure else f"by name, among {max(len(sources), len(targets))} of shape {list(a.shape)}"
                self._add([a], [b], Line({"rule": a.pattern(names), "right": b.pattern(names)}, why))

    def _joins(self, *, flipped: bool) -> Iterator[tuple[list[Folded], Folded, Line]]:
        """Wholes that parts fuse or stack to, the likeliest parts first; ``flipped``: the wholes are on the source's side."""
        sides = (self.targets, self.sources) if flipped else (self.sources, self.targets)
        for whole in list(sides[1]):
            count = len(whole.numbers)
            groups: defaultdict[tuple[frozenset[int], ...], list[Folded]] = defaultdict(list)
            for part in sides[0]:
                if part.shape and part.numbers[:count] == whole.numbers and len(part.numbers) - count in (0, 1):
                    groups[part.numbers].append(part)
            for numbers, group in groups.items():
                near = sorted(group, key=lambda part: -_score(part, whole))[:8]
                stack = {_COUNTS[count]: len(numbers[count])} if len(numbers) > count else {}
                sizes = range(1 if stack else 2, 5)
                for combination in chain.from_iterable(combinations(near, size) for size in sizes):
                    parts = sorted(combination, key=_usual_order)
                    layout = _joined([part.shape for part in parts], whole.shape, stack)
                    pattern = _listed(parts, _captures(numbers)) if layout else None
                    if layout and pattern:
                        yield parts, whole, self._join(parts, pattern, whole, layout, flipped=flipped)

    def _join(self, parts: list[Folded], pattern: str, whole: Folded, layout: tuple[str, str], *, flipped: bool) -> Line:
        other = whole.pattern(_captures(whole.numbers))
        names, layouts = ((other, pattern), layout[::-1]) if flipped else ((pattern, other), layout)
        fields: dict[str, Any] = {"rule": names[0], "right": names[1], "layout": " -> ".join(layouts)}
        if len(parts) > 1:  # which the way back, or this one, cannot tell from shapes
            fields["dims"] = {_AXES[k]: part.shape[0] for k, part in enumerate(parts)}
        how = ["stacked"] * (len(parts[0].numbers) > len(whole.numbers))
        how += ["fused in this order, not interleaved"] if len(parts) > 1 else []
        return Line(fields, f"by shape; {' and '.join(how)}")

    def _reshaped(self) -> None:
        """One tensor each, with axes in another order, or of size 1 gone."""
        for a in list(self.sources):
            fitting = [b for b in self.targets if b.numbers == a.numbers and _moved(a.shape, b.shape)]
            if fitting:
                b = max(fitting, key=lambda target: _score(a, target))
                layout, names = _moved(a.shape, b.shape), _captures(a.numbers)
                why = "by shape; axes moved"
                self._add([a], [b], Line({"rule": a.pattern(names), "right": b.pattern(names), "layout": layout}, why))

    def _ties(self) -> Iterator[Line]:
        """Targets that have the shape of an embedding that is used already, and the like of sources."""
        embeddings = [(a, b) for a, b in self.partners.items() if not a.numbers and len(a.shape) == 2 and "embed" in a.words | b.words]
        for head in [b for b in self.targets if "head" in b.words]:
            for a, b in embeddings:
                if a.shape == head.shape:
                    self.targets.remove(head)
                    fields = {"tie": _named(a), "stored": _named(b), "right": _named(head)}
                    yield Line(fields, "the head repeats the embedding; add when: tie_word_embeddings if it need not")
                    break


def _largest(folds: Iterable[Folded]) -> dict[int, int]:
    """The largest number that a capture has anywhere, by its place in a name."""
    largest: dict[int, int] = {}
    for folded in folds:
        for place, numbers in enumerate(folded.numbers):
            largest[place] = max(largest.get(place, 0), *numbers)
    return largest


def _usual_order(part: Folded) -> tuple[int, Any]:
    usual = ("q", "k", "v", "gate", "up")
    return min((usual.index(word) for word in part.words if word in usual), default=len(usual)), natural_key(_named(part))


def _score(a: Folded, b: Folded) -> float:
    """How alike two names are, from 0 to 2."""
    shared = len(a.words & b.words) / max(1, len(a.words | b.words))
    return shared + SequenceMatcher(None, _named(a), _named(b), autojunk=False).ratio()


def _pairs(sources: list[Folded], targets: list[Folded]) -> Iterator[tuple[Folded, Folded, bool]]:
    """Pairs in the order of their likeness, and whether there was no other choice, or none as good for either."""
    candidates = ((_score(a, b), -k, a, b) for a in sources for k, b in enumerate(targets))
    scores = sorted(candidates, key=lambda row: row[:2], reverse=True)
    paired: set[Folded] = set()
    alone = len(sources) == len(targets) == 1
    for score, _, a, b in scores:
        if a in paired or b in paired or (len(sources) != len(targets) and not a.words & b.words):
            continue
        same = a.parts == b.parts
        paired |= {a, b}
        yield a, b, alone or same or score >= 2


def _listed(parts: Sequence[Folded], captures: Sequence[str]) -> str | None:
    """One pattern for several names: what they share around a list of what they do not; None where that holds a number."""
    patterns = [part.pattern(captures) for part in parts]
    if len(patterns) == 1:
        return patterns[0]
    pieces = [re.split(r"(?<=[._/])|(?=[._/])", pattern) for pattern in patterns]
    first = _shared(pieces)
    rest = [list(reversed(piece[first:])) for piece in pieces]
    last = _shared(rest)
    middles = ["".join(reversed(piece[last:])) for piece in rest]
    if any(set("{},:*?") & set(middle) for middle in middles) or len(set(middles)) < len(middles):
        return None
    return "".join(pieces[0][:first]) + "{" + ",".join(middles) + "}" + "".join(reversed(rest[0][:last]))


def _shared(rows: Iterable[Sequence[str]]) -> int:
    """How many items all rows begin with."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _joined(parts: Sequence[Shape], whole: Shape, stack: Mapping[str, int]) -> tuple[str, str] | None:
    """The layouts of tensors, and of what they become along their first axis, stacked along the axis ``stack``, axes perhaps moved."""
    tail = parts[0][1:]
    if any(shape[1:] != tail for shape in parts) or len(whole) != len(parts[0]) + len(stack) or len(whole) > 4:
        return None
    fused = " + ".join(_AXES[: len(parts)])
    axes = {fused if len(parts) == 1 else f"({fused})": sum(shape[0] for shape in parts), **dict(zip("efg", tail, strict=False))}
    for order in permutations(axes) if stack else [tuple(axes)]:
        if (*stack.values(), *(axes[axis] for axis in order)) == whole:
            inputs = [" ".join([*stack, axis, *list(axes)[1:]]) for axis in _AXES[: len(parts)]]
            return ", ".join(inputs), " ".join([*stack, *order])
    return None


def _moved(source: Shape, target: Shape) -> str | None:
    """The layout of a transpose, or of axes of size 1 that come or go."""
    if sorted(source) == sorted(target) and source != target and len(source) <= 4:
        order = next(order for order in permutations(range(len(source))) if tuple(source[k] for k in order) == target)
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
