"""Element types and tensor specs: names, widths, sizes in bytes. No tensor library is involved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamconv.errors import UsageError
from streamconv.text import did_you_mean


@dataclass(frozen=True, slots=True)
class DType:
    """An element type. ``bits`` may be below 8 (packed types); such tensors are only ever copied whole."""

    name: str
    bits: int
    floating: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one element.

        Raises:
            UsageError: the type packs several elements into a byte.
        """
        if self.bits % 8:
            raise UsageError(f"{self.name} packs elements of {self.bits} bits: such tensors can be copied, not rearranged or cast")
        return self.bits // 8

    def __str__(self) -> str:
        return self.name


def _table() -> dict[str, DType]:
    floats = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
    small = {f"float8_{kind}": 8 for kind in ("e5m2", "e4m3fn", "e8m0fnu", "e4m3fnuz", "e5m2fnuz")}
    packed = {"float6_e2m3fn": 6, "float6_e3m2fn": 6, "float4_e2m1fn": 4}
    whole = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)}
    other = {"bool": 8, "complex64": 64}
    types = [DType(name, bits, floating=True) for name, bits in (floats | small | packed).items()]
    types += [DType(name, bits) for name, bits in (whole | other).items()]
    return {dtype.name: dtype for dtype in types}


DTYPES = _table()
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
CASTABLE = ("float64", "float32", "float16", "bfloat16")


def dtype_name(given: object) -> str:
    """What a type of torch, numpy or ml_dtypes is called; a text as it is."""
    if isinstance(given, type):
        return given.__name__  # numpy.float16, ml_dtypes.bfloat16
    name = getattr(given, "name", None)  # numpy.dtype("float16")
    return name if isinstance(name, str) else str(given)


def parse_dtype(given: object) -> DType:
    """The type that ``float32``, ``fp32``, ``torch.float32`` ... name, or that torch or numpy have.

    Raises:
        UsageError: no such type.
    """
    text = dtype_name(given)
    name = text.strip().lower().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        hint = did_you_mean(name, [*_SHORT, *DTYPES])
        raise UsageError(f"unknown dtype {text!r}{hint or '; it is one that inspect shows'}, such as {', '.join(CASTABLE)}")
    return DTYPES[name]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its data: dtype and shape; ``nbytes`` of its row-major form."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.bits // 8

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"
