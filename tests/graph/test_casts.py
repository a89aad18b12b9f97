"""Values that numpy makes are those of torch, to the bit: casts, arithmetic, scaled codes, sampled rows, low-rank matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.graph import casts
from streamconv.graph.arena import Arena
from streamconv.graph.arrays import as_values
from streamconv.graph.evaluate import arena_bytes, evaluate
from streamconv.graph.moves import identity
from streamconv.graph.node import Extent, Source, apply
from streamconv.graph.ops import Add, Cast, Compute, Dequantize, MergeLora, Op, SampleRows, Scale, Values, as_torch
from streamconv.graph.ops.sampled import _PRODUCTS

RNG = np.random.default_rng(1)
FP8 = [name for name, dtype in DTYPES.items() if name.startswith("float8")]


# Numbers that hold every case ------------------------------------------------------------------------------------------


def all_of(dtype: str) -> np.ndarray:
    """All values of a type of 8 or 16 bits."""
    bits = 8 * DTYPES[dtype].itemsize
    return np.arange(1 << bits, dtype=f"u{bits // 8}")


def hard_float32() -> np.ndarray:
    """Every sign, exponent and beginning of a mantissa, with ends below, at and above the ties of both types of 16 bits."""
    ends = {0, 1, 0xFFFF, *(tie + near for tie in (0x8000, 0x1000, 0x3000, 0x5000, 0xF000) for near in (-1, 0, 1))}
    return (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(sorted(ends), np.uint32)).reshape(-1)


def hard_float64() -> np.ndarray:
    """What lies at and beside the ties of narrower types, at the ends of their ranges, and any bits."""
    tops = [65504, 65519.99, 65520, 2.0**128 - 2.0**104, 2.0**128 - 2.0**103, 2.0**128 - 2.0**120, 2.0**128 - 2.0**119, 1e300, 5e-324]
    with np.errstate(all="ignore"):
        narrow = [as_values(all_of(dtype), dtype).astype(np.float64) for dtype in ("float16", "bfloat16")]
        narrow.append(RNG.integers(0, 1 << 32, 1 << 15, np.uint32).view(np.float32).astype(np.float64))
        narrow.append(np.arange(1, 1 << 10, dtype=np.uint32).view(np.float32).astype(np.float64))  # subnormal
        narrow.append(np.array(tops))
        numbers = np.concatenate([*narrow, *((numbers + np.roll(numbers, 1)) / 2 for numbers in narrow)])
        numbers = np.concatenate([numbers, *(numbers * (1 + 2.0**-bits) for bits in (9, 12, 25))])
        beside = [np.nextafter(numbers, end) for end in (np.inf, -np.inf)]
        numbers = np.concatenate([numbers, *beside, -numbers])
    nans = np.array([0x7FF0 << 48 | 1, 0xFFF0 << 48 | 1, 0x7FF8 << 48, 0xFFF8 << 48 | 7, 0x7FF0 << 48 | 1 << 40], np.uint64)
    return np.concatenate([numbers.view(np.uint64), nans, RNG.integers(0, 1 << 64, 1 << 17, np.uint64)])


def hard(dtype: str) -> np.ndarray:
    """Such values of a type, as unsigned integers."""
    return {"float32": hard_float32, "float64": hard_float64}.get(dtype, lambda: all_of(dtype))()


HARD = {dtype: hard(dtype) for dtype in (*CASTABLE, *FP8)}


# What torch makes of them ----------------------------------------------------------------------------------------------


def settled(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, every NaN the quiet one."""
    quiet = torch.where(tensor.isnan(), torch.full((), math.nan, dtype=tensor.dtype), tensor)
    return quiet.contiguous().view(torch.uint8).numpy().tobytes()


def overflows(operand: torch.Tensor, result: torch.Tensor) -> int:
    """How many are infinite in one and finite in the other."""
    return int((result.isinf() & operand.isfinite()).sum())


def run(op: Compute, region, out: np.ndarray, dtype: str, *parts: tuple[np.ndarray, str]) -> int:
    """Has an op fill ``out``; how many values became infinite."""
    values = [Values(items, DTYPES[name]) for items, name in parts]
    with np.errstate(all="ignore"):
        return op.values(region, values, Values(out, DTYPES[dtype]))


def places(numel: int, itemsize: int) -> list[np.ndarray]:
    """Memory for a matrix of 2 rows: packed, transposed, with gaps."""
    dtype = f"u{itemsize}"
    return [np.zeros((2, numel // 2), dtype), np.zeros((numel // 2, 2), dtype).T, np.zeros((2, numel // 2, 3), dtype)[:, :, 1]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("piece", [1 << 17, 1000])
@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(CASTABLE, 2)])
def test_casts_have_the_bits_of_torch(source, target, piece, monkeypatch):
    monkeypatch.setattr(casts, "PIECE", piece)
    items = HARD[source][: len(HARD[source]) // 2 * 2].reshape(2, -1)
    given = as_torch(items, DTYPES[source])
    wanted = given.to(getattr(torch, target))
    for out in places(items.size, DTYPES[target].itemsize):
        counted = run(Cast(target), None, out, target, (items, source))
        assert out.tobytes() == settled(wanted)
        assert counted == overflows(given, wanted)


def test_a_cast_to_its_own_type_keeps_all_bits():
    for dtype in CASTABLE:
        out = np.zeros_like(HARD[dtype])
        assert run(Cast(dtype), None, out, dtype, (HARD[dtype], dtype)) == 0
        assert out.tobytes() == HARD[dtype].tobytes()


@pytest.mark.parametrize("dtype", [*FP8, "float16", "bfloat16"])
def test_narrow_types_are_widened_as_torch_does(dtype):
    bits = HARD[dtype]
    for items in (bits, *np.array_split(bits, 8)):  # with and without what is not finite
        with np.errstate(all="ignore"):
            values = casts.widen(items, dtype).copy()
        assert settled(torch.from_numpy(values)) == settled(as_torch(items, DTYPES[dtype]).float())


NUMBERS = [-0.3, 2**0.5, 6e-8, 3e4, 65520.0, 1e39, -1e300, 1e-45]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("dtype", CASTABLE)
def test_arithmetic_has_the_bits_of_torch(dtype, value):
    numbers = HARD[dtype] if DTYPES[dtype].itemsize == 2 else RNG.choice(HARD[dtype], 1 << 17)
    items = numbers.reshape(2, -1)
    given = as_torch(items, DTYPES[dtype])
    made = {Add(value): given.clone().add_, Scale(value): given.clone().mul_, Scale(value, divide=True): given.clone().div_}
    for op, change in made.items():
        wanted = change(value)
        for out in places(items.size, DTYPES[dtype].itemsize):
            counted = run(op, None, out, dtype, (items, dtype))
            assert out.tobytes() == settled(wanted), op
            assert counted == overflows(given, wanted), op


# Scaled codes ----------------------------------------------------------------------------------------------------------


def factors(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents, of which 255 is infinite."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return torch.pow(2.0, scales.double() - 127).float().masked_fill(scales == 255, math.inf)


@pytest.mark.parametrize("target", CASTABLE)
@pytest.mark.parametrize("codes", FP8)
def test_scaled_codes_have_the_bits_of_torch(codes, target):
    for kind in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8"):
        scales = RNG.choice(HARD[kind] if kind in HARD else all_of("uint8"), 4 * 37).reshape(4, 37)
        matrix = RNG.integers(0, 256, (13, 512), np.uint8)
        op = Dequantize((13, 512), (4, 14), target)
        spread = factors(as_torch(scales, DTYPES[kind])).repeat_interleave(4, 0)[:13].repeat_interleave(14, 1)[:, :512]
        product = as_torch(matrix, DTYPES[codes]).float() * spread
        wanted = product.to(getattr(torch, target))
        out = np.zeros((13, 512), f"u{DTYPES[target].itemsize}")
        counted = run(op, identity(13 * 512), out.reshape(-1), target, (matrix.reshape(-1), codes), (scales, kind))
        assert out.tobytes() == settled(wanted), kind
        assert counted == overflows(product, wanted), kind


# Sums ------------------------------------------------------------------------------------------------------------------


def evaluated(op: Op, *inputs: tuple[np.ndarray, str]) -> torch.Tensor:
    """All that an op makes of arrays of values."""
    data = {str(k): array.tobytes() for k, (array, _) in enumerate(inputs)}

    def read(path, offset, view):
        view[:] = data[path][offset : offset + len(view)]

    specs = [TensorSpec(DTYPES[name], array.shape) for array, name in inputs]
    leaves = [Source(spec, (Extent(str(k), 0, spec.nbytes),)) for k, spec in enumerate(specs)]
    node = apply(op, *leaves)
    out = np.zeros(node.spec.numel, f"u{node.spec.dtype.itemsize}")
    evaluate(node, identity(node.spec.numel), out, Arena(arena_bytes(node, node.spec.nbytes)), read)
    return as_torch(out.reshape(node.spec.shape), node.spec.dtype)


def random_items(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Values of a type, of about the size that weights have."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.05).to(getattr(torch, dtype))
    return tensor.view(getattr(torch, f"int{8 * tensor.itemsize}")).numpy().view(f"u{tensor.itemsize}")


def same_but_for_last_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Sums of float64 in another order are near; rounded to a narrower type they are equal."""
    if found.dtype == torch.float64:
        return torch.allclose(found, wanted, rtol=1e-13, atol=1e-15)
    return settled(found) == settled(wanted)


def sampled_by_torch(matrix: torch.Tensor, op: SampleRows) -> torch.Tensor:
    """New rows, their sums by torch."""
    count, columns = matrix.shape
    block = op.block(TensorSpec(DTYPES["float32"], (count, columns)))
    normals = np.random.Generator(np.random.Philox(key=[op.seed, op.stream]))
    total, drawn = torch.zeros(op.rows + 1, columns, dtype=torch.float64), torch.zeros(op.rows + 1, dtype=torch.float64)
    for part in matrix.double().split(block):
        z = torch.ones(op.rows + 1, len(part), dtype=torch.float64)
        normals.standard_normal(out=z[: op.rows].numpy())
        drawn += z.sum(1)
        total.addmm_(z, part)
    mean = total[op.rows].div_(count)
    return total[: op.rows].addr_(drawn[: op.rows], mean, alpha=-1).mul_(math.sqrt(1e-5 / count)).add_(mean).to(getattr(torch, op.dtype))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", CASTABLE)
@pytest.mark.parametrize(("shape", "rows"), [((200, 12), 5), ((3000, 700), 64), ((7, 3), 1), ((70_000, 5), 64), ((3, 9000), 2)])
def test_sampled_rows_are_those_of_torch(shape, rows, dtype):
    op, items = SampleRows(rows, 11, 3, dtype), random_items(shape, dtype, 5)
    assert same_but_for_last_bits(evaluated(op, (items, dtype)), sampled_by_torch(as_torch(items, DTYPES[dtype]), op))


def test_what_is_not_finite_spreads_without_a_word():
    items = random_items((9, 3), "float16", 5)
    items[4] = 0x7C00, 0x7D01, 0xFC00
    for op in (SampleRows(2, 0, 0, "bfloat16"), Cast("float64"), Add(1.0)):
        assert not evaluated(op, (items, "float16"))[1 if isinstance(op, SampleRows) else 4].isfinite().any()


@pytest.mark.parametrize("dtype", CASTABLE)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(300, 200, 16), (65, 1, 1), (1, 129, 200), (130, 70, 64)])
def test_low_rank_matrices_are_added_as_torch_does(rows, columns, rank, dtype):
    shapes, other = [(rows, columns), (rank, columns), (rows, rank)], {"float64": "float32"}.get(dtype, dtype)
    inputs = [(random_items(shape, name, seed), name) for seed, (shape, name) in enumerate(zip(shapes, (dtype, other, other), strict=True))]
    weight, down, up = (as_torch(items, DTYPES[name]).double() for items, name in inputs)
    wanted = (weight + 8 / rank * (up @ down)).to(getattr(torch, dtype))
    assert same_but_for_last_bits(evaluated(MergeLora(8, rows, columns, rank), *inputs), wanted)


def test_products_stay_with_one_thread():
    """OpenBLAS shares out products of more than 4 * 65536 multiplications, which could change their last bits."""
    from streamconv.graph.ops.lora import _BLOCK

    assert max(_PRODUCTS, _BLOCK**3) <= 4 << 16


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 60), st.data())
def test_pieces_are_all_of_an_array_once(sizes, most, data):
    order = data.draw(st.permutations(range(len(sizes))))
    numbers = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
    seen = np.zeros(numbers.shape, int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "PIECE", most)
        for piece, place in casts.pieces(numbers, seen):
            assert 0 < piece.size <= most
            assert piece.shape == place.shape
            np.add(place, 1, out=place)
    assert (seen == 1).all()
