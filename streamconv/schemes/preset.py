"""Weights quantized by rounding alone: which tensors a weight becomes, and what a config says of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Constant, Quantize
from streamconv.graph.ops.quantizing import CODES, SCALES, ZEROS

ALL = 1 << 40  # rows or columns: of whatever shape
_WORD = 32  # bits


@dataclass(frozen=True)
class Preset:
    """A way of quantizing, by its name.

    Attributes:
        name: what ``--quantize`` calls it.
        method: of the scheme whose config it is, which reads what it makes.
        rule: of `graph.encoders`.
        block: rows and columns that share a scale.
        codes: the codes' name after the weight's, and their dtype.
        scales: the same of the scales; "" is the weight's own dtype.
        config: ``quantization_config``, for the modules that are left alone.
        zeros: after the weight's name: of the zero points; empty: there are none.
        shared: of the scale of all scales; empty: there is none.
        shape: of the weight's own shape; empty: it is not stored.
        bits: of a code.
        rows, columns: what those of a weight must be multiples of.
        leaves: whether weights of other sizes are left alone, and not refused.
        keeps_stacks: whether experts in one tensor stay so; else they are written one by one.
        follows: whether it leaves alone, of a quantized source, what that has as numbers.
        by_module: whether its readers find in a config only their own names of modules, and not those of the files.
    """

    name: str
    method: str
    rule: str
    block: tuple[int, int]
    codes: tuple[str, str]
    scales: tuple[str, str]
    config: Callable[[Sequence[str]], dict[str, Any]] = field(compare=False)
    zeros: str = ""
    shared: str = ""
    shape: str = ""
    bits: int = 8
    rows: int = 1
    columns: int = 1
    leaves: bool = False
    keeps_stacks: bool = False
    follows: bool = False
    by_module: bool = True

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can be quantized so."""
        return not (shape[-2] % self.rows or shape[-1] % self.columns)

    def encode(self, name: str, weight: AnyNode, shared: AnyNode | None) -> dict[str, AnyNode]:
        """The tensors that a weight becomes, by name.

        Args:
            name: its own.
            weight: a matrix, or a stack of them.
            shared: the scale of all scales, if there is one.

        Raises:
            CoverageError: its shape does not fit.
        """
        *stack, rows, columns = weight.spec.shape
        if not self.fits(weight.spec.shape):
            unit, size, what = (self.columns, columns, "columns") if columns % self.columns else (self.rows, rows, "rows")
            raise CoverageError(f"{name} has {size} {what}, {self.name} takes them in groups of {unit}: leave it alone with --ignore")
        down, across = min(self.block[0], rows), min(self.block[1], columns)
        counts = *stack, -(-rows // down), -(-columns // across)
        dtype = weight.spec.dtype.name
        per = {"int32": _WORD // self.bits, "uint8": 8 // self.bits}.get(self.codes[1], 1)
        inputs = (weight, shared) if shared is not None else (weight,)

        def make(part: str, shape: tuple[int, ...], kind: str) -> AnyNode:
            return apply(Quantize(shape, kind, self.rule, part, (rows, columns), (down, across), shared is not None), *inputs)

        made: Mapping[str, AnyNode] = {
            self.codes[0]: make(CODES, (*stack, rows, -(-columns // per)), self.codes[1]),
            self.scales[0]: make(SCALES, counts, self.scales[1] or dtype),
            **({self.zeros: make(ZEROS, (-(-counts[0] * self.bits // _WORD), counts[1]), "int32")} if self.zeros else {}),
            **({self.shape: apply(Constant("int64", (2,), (rows, columns)))} if self.shape else {}),
            **({self.shared: shared} if shared is not None else {}),
        }
        return {f"{name}{suffix}": node for suffix, node in made.items()}
