"""Float8 matrices with the scales of blocks: which go together, how large blocks are, and what numbers they come to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, random_tensor, read, write

import streamconv
from streamconv.errors import CoverageError

FP8_CONFIG = {"quantization_config": {"quant_method": "fp8"}}
FP8, BF16, E8M0 = torch.float8_e4m3fn, torch.bfloat16, torch.float8_e8m0fnu


def dequantize(src, out, **settings):
    """What becomes of a checkpoint."""
    streamconv.convert(src, out, dequantize=True, max_memory="4GB", **settings)
    return read(out)


def codes(*shape, seed=0, dtype=FP8):
    """Finite numbers of one byte."""
    return (random_tensor(*shape, seed=seed) * 60).clamp(-440, 440).to(dtype)


@np.errstate(all="ignore")
def by_blocks(weight, scales, block, dtype=BF16):
    """The numbers of a matrix: a loop over its blocks, as the config has them."""
    values = weight.float().numpy()
    made = np.zeros_like(values)
    for i, top in enumerate(range(0, values.shape[0], block[0])):
        for j, left in enumerate(range(0, values.shape[1], block[1])):
            part = np.s_[top : top + block[0], left : left + block[1]]
            made[part] = values[part] * np.float32(scales[i, j].item())
    return torch.from_numpy(made).to(dtype)


def grid(shape, block):
    return tuple(-(-size // part) for size, part in zip(shape, block, strict=True))


# 576 rows are those of DeepSeek-V3's kv_a_proj_with_mqa; 7168 x 18432 of its dense layers, 1536 x 7168 of q_a_proj, a fiftieth of each.
SHAPES = {"kv_a": (576, 96), "up": (369, 144), "down": (144, 369), "q_a": (31, 144), "o": (144, 328), "small": (5, 3)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 32), (100, 7)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16, torch.float16])
def test_blocks_are_as_large_as_the_config_says_and_cut_off_at_the_edges(tmp_path, block, scale_dtype):
    stored, wanted = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        weight = f"layers.0.{name}.weight"
        scales = (random_tensor(*grid(shape, block), seed=seed).abs() + 0.01).to(scale_dtype)
        stored |= {weight: codes(*shape, seed=seed), f"{weight}_scale_inv": scales}
        wanted[weight] = by_blocks(stored[weight], scales, block)
    for name, dtype in (("norm.weight", BF16), ("gate.e_score_correction_bias", torch.float32), ("count", torch.int64)):
        stored[name] = wanted[name] = torch.arange(6).to(dtype)
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [*block]}}
    src = write(tmp_path / "x", stored, config=config, shards=3)
    assert_same(dequantize(src, tmp_path / "out"), wanted)


@pytest.mark.parametrize("where", ["text_config", "modules", "dict"])
def test_block_sizes_may_be_those_of_the_text_model_or_of_modules(tmp_path, where):
    shapes = {"language_model.layers.1.up_proj": (70, 50), "language_model.layers.1.experts.7.up_proj": (70, 50)}
    other = (32, 16) if where != "text_config" else (64, 64)
    stored, wanted = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        block = other if "experts" in name else (64, 64)
        scales = random_tensor(*grid(shape, block), seed=seed)
        stored |= {f"{name}.weight": codes(*shape, seed=seed), f"{name}.weight_scale_inv": scales}
        wanted[f"{name}.weight"] = by_blocks(stored[f"{name}.weight"], scales, block)
    quantization = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    if where == "modules":
        quantization["modules"] = {"language_model.layers.*.experts.*": {"weight_block_size": [32, 16]}}
    elif where == "dict":
        quantization["weight_block_size"] = {"": [64, 64], "experts": [32, 16]}
    config = {"quantization_config": quantization}
    src = write(tmp_path / "x", stored, config={"text_config": config} if where == "text_config" else config)
    assert_same(dequantize(src, tmp_path / "out"), wanted)


def one(weight, scales, config=None, *, suffix="_scale_inv", **others):
    """A checkpoint of one matrix."""
    stored = {"a.weight": weight, f"a.weight{suffix}": scales, **others}
    return stored, {"quantization_config": {"quant_method": "fp8", **(config or {})}}


@pytest.mark.parametrize("said", [{"weight_block_size": None}, {}])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)])
def test_one_scale_for_a_matrix_or_one_for_each_row(tmp_path, shape, suffix, said):
    weight, scales = codes(24, 10), random_tensor(*shape).abs() + 0.1
    stored, config = one(weight, scales, said, suffix=suffix, **{"a.input_scale": torch.tensor(2.0), "b.k_scale": torch.ones(1)})
    src = write(tmp_path / "x", stored, config=config)
    rows = scales.reshape(-1, 1) if scales.numel() > 1 else scales.reshape(1, 1).expand(24, 1)
    wanted = by_blocks(weight, rows, (1, 10))
    assert_same(dequantize(src, tmp_path / "out"), {"a.weight": wanted})


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0])
def test_exponents_as_scales(tmp_path, dtype):
    """2^(u-127), its smallest, a subnormal, included; 255 is no number, of bytes it is infinite."""
    exponents = torch.tensor([[0, 1, 126, 127], [128, 200, 254, 255]], dtype=torch.uint8)
    weight = codes(5, 13)
    weight[0, 0], weight[4, 12] = 1, 0
    stored, config = one(weight, exponents.view(dtype), {"weight_block_size": [3, 4], "scale_fmt": "ue8m0"})
    factors = torch.tensor([[math.ldexp(1, u - 127) for u in row] for row in exponents.int().tolist()], dtype=torch.float64)
    assert factors[0, 0] == 2.0**-127
    factors = factors.float()
    factors[1, 3] = math.inf if dtype == torch.uint8 else math.nan
    found = dequantize(write(tmp_path / "x", stored, config=config), tmp_path / "out")["a.weight"]
    wanted = by_blocks(weight, factors, (3, 4))
    assert found[0, 0] == 2.0**-127
    wanted[wanted.isnan()] = math.nan
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_stacks_of_matrices_have_blocks_of_their_own(tmp_path):
    weight, scales = codes(3, 20, 11), random_tensor(3, 3, 2)
    stored = {"mlp.experts.up_proj": weight, "mlp.experts.up_proj_scale_inv": scales}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    found = dequantize(write(tmp_path / "x", stored, config=config), tmp_path / "out")
    wanted = torch.stack([by_blocks(matrix, factors, (8, 8)) for matrix, factors in zip(weight, scales, strict=True)])
    assert_same(found, {"mlp.experts.up_proj": wanted})


@pytest.mark.parametrize("suffixes", [("weight", "scale"), ("weight", "qscale_weight"), ("weight", "weight_scale")])
def test_other_names_of_scales(tmp_path, suffixes):
    weight, scales = codes(6, 6), random_tensor(2, 2)
    stored = {f"a.{suffixes[0]}": weight, f"a.{suffixes[1]}": scales, "norm.scale": torch.ones(4)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    found = dequantize(write(tmp_path / "x", stored, config=config), tmp_path / "out")
    assert_same(found, {"a.weight": by_blocks(weight, scales, (4, 4)), "norm.scale": torch.ones(4)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, BF16])
def test_a_value_is_rounded_once_to_the_dtype_that_the_config_gives(tmp_path, dtype):
    weight, scales = codes(64, 64), random_tensor(1, 1) * 0.37
    stored, config = one(weight, scales, {"weight_block_size": [128, 128]})
    src = write(tmp_path / "x", stored, config={"dtype": str(dtype).removeprefix("torch."), **config})
    assert_same(dequantize(src, tmp_path / "out"), {"a.weight": by_blocks(weight, scales, (128, 128), dtype)})


def test_where_no_config_says_it_a_division_without_a_rest_is_believed(tmp_path):
    stored, wanted = {}, {}
    for name, shape, counts in (("a", (64, 96), (2, 3)), ("b", (32, 64), (1, 2)), ("c", (16, 320), (1, 10))):
        scales = random_tensor(*counts)
        stored |= {f"{name}.weight": codes(*shape), f"{name}.weight_scale_inv": scales}
        wanted[f"{name}.weight"] = by_blocks(stored[f"{name}.weight"], scales, (32, 32))
    assert_same(dequantize(write(tmp_path / "x", stored, config={}), tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({"a": ((576, 128), (5, 1))}, {}, ["a.weight", "576/5 rows", "weight_block_size"]),
        ({"a": ((192, 128), (2, 1)), "b": ((256, 128), (2, 1))}, {}, ["b.weight", "96 in a.weight", "weight_block_size"]),
        ({"a": ((200, 128), (2, 1)), "b": ((300, 128), (3, 1))}, {}, ["blocks of 100 rows", "so do blocks of 128", "weight_block_size"]),
        ({"a": ((192, 128), (2, 1))}, {"weight_block_size": [64, 64]}, ["64 x 64", "[3, 2]", "[2, 1]"]),
        ({"a": ((192, 128), (2,))}, {"weight_block_size": [96, 128]}, ["96 x 128", "[2, 1]", "[2]"]),
        ({"a": ((64, 64), (3, 3, 3))}, {}, ["a.weight", "do not go together"]),
        ({"a": ((64, 64), None)}, {"weight_block_size": [64, 64]}, ["a.weight", "there is no a.weight_scale_inv"]),
        ({"a": (None, (2, 2))}, {}, ["a.weight_scale_inv", "a.weight, which is not there"]),
        ({"a": ((64,), (1,))}, {}, ["a.weight", "expected a matrix"]),
        ({"a": ((64, 64), (1, 1))}, {"weight_block_size": [64]}, ["weight_block_size", "[64]", "two numbers"]),
        ({"a": ((64, 64), (1, 1))}, {"weight_block_size": [0, 64]}, ["weight_block_size", "two numbers"]),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(tmp_path, tensors, config, told):
    stored = {"norm": torch.ones(2)}
    for name, (shape, scales) in tensors.items():
        stored |= {f"{name}.weight": codes(*shape)} if shape else {}
        stored |= {f"{name}.weight_scale_inv": torch.ones(scales)} if scales else {}
    src = write(tmp_path / "x", stored, config={"quantization_config": {"quant_method": "fp8", **config}})
    with pytest.raises(CoverageError) as refused:
        dequantize(src, tmp_path / "out")
    assert all(text in str(refused.value) for text in told), refused.value
    assert not (tmp_path / "out").exists()


def test_scales_of_another_kind_are_refused_by_the_name_of_their_matrix(tmp_path):
    tensors = {"a.weight": codes(64, 64), "a.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}
    src = write(tmp_path / "x", tensors, config=FP8_CONFIG)
    with pytest.raises(
        CoverageError, match=r"a.weight with a.weight_scale_inv: the scales .* must be floats \[1, 1\], found int32\[1, 1\]"
    ):
        dequantize(src, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, BF16])
def test_scales_of_what_takes_none_are_refused(tmp_path, dtype):
    src = write(tmp_path / "x", {"a.weight": torch.ones(4, 4, dtype=dtype), "a.weight_scale_inv": torch.ones(1, 1)}, config=FP8_CONFIG)
    with pytest.raises(CoverageError, match=r"a.weight_scale_inv is the scale of a.weight, which is \w+\[4, 4\] and takes none"):
        dequantize(src, tmp_path / "out")
