"""Ops that decode matrices box by box: any region of what they make, by plain arithmetic on all of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.graph import casts, codes
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes, evaluate, reads
from streamconv.graph.moves import Move, identity, packed_strides
from streamconv.graph.node import AnyNode, Extent, Source, apply
from streamconv.graph.ops import AddProducts, DequantizeFloats, DequantizeIntegers, DequantizeQuantiles, Magnify, tabulated
from streamconv.graph.ops.boxes import Boxed
from streamconv.graph.ops.tabulated import Table, Tabulated

BF16 = np.dtype(ml_dtypes.bfloat16)


class Stored:
    """Arrays as stored tensors."""

    def __init__(self) -> None:
        self._data = b""

    def add(self, array: np.ndarray, dtype: str = "") -> Source:
        spec = TensorSpec(DTYPES[dtype or array.dtype.name], array.shape)
        extent = Extent("x", len(self._data), array.nbytes)
        self._data += array.tobytes()
        return Source(spec, (extent,))

    def read(self, path: str, offset: int, view: memoryview) -> None:
        assert path == "x"
        view[:] = self._data[offset : offset + len(view)]


def region_of(node: AnyNode, stored: Stored, move: Move) -> np.ndarray:
    """A region of a node, in memory of its own."""
    asked = []

    def read(path: str, offset: int, view: memoryview) -> None:
        asked.append((path, offset, len(view)))
        stored.read(path, offset, view)

    itemsize = node.spec.dtype.itemsize
    out = np.zeros(move.numel, f"u{itemsize}")
    evaluate(node, move, out, Arena(arena_bytes(node, move.numel * itemsize, scattered=True)), read)
    told = {byte for _, offset, count in reads(node, move) for byte in range(offset, offset + count)}
    assert told == {byte for _, offset, count in asked for byte in range(offset, offset + count)}
    return out.reshape(move.sizes)


def pack(integers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Words of unsigned integers along an axis, one little-endian string of bits, bit by bit."""
    lines = np.moveaxis(integers, axis, -1)
    *outer, count = lines.shape
    words = np.zeros((*outer, -(-count * bits // 32)), np.uint32)
    for i, bit in itertools.product(range(count), range(bits)):
        at = i * bits + bit
        words[..., at // 32] |= (lines[..., i].astype(np.uint32) >> np.uint32(bit) & np.uint32(1)) << np.uint32(at % 32)
    return (
        np.moveaxis(words, -1, axis).view(np.int32)
        if words.flags.c_contiguous
        else np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)
    )


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Move:
    """Any box with steps of a tensor, with its axes in any order, or a run of it."""
    numel = int(np.prod(shape))
    if draw(st.booleans()):
        start = draw(st.integers(0, numel - 1))
        return Move((draw(st.integers(1, numel - start)),), 0, (1,), start, (1,))
    stride, sizes, strides, src = numel, [], [], 0
    for size in shape:
        stride //= size
        start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 3))
        sizes.append(draw(st.integers(1, -(-(size - start) // step))))
        strides.append(step * stride)
        src += start * stride
    order = draw(st.permutations(range(len(shape))))
    sizes, strides = [sizes[k] for k in order], [strides[k] for k in order]
    dst_strides = tuple(int(np.prod(sizes[k + 1 :])) for k in range(len(sizes)))
    return Move(tuple(sizes), 0, dst_strides, src, tuple(strides))


def take(whole: np.ndarray, move: Move) -> np.ndarray:
    flat = np.ascontiguousarray(whole).reshape(-1)
    return np.lib.stride_tricks.as_strided(flat[move.src :], move.sizes, [s * flat.itemsize for s in move.src_strides])


def check(data: st.DataObject, op: Boxed, stored: Stored, inputs: list[Source], expected: np.ndarray) -> None:
    """The region of a node is that of what it should be, in any pieces."""
    node = apply(op, *inputs)
    move = data.draw(regions(op.shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "PIECE", data.draw(st.sampled_from([1 << 17, 7, 64])))
        made = region_of(node, stored, move)
    assert made.tobytes() == take(expected, move).view(made.dtype).tobytes()


def rng_of(data: st.DataObject) -> np.random.Generator:
    return np.random.default_rng(data.draw(st.integers(0, 1 << 30)))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_integers_with_scales_and_zero_points(data: st.DataObject) -> None:
    rng, bits = rng_of(data), data.draw(st.integers(1, 8))
    stack = data.draw(st.sampled_from([(), (3,)]))
    along = data.draw(st.sampled_from(["rows", "columns", "bytes"]))
    zeros = data.draw(st.sampled_from(["", "rows", "columns", "bytes"])) if along != "bytes" else data.draw(st.sampled_from(["", "bytes"]))
    shape = (*stack, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70)))
    block = (data.draw(st.sampled_from([1, 2, 100])), data.draw(st.sampled_from([1, 4, 32, 100])))
    scale_type = data.draw(st.sampled_from([np.float32, np.float16, BF16]))
    offset = data.draw(st.sampled_from([0, 1 << (bits - 1)]))
    block = (min(block[0], shape[-2]), min(block[1], shape[-1]))
    counts = (*stack, -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = rng.normal(size=counts).astype(scale_type)
    codes = rng.integers(0, 1 << bits, shape, np.uint8) if along != "bytes" else rng.integers(-128, 128, shape).astype(np.int8)
    points = rng.integers(0, 1 << bits, counts, np.uint8) if zeros != "bytes" else rng.integers(-8, 8, counts).astype(np.int8)
    stored = Stored()
    packed = codes if along == "bytes" else pack(codes, bits, -2 if along == "rows" else -1)
    inputs = [stored.add(packed), stored.add(scales)]
    if zeros:
        inputs.append(stored.add(points if zeros == "bytes" else pack(points, bits, -2 if zeros == "rows" else -1)))

    def wide(values: np.ndarray) -> np.ndarray:
        return values.repeat(block[0], -2)[..., : shape[-2], :].repeat(block[1], -1)[..., : shape[-1]]

    whole = codes.astype(np.float32)
    taken = wide(points).astype(np.float32) if zeros else np.float32(0 if along == "bytes" else offset)
    if zeros == "bytes" and along != "bytes":
        taken = taken + 0
    product = ((whole - taken) * wide(scales).astype(np.float32)).astype(scale_type)
    op = DequantizeIntegers(shape, "float32", bits, along, block, zeros, offset)
    check(data, op, stored, inputs, product.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_integers_whose_rows_have_a_group_each(data: st.DataObject) -> None:
    """As GPTQ has them: codes along rows, zero points along columns, one more than is stored, and the group of each row."""
    rng, bits = rng_of(data), data.draw(st.sampled_from([2, 3, 4, 8]))
    rows, columns, groups = 32 * data.draw(st.integers(1, 2)), 32 * data.draw(st.integers(1, 2)), 4
    codes = rng.integers(0, 1 << bits, (rows, columns), np.uint8)
    points = rng.integers(0, (1 << bits) - 1, (groups, columns), np.uint8)
    scales = rng.normal(size=(groups, columns)).astype(np.float16)
    index = rng.integers(0, groups, rows, np.int32)
    stored = Stored()
    inputs = [stored.add(pack(codes, bits, 0)), stored.add(scales), stored.add(pack(points, bits, 1)), stored.add(index)]
    difference = codes.astype(np.float32) - (points[index].astype(np.float32) + 1)
    product = (difference * scales[index].astype(np.float32)).astype(np.float16)
    op = DequantizeIntegers((rows, columns), "float16", bits, "rows", (rows // groups, 1), "columns", 0, 1, "rows")
    check(data, op, stored, inputs, product)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_small_floats_with_scales(data: st.DataObject) -> None:
    rng = rng_of(data)
    codes = data.draw(st.sampled_from(["float4_e2m1fn", "float6_e2m3fn", "float8_e4m3fn", "int8"]))
    stack = data.draw(st.sampled_from([(), (2,)]))
    per, nbytes = DTYPES[codes].block, DTYPES[codes].nbytes
    shape = (*stack, data.draw(st.integers(1, 9)), per * data.draw(st.integers(1, 24)))
    block = (data.draw(st.sampled_from([1, 4])), data.draw(st.sampled_from([4, 16, 96])))
    shared = data.draw(st.sampled_from(["", "divides", "multiplies"]))
    block = (min(block[0], shape[-2]), min(block[1], shape[-1]))
    counts = (*stack, -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    octets = rng.integers(0, 256, (*shape[:-1], shape[-1] // per * nbytes), np.uint8)
    scales = rng.uniform(0.5, 2, counts).astype(BF16)
    stored = Stored()
    inputs = [stored.add(octets), stored.add(scales)]
    whole = np.float32(1.25)
    if shared:
        inputs.append(stored.add(np.array([whole])))
    if codes == "int8":
        numbers = octets.view(np.int8).astype(np.float32)
    elif codes == "float8_e4m3fn":
        numbers = octets.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elif codes == "float4_e2m1fn":
        numbers = np.stack([octets & 15, octets >> 4], -1).reshape(shape).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    else:
        text = octets.reshape(*shape[:-1], -1, 3).astype(np.uint32)
        string = text[..., 0] | text[..., 1] << 8 | text[..., 2] << 16
        fields = np.stack([string >> 6 * k & 63 for k in range(4)], -1).reshape(shape).astype(np.uint8)
        numbers = fields.view(ml_dtypes.float6_e2m3fn).astype(np.float32)
    factors = scales.astype(np.float32)
    factors = factors / whole if shared == "divides" else factors * whole if shared else factors
    wide = factors.repeat(block[0], -2)[..., : shape[-2], :].repeat(block[1], -1)[..., : shape[-1]]
    through = data.draw(st.sampled_from(["", "float32", "bfloat16"]))
    product = (numbers * wide).astype(BF16 if through != "float32" else np.float32).astype(np.float16)
    op = DequantizeFloats(shape, "float16", codes, block, through, shared)
    nan = np.isnan(product)
    expected = product.view(np.uint16).copy()
    expected[nan] = 0x7E00
    check(data, op, stored, inputs, expected)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_quantiles_of_blocks(data: st.DataObject) -> None:
    rng, numel = rng_of(data), 2 * data.draw(st.integers(1, 400))
    block, inner = data.draw(st.sampled_from([4, 64])), data.draw(st.sampled_from([0, 3]))
    table = tuple(float(value) for value in np.sort(rng.uniform(-1, 1, 16).astype(np.float32)))
    codes = rng.integers(0, 16, numel, np.uint8)
    count = -(-numel // block)
    stored = Stored()
    inputs = [stored.add(codes[::2] << 4 | codes[1::2])]
    offset = np.float32(0.3)
    if inner:
        numbers = rng.integers(0, 256, count, np.uint8)
        beside = rng.uniform(0.5, 2, -(-count // inner)).astype(np.float32)
        listed = rng.normal(size=256).astype(np.float32)
        inputs += [stored.add(numbers), stored.add(beside), stored.add(listed)]
        largest = listed[numbers] * beside.repeat(inner)[:count] + offset
    else:
        largest = rng.uniform(0.5, 2, count).astype(np.float32)
        inputs.append(stored.add(largest))
    product = np.array(table, np.float32)[codes] * largest.repeat(block)[:numel]
    op = DequantizeQuantiles((1, numel), "float32", table, block, "bfloat16", inner, float(offset) if inner else 0.0)
    check(data, op, stored, inputs, product.astype(BF16).astype(np.float32).reshape(1, numel))


@given(st.integers(0, 40), st.integers(1, 60), st.integers(1, 17), st.integers(1, 3), st.booleans())
def test_what_blocks_share_is_multiplied_in_place_as_if_each_element_had_it(first, width, count, step, by_row):
    columns = range(first, first + width * step, step)
    rng = np.random.default_rng(first)
    values = rng.standard_normal((2, 3, width), np.float32)
    factors = rng.standard_normal((2, 3 if by_row else 1, columns[-1] // count - first // count + 1), np.float32)
    wanted = values * factors[..., [column // count - first // count for column in columns]]
    if count == 1:  # then those of the columns are given
        factors = factors[..., ::step]
    assert np.array_equal(codes.multiply(values, factors, columns, count), wanted)
    assert np.array_equal(values, wanted)


def test_lines_of_a_wide_matrix_are_not_cut():
    """They take all of what its lines share, however wide that is."""
    op = AddProducts((300, 20_000), "float32", (16,), 1.0)
    inputs = [TensorSpec(DTYPES["float32"], shape) for shape in ((300, 20_000), (300, 16), (16, 20_000))]
    for region in (identity(4_000_000, 7), identity(20_000), identity(100)):
        assert list(op.cut(region, inputs)) == [region]
    assert op.reach(100, inputs)[2] < 16 * 20_000


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_looked_up_is_what_is_computed(data: st.DataObject) -> None:
    """Of regions of whole blocks in their order, of any scales, those that are infinite or NaN, too."""
    rng, per = rng_of(data), data.draw(st.sampled_from([1, 2, 4]))
    stack = data.draw(st.sampled_from([(), (3,)]))
    rows, blocks, block = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), 32 * data.draw(st.integers(1, 2))
    shape, dtype = (*stack, rows, blocks * block), data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    stored, counts = Stored(), (*stack, rows, blocks)
    octets = rng.integers(0, 256, (*stack, rows, blocks * block // per), np.uint8)
    shared, is_any = "", data.draw(st.booleans())

    def some(count: int, shape: tuple[int, ...]) -> np.ndarray:
        """Any scales of as many, or such as are about one."""
        return rng.integers(0 if is_any else count * 7 // 16, count if is_any else count * 7 // 16 + 9, shape, np.uint16)

    op: Tabulated
    if data.draw(st.booleans()):
        scales = data.draw(st.sampled_from([np.float16, BF16]))
        inputs = [stored.add(octets.view(np.int32)), stored.add(some(1 << 16, counts).view(scales))]
        op = DequantizeIntegers(shape, dtype, 8 // per, "columns", (1, block), "", 1 << 8 // per - 1)
    else:
        per, codes = (2, "float4_e2m1fn") if per == 2 else (1, "float8_e4m3fn")
        shape = (*stack, rows, octets.shape[-1] * per)
        block = shape[-1] // blocks
        shared = data.draw(st.sampled_from(["", "multiplies"]))
        kind = data.draw(st.sampled_from([ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn]))
        inputs = [stored.add(octets), stored.add(some(1 << 8, counts).astype(np.uint8).view(kind))]
        inputs += [stored.add(np.array([np.float32(1.25)]))] if shared else []
        op = DequantizeFloats(shape, dtype, codes, (1, block), data.draw(st.sampled_from(["", "float32"])) if not shared else "", shared)
    node, numel = apply(op, *inputs), int(np.prod(shape))
    first = data.draw(st.integers(0, numel // shape[-1] - 1)) if not stack else 0
    move = identity(numel - first * shape[-1], first * shape[-1])
    if data.draw(st.booleans()):  # of all, its axes in another order
        order = data.draw(st.permutations(range(len(shape))))
        strides = packed_strides(shape)
        sizes = tuple(shape[axis] for axis in order)
        move = Move(sizes, 0, packed_strides(sizes), 0, tuple(strides[axis] for axis in order))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        look_up = Tabulated._look_up
        patch.setattr(Tabulated, "_look_up", lambda *given: found.append(look_up(*given)) or found[-1])
        patch.setattr(tabulated, "_SHARE", data.draw(st.sampled_from([1, 1e-6, 1e-6])))
        patch.setattr(tabulated, "_PIECE", data.draw(st.sampled_from([1 << 16, 40])))
        looked_up = region_of(node, stored, move)
        patch.setattr(Tabulated, "_look_up", lambda *_: False)
        assert looked_up.tobytes() == region_of(node, stored, move).tobytes()
    assert len(found) == 1
    event(f"looked up: {found[0]}")


def test_scales_that_come_again_are_looked_up_and_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is one of all tensors of a kind, and takes no more scales than it has room for, nor any that makes values too large."""
    monkeypatch.setattr(tabulated, "_TABLE", 8 * 256 * 4)
    op = DequantizeFloats((1, 1 << 12), "bfloat16", "float4_e2m1fn", (1, 1 << 12), "float32")
    table = Table(op._of_a_byte, "uint8", "bfloat16")
    values = np.linspace(1, 2, 9, dtype=np.float32).astype(BF16).view(np.uint16)
    rows = table.rows_of(values[[0, 3, 0]], 1 << 12)
    assert rows is not None
    assert rows[0] == rows[2] != rows[1]
    assert table.rows_of(values[:1], 0) is not None
    assert table.rows_of(values[1:2], 511) is None
    large = np.array([60_000], np.float32).astype(BF16).view(np.uint16)  # six times that is no float16
    with np.errstate(over="ignore"):
        assert Table(replace(op._of_a_byte, dtype="float16"), "uint8", "bfloat16").rows_of(large, 1 << 12) is None
    assert table.rows_of(values[:8], 1 << 12) is not None
    assert table.rows_of(values, 1 << 12) is None
    pairs = table.items.reshape(-1, 256)[rows[1] // 256].view(np.uint16).view(BF16).reshape(256, 2)
    assert pairs[0x21].tolist() == [np.float32(0.5) * values.view(BF16)[3], np.float32(1) * values.view(BF16)[3]]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_products_are_the_same_in_any_region(data: st.DataObject) -> None:
    """To the last bit: in which order BLAS adds up depends on the processor, and on where in a block an element is."""
    rng, rank, shape = rng_of(data), data.draw(st.sampled_from([3, 16, 70])), (45, 150)
    stored = Stored()
    weight, up, down = (rng.standard_normal(sizes, np.float32) for sizes in (shape, (shape[0], rank), (rank, shape[1])))
    inputs = [stored.add(array) for array in (weight, up, down)]
    op = AddProducts(shape, "float32", (rank,), 0.7)
    expected = region_of(apply(op, *inputs), stored, identity(weight.size)).reshape(shape)
    assert np.allclose(expected.view(np.float32), weight + np.float32(0.7) * (up @ down), atol=1e-4)
    check(data, op, stored, inputs, expected)
    lines = rng.uniform(0.5, 2, (shape[0], 1)).astype(np.float32)
    magnified = Magnify(shape, "float32", (rank,), 0.7)
    inputs.append(stored.add(lines))
    whole = region_of(apply(magnified, *inputs), stored, identity(weight.size)).reshape(shape)
    check(data, magnified, stored, inputs, whole)
