"""Element types and tensor specs: names, widths, sizes in bytes. No tensor library is involved."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from streamconv.errors import FormatError, UsageError
from streamconv.text import did_you_mean


@dataclass(frozen=True, slots=True)
class DType:
    """What elements are stored as: ``nbytes`` bytes hold ``block`` elements, which is one but for packed types.

    A tensor of a packed type, such as float4_e2m1fn (2 elements in a byte) or a quantization's blocks with their scales in them (256 in
    144 bytes), consists of whole blocks. They are copied and rearranged as a whole; nothing is known of their numbers here.
    """

    name: str
    nbytes: int
    block: int = 1
    floating: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def is_packed(self) -> bool:
        return self.block > 1

    @property
    def itemsize(self) -> int:
        """Bytes of one element.

        Raises:
            UsageError: the type packs several elements into a block.
        """
        if self.is_packed:
            raise UsageError(f"{self.packing}: such tensors can be copied, not computed with")
        return self.nbytes

    @property
    def packing(self) -> str:
        """How a packed type stores elements, in words."""
        return f"{self.name} packs {self.block} elements into {self.nbytes} byte{'s' * (self.nbytes > 1)}"

    def __str__(self) -> str:
        return self.name


def _table() -> dict[str, DType]:
    floats = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    small = {f"float8_{kind}": 1 for kind in ("e5m2", "e4m3fn", "e8m0fnu", "e4m3fnuz", "e5m2fnuz")}
    packed = {"float6_e2m3fn": (3, 4), "float6_e3m2fn": (3, 4), "float4_e2m1fn": (1, 2)}
    whole = {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
    other = {"bool": 1, "complex64": 8}
    types = [DType(name, nbytes, floating=True) for name, nbytes in (floats | small).items()]
    types += [DType(name, nbytes, block, floating=True) for name, (nbytes, block) in packed.items()]
    types += [DType(name, nbytes) for name, nbytes in (whole | other).items()]
    return {dtype.name: dtype for dtype in types}


DTYPES = _table()
_BLOCKS = {
    "q4_0": (18, 32), "q4_1": (20, 32), "q5_0": (22, 32), "q5_1": (24, 32), "q8_0": (34, 32), "q2_k": (84, 256), "q3_k": (110, 256),
    "q4_k": (144, 256), "q5_k": (176, 256), "q6_k": (210, 256), "iq4_nl": (18, 32), "iq4_xs": (136, 256), "mxfp4_gguf": (17, 32),
}  # fmt: skip
BLOCK_TYPES = {name: DType(name, nbytes, block) for name, (nbytes, block) in _BLOCKS.items()}
"""GGUF's types of blocks, which hold their scales: bytes, and elements."""
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
CASTABLE = ("float64", "float32", "float16", "bfloat16")


def dtype_name(dtype: object) -> str:
    """What a type of torch, numpy or ml_dtypes is called; a text as it is."""
    if isinstance(dtype, type):
        return dtype.__name__  # numpy.float16, ml_dtypes.bfloat16
    name = getattr(dtype, "name", None)  # numpy.dtype("float16")
    return name if isinstance(name, str) else str(dtype)


def parse_dtype(dtype: object) -> DType:
    """The type that ``float32``, ``fp32``, ``torch.float32`` ... name, or that torch or numpy have.

    Raises:
        UsageError: no such type.
    """
    text = dtype_name(dtype)
    name = text.strip().lower().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        hint = did_you_mean(name, [*_SHORT, *DTYPES])
        raise UsageError(f"unknown dtype {text!r}{hint or '; it is one that inspect shows'}, such as {', '.join(CASTABLE)}")
    return DTYPES[name]


def write_dtype(dtype: DType) -> str:
    """A type as a text that says all of it: its name, and how one packs elements that others need not know: ``q4_k:144/256``."""
    return dtype.name if DTYPES.get(dtype.name) == dtype else f"{dtype.name}:{dtype.nbytes}/{dtype.block}"


def read_dtype(text: str) -> DType:
    """The type of a text that `write_dtype` wrote. (Whether one that others need not know is a floating one, no text says.)

    Raises:
        FormatError: there is none like that.
    """
    if text in DTYPES:
        return DTYPES[text]
    match = re.fullmatch(r"([^:]+):([1-9]\d{0,8})/([1-9]\d{0,8})", text)
    if match is None or match[1] in DTYPES:
        raise FormatError(f"unknown dtype {text!r}")
    return DType(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its data: dtype and shape; ``nbytes`` of its row-major form."""

    dtype: DType
    shape: tuple[int, ...]
    numel: int = field(init=False, repr=False, compare=False)
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:  # once: a plan asks each of its tensors several times
        numel = math.prod(self.shape)
        object.__setattr__(self, "numel", numel)
        object.__setattr__(self, "nbytes", numel // self.dtype.block * self.dtype.nbytes)

    def __hash__(self) -> int:
        return hash((self.dtype.name, self.shape))

    @property
    def is_whole(self) -> bool:
        """Whether its elements fill the blocks that they are packed into."""
        return self.numel % self.dtype.block == 0

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"
