"""The ops of the graph. Each is plain data with a JSON form, knows its output's spec statically, and what its inputs must deliver.

Layout ops are dtype-blind: they move items of N bytes. Only `Cast` and its like interpret values, with torch.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv import codec
from streamconv.dtypes import CASTABLE, DTYPES, DType, TensorSpec
from streamconv.errors import CoverageError, FormatError
from streamconv.graph.moves import Move, identity, packed_strides, place, pull, split_stack
from streamconv.notation import axes
from streamconv.notation.axes import Axis, Leaf

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_OPS: dict[str, type[Op]] = {}
_LARGEST = 2**63
_FOREIGN = ("streamconv.library.bridge:run_converter",)  # what `Foreign` may call
_MASKED = 1 << 16  # elements: pieces in which NaNs are looked for
_SCALED = 1 << 17  # elements: pieces in which blocks are scaled
_SUMMED = 1 << 18  # elements of a matrix that are summed at once
_BLOCK = 128  # rows, columns and ranks of a product that are made at once


class Op:
    """What a node does. Subclasses are frozen dataclasses whose fields are JSON values.

    An op either rearranges (`pull` gives pieces, nothing is computed), or is elementwise (`pull` gives the move itself, so
    that the plan can see through it, and `compute` turns values), or neither (`pull` gives None, `demand` and `compute`). One that
    ``streams`` has to see all of its input, piece by piece, and makes all of its output: `scratch` and `compute_streamed`.
    """

    kind: ClassVar[str]
    layout_only: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    whole: ClassVar[bool] = False  # makes all of its output at once
    temporary: ClassVar[int] = 0  # bytes that `compute` takes at most beside what it is given

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            _OPS[cls.kind] = cls

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.kind

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        """The output's spec. Raises CoverageError where the inputs do not fit."""
        raise NotImplementedError

    def pull(self, move: Move) -> Iterator[tuple[int, Move]] | None:
        """(input number, move) pieces that deliver the region, or None where it has to be computed from other regions."""
        raise NotImplementedError

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        """For each part that `compute` needs: the input, and a move of the region wanted into a buffer of its own."""
        raise NotImplementedError

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """How many elements of each input any region of ``numel`` elements of the output takes at most."""
        return [numel] * len(inputs)

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> int | None:
        """Writes the region ``move`` of the output into the flat ``out``. Arrays hold items as unsigned integers of their width.

        Elementwise ops say how many of the values, made of finite ones, are too large for their dtype: those are infinite now.
        """
        raise NotImplementedError

    def scratch(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """The buffers that `compute_streamed` takes: (elements, bytes of each)."""
        raise NotImplementedError

    def compute_streamed(self, spec: TensorSpec, fetch: Callable[[int, Array], None], buffers: Sequence[Array]) -> Array:
        """All of the output, in one of the ``buffers``; ``fetch(start, out)`` reads the input of ``spec`` from element ``start``."""
        raise NotImplementedError

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        """Loads the libraries that `compute` uses, and runs it once where that allocates more."""

    def to_json(self) -> dict[str, Any]:
        """The op as JSON values; `from_json` reads it back."""
        return {"op": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]


def from_json(data: Mapping[str, Any]) -> Op:
    """The op that `Op.to_json` described.

    Raises:
        FormatError: there is none like that.
    """
    given = dict(data)
    kind = given.pop("op", None)
    if not isinstance(kind, str) or kind not in _OPS:
        raise FormatError(f"there is no op {kind!r}; known are {', '.join(_OPS)}")
    if any(abs(number) >= _LARGEST for number in _numbers(given)):
        raise FormatError(f"op {kind}: whole numbers stay below 2**63")
    if unknown := sorted(given.keys() - {f.name for f in fields(_OPS[kind])}):  # type: ignore[arg-type]
        raise FormatError(f"op {kind} has no {unknown[0]!r}")
    try:
        return codec.convert(given, _OPS[kind])
    except FormatError as error:
        raise FormatError(f"op {kind}: {error}") from error


def _numbers(value: object) -> Iterator[int]:
    """All whole numbers in a value of JSON."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


@dataclass(frozen=True)
class Rearrange(Op):
    """One output tensor of a layout.

    Attributes:
        layout: the layout's text, without ``...``.
        sizes: the size of every axis.
        stacks: for each left tensor, how many inputs stand behind it (a leading axis given by names counts its tensors).
        output: which right tensor this is.
        leading: how many leading axes of the right tensor enumerate tensors.
        part: which of these tensors this is.
    """

    kind: ClassVar[str] = "rearrange"
    layout_only: ClassVar[bool] = True

    layout: str
    sizes: dict[str, int] = field(hash=False)
    stacks: tuple[int, ...]
    output: int = 0
    leading: int = 0
    part: int = 0

    @cached_property
    def _compiled(self) -> tuple[axes.Tree, list[axes.Place], list[int], int, list[int]]:
        layout = axes.parse(self.layout)
        if not 0 <= self.output < len(layout.right) or min(self.sizes.values(), default=0) < 0 or self.sizes.get("1", 1) != 1:
            raise CoverageError(f"layout {self.layout!r} has no output {self.output} of these sizes")
        right = layout.shapes("right", self.sizes)[self.output]
        if not 0 <= self.leading <= len(right) or not 0 <= self.part < math.prod(right[: self.leading]):
            raise CoverageError(f"layout {self.layout!r} makes no tensor {self.part} along {self.leading} leading axes of {list(right)}")
        numel = math.prod(right[self.leading :])
        left = [math.prod(shape) for shape in layout.shapes("left", self.sizes)]
        if len(self.stacks) != len(left) or any(count < 1 or n % count for n, count in zip(left, self.stacks, strict=True)):
            raise CoverageError(f"layout {self.layout!r} does not take {list(self.stacks)} tensors")
        firsts = [sum(self.stacks[:k]) for k in range(len(self.stacks))]
        return layout.tree(self.output, self.sizes), layout.places("left", self.sizes), left, numel, firsts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output: the right tensor's, without the leading axes that its names enumerate."""
        return axes.parse(self.layout).shapes("right", self.sizes)[self.output][self.leading :]

    @property
    def is_identity(self) -> bool:
        left, right = (side.strip() for side in self.layout.split("->"))
        return left == right and not self.leading and self.stacks == (1,)

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(inputs) != sum(self.stacks):
            raise CoverageError(f"layout {self.layout!r} takes {sum(self.stacks)} tensors, got {len(inputs)}")
        if len(dtypes := {spec.dtype.name for spec in inputs}) > 1:
            raise CoverageError(f"tensors of dtypes {', '.join(sorted(dtypes))} cannot become one; --dtype settles it")
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        numels = [n // count for n, count in zip(self._compiled[2], self.stacks, strict=True) for _ in range(count)]
        for spec, numel in zip(inputs, numels, strict=True):
            if spec.numel != numel:
                raise CoverageError(f"layout {self.layout!r} expects a tensor of {numel} elements, found {spec}")
        return TensorSpec(inputs[0].dtype, self.shape)

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        tree, places, numels, numel, firsts = self._compiled
        start = self.part * numel
        shifted = Move(move.sizes, move.dst, move.dst_strides, move.src + start, move.src_strides) if start else move
        for alternative, piece, digits in pull(tree, shifted):
            where = places[alternative]
            count = self.stacks[where.tensor]
            for number, found in split_stack(place(piece, digits, where), count, numels[where.tensor] // count):
                yield firsts[where.tensor] + number, found


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in the same order under another shape."""

    kind: ClassVar[str] = "reshape"
    layout_only: ClassVar[bool] = True

    shape: tuple[int, ...]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        if math.prod(self.shape) != inputs[0].numel:
            raise CoverageError(f"{inputs[0]} cannot have shape {self.shape}")
        return TensorSpec(inputs[0].dtype, self.shape)

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        yield 0, move


@dataclass(frozen=True)
class Strided(Op):
    """The elements that start at ``start`` of a tensor's row-major ones and lie ``strides`` apart along the axes of ``shape``.

    Strides are not negative; where one is 0, or smaller than what the axes within it span, elements are repeated.
    """

    kind: ClassVar[str] = "strided"
    layout_only: ClassVar[bool] = True

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @cached_property
    def _compiled(self) -> tuple[axes.Tree, axes.Place]:
        """The digits of a place in the output, as few as its strides allow, and where they lie in the input."""
        whole = Move(self.shape, 0, packed_strides(self.shape), 0, self.strides).simplify()
        tree: axes.Tree = Leaf(0)
        for k in reversed(range(len(whole.sizes))):
            tree = Axis(str(k), whole.dst_strides[k], tree)
        return tree, axes.Place(0, self.start, {str(k): stride for k, stride in enumerate(whole.src_strides)})

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        last = self.start + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        is_inside = 0 in self.shape or last < inputs[0].numel
        if min(self.start, *self.strides, 0) < 0 or not is_inside:
            raise CoverageError(f"a view of shape {list(self.shape)}, strides {list(self.strides)} from {self.start} is not in {inputs[0]}")
        return TensorSpec(inputs[0].dtype, self.shape)

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        tree, where = self._compiled
        for _, piece, digits in pull(tree, move):
            yield 0, place(piece, digits, where)


@dataclass(frozen=True)
class Rows(Op):
    """Rows ``start`` to ``stop`` of a tensor, along its first axis."""

    kind: ClassVar[str] = "rows"
    layout_only: ClassVar[bool] = True

    start: int
    stop: int
    row: int  # elements

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        inputs[0].dtype.itemsize  # noqa: B018 - refuses packed types
        shape = inputs[0].shape
        if not shape or not 0 <= self.start <= self.stop <= shape[0] or math.prod(shape[1:]) != self.row:
            raise CoverageError(f"rows {self.start} to {self.stop} are not in {inputs[0]}")
        return TensorSpec(inputs[0].dtype, (self.stop - self.start, *shape[1:]))

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        yield 0, replace(move, src=move.src + self.start * self.row)


class Elementwise(Op):
    """An op whose output element depends on the one input element at the same place."""

    def pull(self, move: Move) -> Iterator[tuple[int, Move]]:
        yield 0, move

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        return [(0, Move(move.sizes, 0, packed_strides(move.sizes), move.src, move.src_strides))]


@dataclass(frozen=True)
class Cast(Elementwise):
    """Conversion to another floating type by torch, rounding to nearest even; NaNs come out as the one quiet NaN.

    What bits torch itself gives a NaN differs between its vector and its scalar loops, hence with the shape of a tile.
    """

    kind: ClassVar[str] = "cast"

    dtype: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE or self.dtype not in CASTABLE:
            raise CoverageError(f"cannot cast {inputs[0].dtype} to {self.dtype}; casts go between {', '.join(CASTABLE)}")
        return TensorSpec(DTYPES[self.dtype], inputs[0].shape)

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)  # the engine's workers are the threads
        given = torch.full((64,), math.nan, dtype=getattr(torch, inputs[0].dtype.name))
        if given.min().isnan():
            _settle_nans(given.to(getattr(torch, self.dtype)))

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> int:
        given = as_torch(parts[0], specs[0].dtype).view(move.sizes)
        made = as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst).copy_(given)
        return _settle(given, made) if spec.dtype != specs[0].dtype else 0


@dataclass(frozen=True)
class Add(Elementwise):
    """Every value plus a number, in the dtype of the tensor: as torch adds one, in float32 for narrower ones, and rounded once."""

    kind: ClassVar[str] = "add"

    value: float

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if inputs[0].dtype.name not in CASTABLE:
            raise CoverageError(f"{self.kind} is for tensors of {', '.join(CASTABLE)}, not for {inputs[0]}")
        return inputs[0]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)
        given = torch.full((64,), math.nan, dtype=getattr(torch, inputs[0].dtype.name))
        self._change(given)
        _settle_nans(given)

    def _change(self, values: Any) -> None:
        values.add_(self.value)

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> int:
        given = as_torch(parts[0], spec.dtype).view(move.sizes)
        made = as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst).copy_(given)
        self._change(made)
        low, high = made.aminmax()
        if low.isnan():
            _settle_nans(made)
        return 0 if low.isfinite() and high.isfinite() else _count_overflows(given, made)


@dataclass(frozen=True)
class Scale(Add):
    """Every value times a number, or divided by it, in the dtype of the tensor, as torch does that; see `Add`."""

    kind: ClassVar[str] = "scale"

    divide: bool = False

    def _change(self, values: Any) -> None:
        if self.divide:
            values.div_(self.value)
        else:
            values.mul_(self.value)


@dataclass(frozen=True)
class Dequantize(Elementwise):
    """Matrices of one-byte floats times the scale of each of their blocks, both as float32, rounded once; NaNs as those of `Cast`.

    Attributes:
        shape: rows and columns of the matrix, after the sizes of a stack of them.
        block: rows and columns of a block; the last ones of a matrix may be cut off.
        dtype: what comes of it.
    """

    kind: ClassVar[str] = "dequantize"
    temporary: ClassVar[int] = 20 * _SCALED

    shape: tuple[int, ...]
    block: tuple[int, int]
    dtype: str = "bfloat16"

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks there are: the shape of the scales."""
        *stack, rows, columns = self.shape
        return *stack, -(-rows // self.block[0]), -(-columns // self.block[1])

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        matrix, scales = inputs
        if matrix.dtype.bits != 8 or not matrix.dtype.floating or matrix.shape != self.shape or len(self.shape) < 2:
            raise CoverageError(f"expected a matrix of one-byte floats {list(self.shape)}, found {matrix}")
        if scales.dtype.name not in _SCALES or scales.shape != self.blocks:
            blocks = " x ".join(map(str, self.block))
            raise CoverageError(f"the scales of {matrix} in blocks of {blocks} must be floats {list(self.blocks)}, found {scales}")
        if self.dtype not in CASTABLE:
            raise CoverageError(f"{matrix} becomes one of {', '.join(CASTABLE)}, not {self.dtype}")
        return TensorSpec(DTYPES[self.dtype], matrix.shape)

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        return [*super().demand(move), (1, identity(math.prod(self.blocks)))]

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        return [numel, inputs[1].numel]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)
        ones = torch.ones(2, 2, dtype=getattr(torch, inputs[0].dtype.name)).float()
        ones.mul_(ones.index_select(0, torch.zeros(2, dtype=torch.int64))).bfloat16()

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> int:
        given, made = as_torch(parts[0], specs[0].dtype), as_torch(out, spec.dtype)
        scales = _Scales(parts[1], specs[1].dtype, self.blocks[-2], self.blocks[-1], self.block)
        rows, columns = self.shape[-2:]
        tree = axes.Axis("stack", rows * columns, axes.Axis("row", columns, axes.Axis("column", 1, axes.Leaf(0))))
        packed = replace(move, dst=0, dst_strides=packed_strides(move.sizes))
        overflowed = 0
        for (_, read, digits), (_, write, _) in zip(pull(tree, packed), pull(tree, move), strict=True):
            values = given.as_strided(read.sizes, read.dst_strides, read.dst)
            overflowed += _scale(values, made.as_strided(write.sizes, write.dst_strides, write.dst), scales, digits)
        return overflowed


class Made(Op):
    """An op without inputs."""

    def pull(self, move: Move) -> None:
        return None

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        return []

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch  # noqa: F401 - loaded before the process is measured


@dataclass(frozen=True)
class Zeros(Made):
    """A tensor of zeros."""

    kind: ClassVar[str] = "zeros"

    dtype: str
    shape: tuple[int, ...]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        DTYPES[self.dtype].itemsize  # noqa: B018 - refuses packed types
        return TensorSpec(DTYPES[self.dtype], self.shape)

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> None:
        as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst).zero_()


@dataclass(frozen=True)
class InvFreq(Made):
    """The frequencies of a rotary embedding: float32 base^(-2j/dim) for j < dim / 2, with torch's last bits."""

    kind: ClassVar[str] = "inv_freq"

    dim: int
    base: int

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        return TensorSpec(DTYPES["float32"], (self.dim // 2,))

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> None:
        import torch

        values = 1.0 / (float(self.base) ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))
        made = as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst)
        made.copy_(values.as_strided(move.sizes, move.src_strides, move.src))


@dataclass(frozen=True)
class SampleRows(Op):
    """``rows`` new rows of an embedding, drawn from the normal distribution of its old ones with 1e-5 of their covariance.

    With E of V rows and mean mu, ``mu + sqrt(1e-5 / V) * sum_v z_v (E_v - mu)`` with standard normal z has exactly that distribution;
    E is streamed once, no covariance is made, and it may be singular. ``seed`` and ``stream`` choose z. Sums are of float64, in an order
    that shapes alone decide: other processors' matrix products may round their last bits otherwise.
    """

    kind: ClassVar[str] = "sample_rows"
    streams: ClassVar[bool] = True
    MOST: ClassVar[int] = 64  # rows that one op makes: what it keeps of them while it streams is counted

    rows: int
    seed: int
    stream: int
    dtype: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        spec = inputs[0]
        if self.rows < 1 or len(spec.shape) != 2 or not spec.numel or not {spec.dtype.name, self.dtype} <= {*CASTABLE}:
            raise CoverageError(f"rows are sampled from matrices of {', '.join(CASTABLE)}, not from {spec}")
        return TensorSpec(DTYPES[self.dtype], (self.rows, spec.shape[1]))

    def pull(self, move: Move) -> None:
        return None

    def block(self, spec: TensorSpec) -> int:
        """Rows of the input that are read at once; they follow from shapes alone, as the order of additions does."""
        return max(1, min(spec.shape[0], _SUMMED // max(spec.shape[1], self.rows + 1)))

    def scratch(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """The input as stored and in float64, z and a row of ones, their products (the last the sum of all rows), the output."""
        spec = inputs[0]
        block, columns = self.block(spec), spec.shape[1]
        wide = [(count, 8) for count in (block * columns, (self.rows + 1) * block, (self.rows + 1) * columns)]
        return [(block * columns, spec.dtype.itemsize), *wide, (self.rows * columns, DTYPES[self.dtype].itemsize)]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import numpy as np

        spec = inputs[0]
        once = replace(spec, shape=(self.block(spec), spec.shape[1]))
        buffers = [np.zeros(count, f"u{itemsize}") for count, itemsize in self.scratch([once])]
        self.compute_streamed(once, lambda _start, _out: None, buffers)

    def compute_streamed(self, spec: TensorSpec, fetch: Callable[[int, Array], None], buffers: Sequence[Array]) -> Array:
        """All rows, in the last of the buffers."""
        import numpy as np
        import torch

        torch.set_num_threads(1)  # wherever the plan runs: how a product is shared out decides its last bits
        raw, *wide, made = buffers
        values, factors, sums = (as_torch(buffer, DTYPES["float64"]) for buffer in wide)
        block, (count, columns) = self.block(spec), spec.shape
        total = sums.view(self.rows + 1, columns).zero_()
        normals = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, self.stream % 2**64]))
        drawn = torch.zeros(self.rows + 1, dtype=torch.float64)
        for start in range(0, count, block):
            n = min(block, count - start)
            fetch(start * columns, raw[: n * columns])
            part = values[: n * columns].copy_(as_torch(raw, spec.dtype)[: n * columns]).view(n, columns)
            z = factors[: (self.rows + 1) * n].view(self.rows + 1, n)
            normals.standard_normal(out=z[: self.rows].numpy())
            z[self.rows] = 1
            drawn += z.sum(1)
            total.addmm_(z, part)
        mean = total[self.rows].div_(count)
        new = total[: self.rows].addr_(drawn[: self.rows], mean, alpha=-1).mul_(math.sqrt(1e-5 / count)).add_(mean)
        _settle_nans(as_torch(made, DTYPES[self.dtype]).view(self.rows, columns).copy_(new))
        return made


_Digits = dict[str, tuple[int, tuple[int, ...]]]
_SCALES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8")


@dataclass(frozen=True)
class _Scales:
    """The scales of a tensor's blocks as they are stored: so many high and wide for each matrix, of blocks of ``block``."""

    stored: Array
    dtype: DType
    high: int
    wide: int
    block: tuple[int, int]

    def factors(self, stack: Any, rows: Any, columns: Any) -> Any:
        """The factor, in float32, of each element in these rows, each of a matrix of the stack, and columns."""
        import torch

        few_rows, row_of = (stack * self.high + rows // self.block[0]).unique(return_inverse=True)
        few_columns, column_of = (columns // self.block[1]).unique(return_inverse=True)
        used = self.stored[(few_rows.unsqueeze(1) * self.wide + few_columns).numpy()]
        small = _as_factors(torch.from_numpy(used), self.dtype).index_select(1, column_of)
        return small.index_select(0, row_of) if len(few_rows) > 1 else small.expand(len(row_of), -1)


def _as_factors(stored: Any, dtype: DType) -> Any:
    """Scales in float32; bytes are exponents, as those of float8_e8m0fnu are, but 255 is infinite and no NaN."""
    import torch

    if dtype.name in ("uint8", "float8_e8m0fnu"):
        bits = stored.view(torch.uint8).int().bitwise_left_shift_(23)
        bits.masked_fill_(stored.view(torch.uint8) == 0, 1 << 22)  # 2^-127, which has no exponent of its own
        factors = bits.view(torch.float32)
        return factors if dtype.name == "uint8" else factors.masked_fill_(factors.isinf(), math.nan)
    return stored.view(getattr(torch, dtype.name)).float()


def _scale(values: Any, made: Any, scales: _Scales, digits: _Digits) -> int:
    """``made`` of one-byte ``values``; ``digits`` are the first matrix, row and column and how far each axis steps along them.

    Gives how many of them are too large for the dtype of what is made.
    """
    if values.numel() > _SCALED:
        axis = max(range(values.dim()), key=lambda k: values.shape[k])
        half = values.shape[axis] // 2
        later = {name: (first + half * steps[axis], steps) for name, (first, steps) in digits.items()}
        return sum(
            _scale(values.narrow(axis, start, size), made.narrow(axis, start, size), scales, where)
            for start, size, where in ((0, half, digits), (half, values.shape[axis] - half, later))
        )
    across = [k for k in range(values.dim()) if digits["column"][1][k]]
    down = [k for k in range(values.dim()) if k not in across]
    order = [*down, *across]
    sizes = list(values.shape)
    stack, rows, columns = (_places(digits[name], along, sizes) for name, along in (("stack", down), ("row", down), ("column", across)))
    factors = scales.factors(stack, rows, columns)
    result = _widen(values.permute(order)).mul_(factors.reshape([sizes[k] for k in order]))
    return _settle(result, made.permute(order).copy_(result))


def _places(digit: tuple[int, tuple[int, ...]], along: Sequence[int], sizes: Sequence[int]) -> Any:
    """Where a digit stands at each index of some axes, the last running fastest."""
    import torch

    first, steps = digit
    at: Any = torch.tensor([first])
    for k in along:
        at = (at.unsqueeze(1) + torch.arange(sizes[k]) * steps[k]).flatten()
    return at


def _widen(values: Any) -> Any:
    """One-byte floats as float32. Those of the usual kind are read as float16 with another bias, which is several times as fast."""
    import torch

    if values.dtype == torch.float8_e4m3fn and (values.view(torch.uint8) & 0x7F).max() < 0x7F:
        halves = values.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14))
        return halves.view(torch.float16).float().mul_(1 << 8)
    return values.float()


@dataclass(frozen=True)
class Foreign(Op):
    """What other code makes of whole tensors, all at once.

    Attributes:
        code: ``module:function`` of this package that takes ``given`` and the inputs as torch tensors, and returns the output; without
            inputs it only loads what it needs.
        given: what tells it what to do.
        output: the name of what it makes.
        dtype: of that.
        shape: of that.
        numels: elements of each input.
        needs: bytes that it takes beside its inputs, those of its output included.
    """

    kind: ClassVar[str] = "foreign"
    whole: ClassVar[bool] = True

    code: str
    given: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    numels: tuple[int, ...]
    needs: int

    @property
    def temporary(self) -> int:  # type: ignore[override]
        return self.needs

    @property
    def label(self) -> str:
        return f"the conversion that makes {self.output}"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if self.code not in _FOREIGN or self.needs < 0:
            raise CoverageError(f"{self.code} is no code that makes tensors: make the plan again")
        if tuple(spec.numel for spec in inputs) != self.numels:
            raise CoverageError(f"{self.output} is made of tensors of {self.numels} elements, not of {', '.join(map(str, inputs))}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    def pull(self, move: Move) -> None:
        return None

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        return [(k, identity(numel)) for k, numel in enumerate(self.numels)]

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        return list(self.numels)

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)
        self._run([])

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> None:
        made = self._run([as_torch(part, of.dtype).view(of.shape) for part, of in zip(parts, specs, strict=True)])
        as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst).copy_(
            made.reshape(-1).as_strided(move.sizes, move.src_strides, move.src)
        )

    def _run(self, tensors: Sequence[Any]) -> Any:
        module, _, function = self.code.partition(":")
        if not module.startswith("streamconv."):
            raise CoverageError(f"{self.code} is no code of this package: make the plan again")
        return getattr(importlib.import_module(module), function)(self.given, self.output, tensors)


@dataclass(frozen=True)
class MergeLora(Op):
    """``W + alpha / rank * B A`` of the inputs W (rows, columns), A (rank, columns) and B (rows, rank), in the dtype of W.

    Summed in float64, so that a tile's shape, which changes the order of additions, does not change what is rounded to that dtype.
    """

    kind: ClassVar[str] = "merge_lora"
    temporary: ClassVar[int] = 3 * 8 * _BLOCK**2

    alpha: int
    rows: int
    columns: int
    rank: int

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        shapes = [(self.rows, self.columns), (self.rank, self.columns), (self.rows, self.rank)]
        if self.rank < 1 or [spec.shape for spec in inputs] != shapes or any(spec.dtype.name not in CASTABLE for spec in inputs):
            found = ", ".join(map(str, inputs))
            raise CoverageError(f"low-rank matrices are merged into a matrix of {', '.join(CASTABLE)} that they fit, found {found}")
        return inputs[0]

    def pull(self, move: Move) -> None:
        return None

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        return [numel, self.rank * self.columns, self.rows * self.rank]

    def demand(self, move: Move) -> list[tuple[int, Move]]:
        own = Move(move.sizes, 0, packed_strides(move.sizes), move.src, move.src_strides)
        return [(0, own), (1, identity(self.rank * self.columns)), (2, identity(self.rows * self.rank))]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import torch

        torch.set_num_threads(1)
        given = torch.zeros(_BLOCK, _BLOCK, dtype=torch.float64)
        given.addmm_(given, given)

    def compute(self, parts: Sequence[Array], specs: Sequence[TensorSpec], move: Move, out: Array, spec: TensorSpec) -> None:
        weight, down, up = (as_torch(part, of.dtype) for part, of in zip(parts, specs, strict=True))
        matrix = Axis("row", self.columns, Axis("column", 1, Leaf(0)))
        for _, piece, digits in pull(matrix, Move(move.sizes, 0, packed_strides(move.sizes), move.src, move.src_strides)):
            self._add(weight, piece, digits, down.view(self.rank, self.columns), up.view(self.rows, self.rank))
        as_torch(out, spec.dtype).as_strided(move.sizes, move.dst_strides, move.dst).copy_(weight.view(move.sizes))

    def _add(self, weight: Any, piece: Move, digits: dict[str, tuple[int, tuple[int, ...]]], down: Any, up: Any) -> None:
        """Adds the product to a piece, in blocks whose temporary copies do not count."""
        axes = list(zip(piece.sizes, piece.dst_strides, digits["row"][1], digits["column"][1], strict=True))
        tall = max((axis for axis in axes if axis[2]), default=(1, 1, 1, 0))
        wide = max((axis for axis in axes if axis[3]), default=(1, 1, 0, 1))
        others = [axis for axis in axes if axis is not tall and axis is not wide]
        blocks = itertools.product(*(range(n) for n, *_ in others), range(0, tall[0], _BLOCK), range(0, wide[0], _BLOCK))
        for *index, top, left in blocks:
            at, row, column = (
                first + sum(map(int.__mul__, index, (axis[k] for axis in others))) + top * tall[k] + left * wide[k]
                for k, first in ((1, piece.dst), (2, digits["row"][0]), (3, digits["column"][0]))
            )
            height, width = min(_BLOCK, tall[0] - top), min(_BLOCK, wide[0] - left)
            block = weight.as_strided((height, width), (tall[1], wide[1]), at)
            ups, downs = up[row :: tall[2]][:height], down[:, column :: wide[3]][:, :width]
            total = block.double()
            for k in range(0, self.rank, _BLOCK):
                total.addmm_(ups[:, k : k + _BLOCK].double(), downs[k : k + _BLOCK].double(), alpha=self.alpha / self.rank)
            block.copy_(total)


def _settle(given: Any, made: Any) -> int:
    """Makes every NaN of what was ``made`` of numbers the same; how many are infinite there, and finite as they were ``given``."""
    import torch

    largest = torch.finfo(made.dtype).max
    if largest >= torch.finfo(given.dtype).max:
        if given.min().isnan():
            _settle_nans(made)
        return 0
    low, high = given.aminmax()
    if -largest <= low and high <= largest:  # which NaNs are not
        return 0
    if low.isnan():
        _settle_nans(made)
    return _count_overflows(given, made)


def _count_overflows(given: Any, made: Any) -> int:
    """How many are infinite in one and finite in the other, in pieces small enough for their masks not to count."""
    if given.numel() > _MASKED:
        axis = max(range(given.dim()), key=lambda k: given.shape[k])
        return sum(_count_overflows(*halves) for halves in zip(given.chunk(2, axis), made.chunk(2, axis), strict=True))
    return int((made.isinf() & given.isfinite()).sum())


def _settle_nans(values: Any) -> None:
    """Makes every NaN the same, in pieces small enough for their masks not to count."""
    if values.numel() > _MASKED:
        for half in values.chunk(2, dim=max(range(values.dim()), key=lambda k: values.shape[k])):
            _settle_nans(half)
    else:
        values.masked_fill_(values.isnan(), math.nan)


def as_torch(array: Array, dtype: DType) -> Any:
    """The same memory as a flat torch tensor of ``dtype``."""
    import torch

    return torch.from_numpy(array.view("u1")).view(getattr(torch, dtype.name))
