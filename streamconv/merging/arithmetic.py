"""A tensor of the result, made of those of models by a method."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from streamconv.dtypes import CASTABLE
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, Node, apply
from streamconv.graph.ops import Alignment, Cast, Cutoff, KeptShare, MergeDeltas, MergeLinear, MergeSlerp, Op, Pick, Scale
from streamconv.graph.ops.picks import ALL, CHANCES, LARGEST, NONE, RANDOM
from streamconv.merging.experts import piece_of
from streamconv.merging.file import Input, MergeFile, Slice
from streamconv.merging.parameters import Lookup

_ELECTING = ("ties", "dare_ties")
_RULES = {"ties": LARGEST, "dare_linear": RANDOM, "dare_ties": RANDOM}


@dataclass(frozen=True)
class Operand:
    """A model's tensor that goes into one of the result."""

    one: Input
    name: str
    node: AnyNode


@dataclass(frozen=True)
class Target:
    """A tensor of the result, and what it is made of.

    Attributes:
        name: its own.
        part: the slice that it is in.
        position: of its layer in that slice, from 0 to 1.
        operands: in the order of the slice's inputs.
    """

    name: str
    part: Slice
    position: float
    operands: tuple[Operand, ...]


def units_of(targets: Sequence[Target]) -> list[list[Target]]:
    """Tensors whose norms and largest deltas are looked for in all of them at once: those of a layer's experts, else each its own."""
    units: dict[str, list[tuple[tuple[int, int], Target]]] = {}
    for target in targets:
        piece = piece_of(target.name)
        unit, order = (piece.tensor, piece.order) if piece else (target.name, (0, 0))
        units.setdefault(unit, []).append((order, target))
    return [[target for _, target in sorted(unit, key=lambda item: item[0])] for unit in units.values()]


class Arithmetic:
    """Makes tensors of the result by a file's method, of one dtype each. What several of them take is made once.

    Args:
        file: what is merged how.
        seed: of what is picked at random.

    Attributes:
        replicas: tensors that are no floating numbers, and must be the same in all models: two each, and the name.
    """

    def __init__(self, file: MergeFile, seed: int) -> None:
        self._file, self._seed = file, seed
        self._nodes: dict[tuple[Op, tuple[int, ...]], Node] = {}
        self.replicas: list[tuple[AnyNode, AnyNode, tuple[str, str]]] = []

    def merge(self, targets: Sequence[Target]) -> dict[str, AnyNode]:
        """The tensors of a unit, by name.

        Raises:
            CoverageError: tensors that do not fit each other.
            RecipeError: the file does not say what it takes, or says what cannot be.
        """
        plain = {target.name: target for target in targets if self._is_plain(target)}
        columns = zip(*map(self._operands, plain.values()), strict=True)
        unit = _Unit(list(plain.values()), [list(column) for column in columns])
        places = {name: own for own, name in enumerate(plain)}
        return {
            target.name: self._merged(unit, places[target.name]) if target.name in places else self._copied(target) for target in targets
        }

    def _is_plain(self, target: Target) -> bool:
        """Whether a tensor consists of numbers that can be merged. Raises CoverageError where models do not agree in its shape or kind."""
        first, *others = target.operands
        for other in others:
            if other.node.spec.shape != first.node.spec.shape:
                self._fail_shape(target, first, other)
        castable = [operand.node.spec.dtype.name in CASTABLE for operand in target.operands]
        if all(castable):
            return first.node.spec.numel > 0
        odd = target.operands[castable.index(False)]
        alike = all(operand.node.spec == first.node.spec for operand in others)
        if len(target.operands) > 1 and (odd.node.spec.dtype.floating or odd.node.spec.dtype.is_packed or not alike):
            way = "convert the models with --dequantize, or to one dtype, first"
            raise CoverageError(f"{self._file.path}: {odd.name} of {odd.one.model} is {odd.node.spec}, which is not merged: {way}")
        return False

    def _fail_shape(self, target: Target, first: Operand, other: Operand) -> None:
        shapes = f"{first.node.spec} in {first.one.model} and {other.node.spec} in {other.one.model}"
        rows, others = first.node.spec.shape[:1], other.node.spec.shape[:1]
        way = "merge models of one shape"
        if rows != others and first.node.spec.shape[1:] == other.node.spec.shape[1:]:
            way = f"rows are {rows[0]} and {others[0]}; for other vocabularies say tokenizer_source: base"
        raise CoverageError(f"{self._file.path}:{other.one.line}: {target.name} is {shapes}: {way}")

    def _copied(self, target: Target) -> AnyNode:
        """The first of tensors that must all be the same."""
        first, *others = target.operands
        self.replicas += [(first.node, other.node, (first.name, other.name)) for other in others if other.node is not first.node]
        return first.node

    def _merged(self, unit: _Unit, own: int) -> AnyNode:
        """Tensor ``own`` of a unit."""
        target = unit.targets[own]
        lookup = Lookup(self._file, target.part, target.position)
        method = self._file.method
        if method == "passthrough":
            node = self._scaled(unit, own, lookup)
        elif method == "linear":
            node = self._linear(unit, own, lookup)
        elif method == "slerp":
            node = self._slerp(unit, own, lookup)
        else:
            node = self._added(unit, own, lookup)
        dtype = self._file.out_dtype
        return self._apply(Cast(dtype), node) if dtype and dtype != node.spec.dtype.name else node

    def _scaled(self, unit: _Unit, own: int, lookup: Lookup) -> AnyNode:
        (operand,) = unit.targets[own].operands
        (column,) = unit.columns
        scale = lookup.number("scale", operand.name, operand.one)
        return column[own] if scale is None else self._apply(Scale(scale), column[own])

    def _linear(self, unit: _Unit, own: int, lookup: Lookup) -> AnyNode:
        target = unit.targets[own]
        weights = tuple(lookup.needed("weight", operand.name, operand.one) for operand in target.operands)
        normalize = lookup.flag("normalize", target.name, usual=True)
        if normalize and abs(total := math.fsum(weights)) < _NOTHING:
            problem = f"weights of {target.name} add up to {total:g}, by which nothing can be divided: say normalize: false"
            self._file.fail(target.part.line, problem)
        return self._apply(MergeLinear(weights, normalize), *(column[own] for column in unit.columns))

    def _slerp(self, unit: _Unit, own: int, lookup: Lookup) -> AnyNode:
        target = unit.targets[own]
        base = self._base_of(target)
        bases, others = unit.columns[base], unit.columns[1 - base]
        if unit.alignment is None:
            unit.alignment = self._apply(Alignment(), *bases, *others)
        return self._apply(MergeSlerp(lookup.needed("t", target.name)), bases[own], others[own], unit.alignment)

    def _added(self, unit: _Unit, own: int, lookup: Lookup) -> AnyNode:
        """A base and what the other models add to it."""
        target = unit.targets[own]
        method, base = self._file.method, self._base_of(target)
        numbers = [k for k in range(len(target.operands)) if k != base]
        if not numbers:
            return unit.columns[base][own]
        rescales = lookup.flag("rescale", target.name, usual=_RULES.get(method) == RANDOM)
        weights, picks, small = [], [], []
        for k in numbers:
            operand = target.operands[k]
            weights.append(lookup.needed("weight", operand.name, operand.one))
            density = lookup.number("density", operand.name, operand.one)
            choice = self._choice(unit, base, k, 1.0 if density is None else density, rescales=rescales)
            picks.append(choice.picks[own])
            small += choice.values
        op = MergeDeltas(
            tuple(weights),
            tuple(picks),
            normalize=lookup.flag("normalize", target.name, usual=method == "ties"),
            factor=_or_one(lookup.number("lambda", target.name)),
            elects=method in _ELECTING,
        )
        return self._apply(op, unit.columns[base][own], *(unit.columns[k][own] for k in numbers), *small)

    def _choice(self, unit: _Unit, base: int, k: int, density: float, *, rescales: bool) -> _Choice:
        """Which deltas of operand ``k`` count, in each tensor of a unit."""
        key = k, density, rescales
        if key not in unit.choices:
            picks = self._picks(unit.targets, k, density)
            rule, tensors = picks[0].rule, [*unit.columns[base], *unit.columns[k]]
            values = []
            if rule == LARGEST:
                total = sum(node.spec.numel for node in unit.columns[base])
                values = [self._apply(Cutoff(max(1, int(density * total))), *tensors)]
            if rescales and rule in (LARGEST, RANDOM):
                values = [*values, self._apply(KeptShare(tuple(picks)), *tensors, *values)]
                picks = [replace(pick, rescaled=True) for pick in picks]
            unit.choices[key] = _Choice(picks, values)
        return unit.choices[key]

    def _picks(self, targets: Sequence[Target], k: int, density: float) -> list[Pick]:
        """By what rule deltas of operand ``k`` count, in each tensor of a unit."""
        rule = _RULES.get(self._file.method, ALL)
        chances = math.ceil(density * CHANCES)
        if rule == ALL or chances >= CHANCES:
            return [Pick()] * len(targets)
        if chances <= 0:
            return [Pick(NONE)] * len(targets)
        picks, offset = [], 0
        for target in targets:
            picks.append(Pick(rule, offset=offset) if rule == LARGEST else Pick(rule, chances, _key(self._seed, target.name, k)))
            offset += target.operands[k].node.spec.numel
        return picks

    def _base_of(self, target: Target) -> int:
        """Which operand is the base's."""
        return [operand.one.model for operand in target.operands].index(str(target.part.base))

    def _operands(self, target: Target) -> list[AnyNode]:
        """What a tensor is made of, in one dtype."""
        nodes = [operand.node for operand in target.operands]
        dtype = self._file.dtype or promoted([node.spec.dtype.name for node in nodes])
        return [self._apply(Cast(dtype), node) if dtype != node.spec.dtype.name else node for node in nodes]

    def _apply(self, op: Op, *inputs: AnyNode) -> Node:
        key = op, tuple(map(id, inputs))
        if key not in self._nodes:
            self._nodes[key] = apply(op, *inputs)
        return self._nodes[key]


@dataclass(frozen=True)
class _Choice:
    """Which of a model's deltas count in each tensor of a unit, and the small values that this takes."""

    picks: list[Pick]
    values: list[Node]


@dataclass
class _Unit:
    """Tensors with one norm and one threshold: see `units_of`.

    Attributes:
        targets: the tensors, in order.
        columns: of each operand the tensors that go into these, in one dtype.
        alignment: of the two models of ``slerp``.
        choices: by a model's number, its density, and whether what counts is rescaled.
    """

    targets: list[Target]
    columns: list[list[AnyNode]]
    alignment: Node | None = None
    choices: dict[tuple[int, float, bool], _Choice] = field(default_factory=dict)


_NOTHING = 1e-7


def promoted(names: Sequence[str]) -> str:
    """The dtype that holds what these hold."""
    kinds = set(names)
    if len(kinds) == 1:
        return names[0]
    return "float64" if "float64" in kinds else "float32"


def _or_one(number: float | None) -> float:
    return 1.0 if number is None else number


def _key(seed: int, name: str, number: int) -> int:
    """A key for what is picked at random of a model's tensor: another one for each."""
    text = f"{seed}\0{name}\0{number}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
