"""What a recipe's ``op`` can do beyond layouts, by name. Each step turns the nodes of a rule's left tensors into one node.

add       value                             every value plus a number, in the tensor's dtype as torch adds; the way back subtracts it
scale     value                             every value times a number; the way back divides by it. ``inverse``: 1: these are the way back
rows      start, stop                       some rows of a tensor
pick      numbers                           the rows of these numbers, in their order, such as those of some experts
pad       rows                              zero rows at the end, up to ``rows``
grow      rows, first, seed, stream, like   new rows from ``first`` on, sampled like those of ``like``, or its own (see `ops.SampleRows`)
zeros     size, rows, dtype, like           made of nothing: zeros, with ``rows`` a matrix, in the dtype of the tensor ``like``
merge_lora  merge, alpha                    a weight and its low-rank matrices A, then B, each pair for the next rows (see `ops.MergeLora`)
same      tensor                            made of nothing: another tensor once more
dequantize  rows, columns                   a matrix of one-byte floats and the scales of its blocks (see `ops.Dequantize`); others stay
inv_freq  dim, base, like                   made of nothing: base^(-2j/dim) for j < dim/2, the frequencies of a rotary embedding, in the
                                            dtype of the tensor ``like``, else in float32
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, get_args

from msgspec import Meta

from streamconv import codec
from streamconv.dtypes import parse_dtype
from streamconv.errors import CoverageError, FormatError, RecipeError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Add, Cast, Dequantize, InvFreq, MergeLora, Rows, SampleRows, Scale, Zeros
from streamconv.graph.views import join_rows
from streamconv.notation import expressions
from streamconv.text import did_you_mean

Lookup = Mapping[str, AnyNode]
Count = Annotated[int, Meta(ge=0)]
"""Of rows, columns or elements."""
Factor = Annotated[float, Meta(description="other than 0")]

Numbers = Annotated[tuple[int, ...], Meta(min_length=1)]

_WORDS = {
    int: "expected a whole number",
    float: "expected a number",
    bool: "expected true or false",
    str: "expected a text",
    tuple[int, ...]: "expected a list of whole numbers",
}

Step = Callable[..., AnyNode]
"""Makes a node of a rule's, and of all tensors by name; what it takes of a recipe are its keyword arguments, by their types."""

_STEPS: dict[str, Step] = {}


def step(name: str) -> Callable[[Step], Step]:
    """Makes a function the step of that name, which recipes may then have.

    >>> @step("first")
    ... def first(nodes, entries, *, rows: int):
    ...     return take("rows", nodes, {"stop": rows}, entries)
    """

    def register(function: Step) -> Step:
        if _STEPS.setdefault(name, function) is not function:
            raise RecipeError(f"there is an op {name} already: give it another name")
        return function

    return register


_OWN: set[str] = set()
"""Names of steps that are somebody's own functions."""


def replaceable_step(name: str, function: Step) -> None:
    """Makes a function the step of that name, instead of an earlier one that was made so: a file may be run again.

    Raises:
        RecipeError: another step has the name.
    """
    if name in _STEPS and name not in _OWN:
        raise RecipeError(f"there is an op {name} already: give it another name")
    _OWN.add(name)
    _STEPS[name] = function
    _parameters.cache_clear()


def take(name: str, nodes: Sequence[AnyNode], parameters: Mapping[str, Any], entries: Lookup) -> AnyNode:
    """The node of step ``name`` on ``nodes``; ``entries`` are all tensors, for steps that look at another one.

    Raises:
        CoverageError: what is given does not fit the tensors, or is no value that the step takes.
    """
    kinds = _parameters(name)
    for key, value in parameters.items():
        if value is None:
            raise CoverageError(f"{name}: no value for {key}: give it with --set, or in config.json")
        fault = _find_fault(value, kinds[key].annotation)
        if fault:
            raise CoverageError(f"{name}: {key} is {value!r}: {fault}")
    return _STEPS[name](nodes, entries, **parameters)


def cast(node: AnyNode, dtype: str | None) -> AnyNode:
    """A node's values in a dtype; the node itself where that is its own, or None."""
    return apply(Cast(dtype), node) if dtype and dtype != node.spec.dtype.name else node


def describe(name: str, parameters: Mapping[str, Any]) -> str:
    """A step in words."""
    return " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])


def check(op: Mapping[str, Any], field: str = "op") -> None:
    """Raises RecipeError where a fact's ``op``, or what another field of it says, is no step with what that takes, of the right kind."""
    if not op:
        return
    name = op.get("op")
    if not isinstance(name, str) or name not in _STEPS:
        raise _error(f"op {name!r} is unknown{did_you_mean(str(name), _STEPS)}; known are {', '.join(_STEPS)}", field, "op")
    takes = _parameters(name)
    keys = [key for key in op if key != "op"]
    unknown = sorted(keys - takes.keys())
    if unknown:
        hint = did_you_mean(unknown[0], takes)
        raise _error(f"op {name} has no {unknown[0]!r}{hint}; it takes {', '.join(takes)}", field, unknown[0])
    absent = [key for key, parameter in takes.items() if parameter.default is parameter.empty and key not in keys]
    if absent:
        raise _error(f"op {name} needs {', '.join(absent)}", field)
    for key in keys:
        value = expressions.constant(op[key]) if isinstance(op[key], str) else op[key]
        fault = "" if value is None else _find_fault(value, takes[key].annotation)
        if fault:
            raise _error(f"op {name}: {key} is {op[key]!r}: {fault}", field, key)


def _error(message: str, *place: str) -> RecipeError:
    error = RecipeError(message)
    error.place = place
    return error


@cache
def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a step takes of a recipe, with their types."""
    signature = inspect.signature(_STEPS[name], eval_str=True)
    return {key: parameter for key, parameter in signature.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def _find_fault(value: Any, kind: Any) -> str:
    """What is wrong with a value that is to be of a kind, "": nothing."""
    words = _WORDS[get_args(kind)[0] if get_args(kind) else kind]
    if kind is Factor and value == 0:
        return f"{words} other than 0"
    if isinstance(value, float) and not math.isfinite(value):
        return words
    try:
        codec.convert(value, kind)
    except FormatError as error:
        return f"{words}; {error}" if isinstance(value, int) and get_args(kind) else words
    return ""


ARITHMETIC = ("add", "scale")


def undo(op: Mapping[str, Any]) -> dict[str, Any]:
    """The step that undoes arithmetic, up to rounding; nothing for others."""
    if op.get("op") not in ARITHMETIC:
        return {}
    if "inverse" in op:
        return {key: value for key, value in op.items() if key != "inverse"}
    return {**op, "inverse": 1}


def is_exact(op: Mapping[str, Any]) -> bool:
    """Whether arithmetic and its undoing give every value back: a factor that is a power of two does, unless values leave the range."""
    value = op.get("value")
    return op.get("op") == "scale" and isinstance(value, int | float) and abs(math.frexp(value)[0]) == 0.5


@step("add")
def _add(nodes: Sequence[AnyNode], _entries: Lookup, *, value: float, inverse: int = 0) -> AnyNode:
    (node,) = nodes
    return apply(Add(float(-value if inverse else value)), node)


@step("scale")
def _scale(nodes: Sequence[AnyNode], _entries: Lookup, *, value: Factor, inverse: int = 0) -> AnyNode:
    (node,) = nodes
    return apply(Scale(float(value), bool(inverse)), node)


@step("rows")
def _rows(nodes: Sequence[AnyNode], _entries: Lookup, *, stop: Count, start: Count = 0) -> AnyNode:
    (node,) = nodes
    count, *rest = node.spec.shape or (0,)
    return node if (start, stop) == (0, count) else apply(Rows(start, stop, math.prod(rest)), node)


@step("pick")
def _pick(nodes: Sequence[AnyNode], _entries: Lookup, *, numbers: Numbers) -> AnyNode:
    (node,) = nodes
    count, *rest = node.spec.shape or (0,)
    if not all(0 <= number < count for number in numbers):
        raise CoverageError(f"pick: {node.spec} has no rows {list(numbers)}: they count from 0")
    parts: list[range] = []
    for number in numbers:
        if parts and parts[-1].stop == number:
            parts[-1] = range(parts[-1].start, number + 1)
        else:
            parts.append(range(number, number + 1))
    return join_rows([apply(Rows(part.start, part.stop, math.prod(rest)), node) for part in parts])


@step("pad")
def _pad(nodes: Sequence[AnyNode], _entries: Lookup, *, rows: Count) -> AnyNode:
    (node,) = nodes
    count, *rest = node.spec.shape
    if rows < count:
        raise CoverageError(f"pad: {node.spec} has more than {rows} rows already")
    return node if rows == count else join_rows([node, apply(Zeros(node.spec.dtype.name, (rows - count, *rest)))])


@step("grow")
def _grow(nodes: Sequence[AnyNode], entries: Lookup, *, rows: Count, first: Count, seed: int, stream: int, like: str = "") -> AnyNode:
    (node,) = nodes
    if like and like not in entries:
        raise CoverageError(f"grow: {like}, whose rows the new ones are to be like, is not there")
    model = entries[like] if like else node
    count, *rest = node.spec.shape
    if len(rest) != 1 or model.spec.shape[1:] != node.spec.shape[1:]:
        raise CoverageError(f"grow: expected a matrix with as many columns as {like or 'itself'}, found {node.spec} and {model.spec}")
    if not 0 < first <= min(count, rows):
        raise CoverageError(f"grow: the first new row, {first}, must be one of {count} rows or follow them, and not come after row {rows}")
    old = _rows(nodes, entries, stop=first)
    new = [
        apply(SampleRows(min(SampleRows.MOST, rows - start), seed, stream * rows + start, node.spec.dtype.name), model)
        for start in range(first, rows, SampleRows.MOST)
    ]
    return join_rows([old, *new]) if new else old


@step("zeros")
def _zeros(nodes: Sequence[AnyNode], entries: Lookup, *, size: Count, rows: Count = 0, dtype: str = "float32", like: str = "") -> AnyNode:
    _expect_none(nodes)
    name = entries[like].spec.dtype.name if like in entries else parse_dtype(dtype).name
    return apply(Zeros(name, (rows, size) if rows else (size,)))


@step("inv_freq")
def _inv_freq(nodes: Sequence[AnyNode], entries: Lookup, *, dim: Count, base: Count = 10000, like: str = "") -> AnyNode:
    _expect_none(nodes)
    return cast(apply(InvFreq(dim, base)), entries[like].spec.dtype.name if like in entries else None)


@step("merge_lora")
def _merge_lora(nodes: Sequence[AnyNode], _entries: Lookup, *, merge: bool, alpha: int) -> AnyNode:
    weight, *factors = nodes
    if not merge:
        raise CoverageError("low-rank matrices stand beside this weight: --set merge_lora=true merges them into it")
    half = len(factors) // 2
    sums, start = [], 0
    for down, up in zip(factors[:half], factors[half:], strict=True):
        rows, rank = (*up.spec.shape, 0, 0)[:2]
        block = _rows([weight], {}, start=start, stop=start + rows)
        sums.append(apply(MergeLora(alpha, rows, (*block.spec.shape, 0)[1], rank), block, down, up))
        start += rows
    if start != weight.spec.shape[0]:
        raise CoverageError(f"low-rank matrices for {start} rows do not fit {weight.spec}")
    return join_rows(sums)


def _expect_none(nodes: Sequence[AnyNode]) -> None:
    if nodes:
        raise CoverageError("a tensor that is made of nothing has no source")


@step("same")
def _same(nodes: Sequence[AnyNode], entries: Lookup, *, tensor: str) -> AnyNode:
    _expect_none(nodes)
    if tensor not in entries:
        raise CoverageError(f"{tensor}, which it repeats, is not there")
    return entries[tensor]


@step("dequantize")
def _dequantize(nodes: Sequence[AnyNode], _entries: Lookup, *, rows: Count, columns: Count) -> AnyNode:
    spec = nodes[0].spec
    if len(nodes) == 1 and not (spec.dtype.floating and spec.dtype.nbytes == 1):
        return nodes[0]
    if len(nodes) == 1 or len(spec.shape) != 2 or rows < 1 or columns < 1:
        specs = ", ".join(str(node.spec) for node in nodes)
        raise CoverageError(f"dequantize: a matrix and the scales of its blocks of {rows} x {columns} go together, found {specs}")
    return apply(Dequantize((spec.shape[0], spec.shape[1]), (rows, columns)), *nodes)
