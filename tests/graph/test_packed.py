"""Types that pack elements into blocks: layouts move whole blocks, and nothing makes numbers of them."""

from __future__ import annotations

import numpy as np
import pytest

from streamconv.dtypes import DTYPES, DType, TensorSpec, read_dtype, write_dtype
from streamconv.errors import CoverageError, FormatError, UsageError
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes, evaluate
from streamconv.graph.moves import identity
from streamconv.graph.node import AnyNode, Extent, Source, apply, items_of, rearrange
from streamconv.graph.ops import Cast, Rearrange

QUANT = DType("toy_q4", 18, 32)  # a scale and 32 numbers
F4 = DTYPES["float4_e2m1fn"]


class Stored:
    """Tensors of random blocks, each in a file of its own."""

    def __init__(self) -> None:
        self.bytes: dict[str, np.ndarray] = {}

    def source(self, dtype: DType, *shape: int) -> Source:
        spec, path = TensorSpec(dtype, shape), f"/{len(self.bytes)}"
        self.bytes[path] = np.random.default_rng(len(self.bytes)).integers(0, 256, spec.nbytes, dtype=np.uint8)
        return Source(spec, (Extent(path, 0, spec.nbytes),))

    def blocks(self, source: Source) -> np.ndarray:
        """Its blocks along the last axis, of bytes."""
        *outer, last = source.spec.shape
        return self.bytes[source.extents[0].path].reshape(*outer, last // source.spec.dtype.block, source.spec.dtype.nbytes)

    def evaluate(self, node: AnyNode) -> np.ndarray:
        """All of a node's bytes."""
        items = items_of(node)
        out = np.zeros(items.spec.numel, "u1")

        def read(path: str, offset: int, view: memoryview) -> None:
            view[:] = self.bytes[path][offset : offset + len(view)].data

        evaluate(items, identity(items.spec.numel), out, Arena(arena_bytes(items, items.spec.nbytes, scattered=True)), read)
        return out


def layout(text: str, *inputs: AnyNode, output: int = 0, **sizes: int) -> AnyNode:
    return rearrange(Rearrange(text, {"1": 1, **sizes}, (1,) * len(inputs), output), inputs)


@pytest.mark.parametrize("dtype", [QUANT, F4, DTYPES["float6_e2m3fn"]], ids=str)
def test_layouts_move_whole_blocks(dtype):
    stored, n = Stored(), 3 * dtype.block
    a, b = stored.source(dtype, 4, n), stored.source(dtype, 2, n)
    joined = layout("r c, s c -> (r + s) c", a, b, r=4, s=2, c=n)
    assert joined.spec == TensorSpec(dtype, (6, n))
    both = np.concatenate([stored.blocks(a), stored.blocks(b)])
    assert stored.evaluate(joined).tobytes() == both.tobytes()
    swapped = layout("(h two) c -> (two h) c", joined, h=3, two=2, c=n)  # a layout of a layout
    assert stored.evaluate(swapped).tobytes() == both.reshape(3, 2, 3, -1).swapaxes(0, 1).tobytes()
    narrow = stored.source(dtype, 4, dtype.block)
    wide = layout("r c, r d -> r (c + d)", a, narrow, r=4, c=n, d=dtype.block)
    assert wide.spec.shape == (4, n + dtype.block)
    assert stored.evaluate(wide).tobytes() == np.concatenate([stored.blocks(a), stored.blocks(narrow)], axis=1).tobytes()
    left = layout("r (k c) -> k r c", a, r=4, k=3, c=dtype.block)
    assert stored.evaluate(left).tobytes() == stored.blocks(a).swapaxes(0, 1).tobytes()
    assert layout("r c -> r c", a, r=4, c=n) is a


def test_what_would_take_blocks_apart_is_refused():
    stored = Stored()
    a, other = stored.source(QUANT, 64, 64), stored.source(DTYPES["float32"], 64, 64)
    with pytest.raises(CoverageError, match=r"takes blocks apart along \.\.\.: toy_q4 packs 32 elements into 18 bytes"):
        layout("r c -> c r", a, r=64, c=64)
    with pytest.raises(CoverageError, match="takes blocks apart along c: toy_q4 packs"):
        layout("r (k c) -> k r c", a, r=64, k=4, c=16)
    with pytest.raises(CoverageError, match="of dtypes float32, toy_q4 cannot become one"):
        layout("r c, s c -> (r + s) c", a, other, r=64, s=64, c=64)
    with pytest.raises(CoverageError, match="cannot cast toy_q4 to float32"):
        apply(Cast("float32"), a)
    with pytest.raises(UsageError, match="toy_q4 packs 32 elements into 18 bytes: such tensors can be copied, not computed with"):
        _ = QUANT.itemsize


def test_a_text_says_all_of_a_type():
    for dtype in (*DTYPES.values(), QUANT):
        assert read_dtype(write_dtype(dtype)) == dtype
    assert write_dtype(QUANT) == "toy_q4:18/32"
    for text in ("toy_q4", "toy_q4:0/32", "toy_q4:18/0", "float32:2/1", "a:1/2/3", "a:1", ":1/2"):
        with pytest.raises(FormatError, match="unknown dtype"):
            read_dtype(text)


def test_a_tensor_consists_of_whole_blocks():
    assert TensorSpec(QUANT, (2, 64)).nbytes == 2 * 2 * 18
    assert not TensorSpec(QUANT, (2, 8)).is_whole
    assert TensorSpec(F4, (2, 3)).is_whole
