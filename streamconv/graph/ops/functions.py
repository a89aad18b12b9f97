"""Functions of a recipe's own as ops: of whole tensors, or of pieces of them, element by element.

A plan names a function and says what its code was. It never brings one: a function is there where the Python file that has it was run,
because somebody named that file as a recipe, or imported it.
"""

from __future__ import annotations

import hashlib
import json
import marshal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import CoverageError, RunError, StreamconvError, UsageError
from streamconv.extras import require
from streamconv.graph.moves import Move, packed_strides
from streamconv.graph.ops.op import Compute, Elementwise, Values

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

Shape = Callable[..., Sequence[int]]


@dataclass(frozen=True)
class Definition:
    """A function, and what was declared of it.

    Attributes:
        name: of the op.
        call: makes an array of arrays.
        tiled: it takes pieces of tensors of one shape, any elements of them, and gives as many.
        dtype: of what it makes; None: that of its first tensor.
        shape: of what it makes, by those of its tensors and what the recipe gives it; None: that of its first tensor.
        scratch: bytes that it takes beside its tensors and its result, for each byte of the result.
        framework: whose arrays it takes and gives: numpy's or torch's.
    """

    name: str
    call: Callable[..., Any]
    tiled: bool
    dtype: str | None
    shape: Shape | None
    scratch: float
    framework: str

    @property
    def digest(self) -> str:
        """Of its code."""
        code = self.call.__code__ if isinstance(self.call, FunctionType) else None
        return hashlib.sha256(marshal.dumps(code, 2)).hexdigest()[:16]


_definitions: dict[str, Definition] = {}


def define(definition: Definition) -> None:
    """Has ops call this function by its name from now on."""
    _definitions[definition.name] = definition


@dataclass(frozen=True)
class _Function(Compute):
    """A function by its name.

    Attributes:
        name: of the function.
        digest: of its code when the plan was made.
        parameters: what the recipe gives it, as JSON.
    """

    name: str
    digest: str
    parameters: str

    @property
    def label(self) -> str:
        return f"the function {self.name}"

    @property
    def definition(self) -> Definition:
        """The function. Raises UsageError: it is not there, or is another by now."""
        definition = _definitions.get(self.name)
        if definition is None or definition.digest != self.digest:
            what = "is not there" if definition is None else "is not the one that was planned with"
            raise UsageError(f"the function {self.name} {what}: convert with --recipe FILE.py, the file that has it, in one process")
        return definition

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        definition = self.definition
        dtype = parse_dtype(definition.dtype) if definition.dtype else inputs[0].dtype
        shapes = [spec.shape for spec in inputs]
        if definition.tiled and len(set(shapes)) != 1:
            raise CoverageError(f"{self.label} takes tensors of one shape, found {', '.join(map(str, inputs))}")
        if definition.shape is None:
            return TensorSpec(dtype, shapes[0])
        try:
            shape = tuple(int(size) for size in definition.shape(*shapes, **self._given))
        except Exception as error:
            raise CoverageError(f"{self.label}: its shape for {', '.join(map(str, inputs))}: {type(error).__name__}: {error}") from error
        return TensorSpec(dtype, shape)

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:  # noqa: ARG002
        import ml_dtypes  # noqa: F401 - loaded before the process is measured

        require(self.definition.framework, self.label)

    @property
    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = json.loads(self.parameters)
        return given

    def _call(self, parts: Sequence[Values], spec: TensorSpec) -> Array:
        """What the function makes of these, as unsigned integers. Raises RunError: it fails, or makes something else."""
        definition = self.definition
        arrays = [part.torch() if definition.framework == "torch" else part.numpy() for part in parts]
        try:
            result = definition.call(*arrays, **self._given)
        except StreamconvError:
            raise
        except Exception as error:
            raise RunError(f"{self.label}: {type(error).__name__}: {error}") from error
        made = TensorSpec(parse_dtype(result.dtype), tuple(result.shape))
        if made != spec:
            raise RunError(f"{self.label} has made {made}, declared is {spec}: mend what is said of its dtype and shape")
        if definition.framework == "torch":
            torch = require("torch", self.label)
            result = result.detach().contiguous().view(getattr(torch, f"int{8 * spec.dtype.itemsize}")).numpy()
        import numpy as np

        return np.ascontiguousarray(result).reshape(spec.shape).view(f"u{spec.dtype.itemsize}")


@dataclass(frozen=True)
class Function(_Function):
    """A function of whole tensors, called once for each tensor that it makes."""

    kind: ClassVar[str] = "function"

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:  # noqa: ARG002
        strides = [packed_strides(spec.shape) for spec in inputs]
        return [Move(spec.shape, 0, rows, 0, rows) for spec, rows in zip(inputs, strides, strict=True)]

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        return int(self.infer(inputs).nbytes * (1 + self.definition.scratch))

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        from numpy.lib.stride_tricks import as_strided

        spec = self.infer([TensorSpec(part.dtype, part.items.shape) for part in parts])
        flat = self._call(parts, spec).reshape(-1)
        strides = [step * flat.itemsize for step in region.src_strides]
        out.items[...] = as_strided(flat[region.src :], region.sizes, strides, writeable=False)
        return 0


@dataclass(frozen=True)
class TiledFunction(_Function, Elementwise):
    """A function of pieces, each of which it makes of the same elements of its tensors."""

    kind: ClassVar[str] = "tiled_function"

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        from streamconv.graph.casts import PIECE

        definition = self.definition
        own = PIECE * (parse_dtype(definition.dtype) if definition.dtype else inputs[0].dtype).itemsize
        return int(own * (1 + definition.scratch)) + PIECE * sum(spec.dtype.itemsize for spec in inputs)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:  # noqa: ARG002
        for *operands, result in self._pieces(parts, out):
            given = [Values(operand, part.dtype) for operand, part in zip(operands, parts, strict=True)]
            result[...] = self._call(given, TensorSpec(out.dtype, result.shape))
        return 0

    def _pieces(self, parts: Sequence[Values], out: Values) -> Iterator[tuple[Array, ...]]:
        """The same elements of all, in one piece of memory for each operand, as libraries take them."""
        import numpy as np

        from streamconv.graph.casts import pieces

        for *operands, result in pieces(*(part.items for part in parts), out.items):
            yield (*map(np.ascontiguousarray, operands), result)
