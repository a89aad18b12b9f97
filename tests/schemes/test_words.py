"""Formats whose libraries are not at hand, by plain arithmetic on what the words of their specifications say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, write
from quantized_models import decompressed

import streamconv
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError, FormatError, UsageError
from streamconv.graph.codes import E2M1
from streamconv.graph.ops.op import from_json

INPUTS, OUTPUTS, GROUP = 256, 64, 128
RNG = np.random.default_rng(0)
VALUES = torch.tensor(E2M1)


def dequantize(folder: Path, tensors: dict[str, torch.Tensor], section: dict[str, object]) -> dict[str, torch.Tensor]:
    src = write(folder / "src", tensors, config={"dtype": "bfloat16", "quantization_config": section})
    streamconv.convert(src, folder / "out", dequantize=True, verify=True, max_memory=ROOMY)
    return read(folder / "out")


def in_words(integers: np.ndarray, bits: int) -> torch.Tensor:
    """Integers along the last axis as one little-endian string of bits for each row."""
    string = (integers[..., None] >> np.arange(bits) & 1).reshape(len(integers), -1).astype(np.uint8)
    return torch.from_numpy(np.packbits(string, axis=1, bitorder="little").view(np.int32))


def awq_words(integers: np.ndarray) -> torch.Tensor:
    words = np.zeros((integers.shape[0], integers.shape[1] // 8), np.uint32)
    for column, nibble in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        words |= integers[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    low_first = torch.stack([octets & 15, octets >> 4], -1)
    return low_first.reshape(*octets.shape[:-1], -1).long()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("moved", [False, True])
def test_gptq(tmp_path: Path, bits: int, version: str, moved: bool) -> None:
    plus = 0 if version == "gptq_v2" else 1
    codes = RNG.integers(0, 1 << bits, (INPUTS, OUTPUTS))
    zeros = RNG.integers(0, (1 << bits) - 1, (INPUTS // GROUP, OUTPUTS))
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).half() / 10
    groups = np.arange(INPUTS) // GROUP
    groups = RNG.permutation(groups) if moved else groups
    stored = {
        "m.qweight": in_words(codes.T, bits).t().contiguous(),
        "m.qzeros": in_words(zeros, bits),
        "m.scales": scales,
        "m.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    made = dequantize(tmp_path, stored, {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version})
    steps = torch.from_numpy((codes - (zeros + plus)[groups]).astype(np.float32)).half()
    assert torch.equal(made["m.weight"], (steps * scales[torch.from_numpy(groups)]).t().bfloat16())


def check_repacked(folder: Path, stored: dict[str, torch.Tensor], section: dict[str, object], preset: str, told: str) -> None:
    """What a preset makes of words of integers stands for the same numbers, and has the same integers."""
    src = write(folder / "src", stored, config={"dtype": "float16", "quantization_config": section})
    result = streamconv.convert(src, folder / "packed", quantize=preset, verify=True, max_memory=ROOMY)
    assert told in "\n".join(result.plan.notes)
    for name in ("src", "packed"):
        streamconv.convert(folder / name, folder / f"{name}-plain", dequantize=True, dtype="float16", max_memory=ROOMY)
    assert_same(read(folder / "packed-plain"), read(folder / "src-plain"))


def check_decompressed(folder: Path) -> None:
    """What compressed-tensors' decompressor makes of `check_repacked`'s are the source's numbers."""
    pytest.importorskip("compressed_tensors")
    assert_same(decompressed(folder / "packed"), read(folder / "src-plain"))


GPTQ = [(4, "W4A16"), (8, "W8A16"), (4, "W4A16_ASYM")]


@pytest.mark.oracle
@pytest.mark.parametrize(("bits", "preset"), GPTQ)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_compressed_tensors_reads_what_was_gptq(tmp_path: Path, bits: int, preset: str, version: str) -> None:
    test_gptq_in_words_of_compressed_tensors(tmp_path, bits, preset, version)
    check_decompressed(tmp_path)


@pytest.mark.oracle
def test_compressed_tensors_reads_what_was_awq(tmp_path: Path) -> None:
    test_awq_in_words_of_compressed_tensors(tmp_path)
    check_decompressed(tmp_path / "a")


@pytest.mark.parametrize(("bits", "preset"), GPTQ)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_in_words_of_compressed_tensors(tmp_path: Path, bits: int, preset: str, version: str) -> None:
    plus = 0 if version == "gptq_v2" else 1
    codes = RNG.integers(0, 1 << bits, (INPUTS, OUTPUTS))
    points = RNG.integers(1, 1 << bits, (INPUTS // GROUP, OUTPUTS)) if preset.endswith("ASYM") else np.full((2, OUTPUTS), 1 << bits - 1)
    stored = {
        "m.qweight": in_words(codes.T, bits).t().contiguous(),
        "m.qzeros": in_words(points - plus, bits),
        "m.scales": torch.rand(INPUTS // GROUP, OUTPUTS).half() / 10,
        "m.g_idx": torch.from_numpy((np.arange(INPUTS) // GROUP).astype(np.int32)),
    }
    section = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    check_repacked(tmp_path, stored, section, preset, "1 of 1 quantized weights hold the numbers of the source")
    made = read(tmp_path / "packed")
    assert torch.equal(made["m.weight_packed"], in_words(codes.T, bits))
    assert torch.equal(made["m.weight_scale"], stored["m.scales"].t())
    assert ("m.weight_zero_point" in made) == preset.endswith("ASYM")


def test_awq_in_words_of_compressed_tensors(tmp_path: Path) -> None:
    codes, points = RNG.integers(0, 16, (INPUTS, OUTPUTS)), RNG.integers(0, 16, (INPUTS // GROUP, OUTPUTS))
    stored = {
        "m.qweight": awq_words(codes),
        "m.qzeros": awq_words(points),
        "m.scales": torch.rand(INPUTS // GROUP, OUTPUTS).half() / 10,
    }
    section = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    check_repacked(tmp_path / "a", stored, section, "W4A16_ASYM", "1 of 1 quantized weights hold the numbers of the source")
    src = write(tmp_path / "b", stored, config={"dtype": "float16", "quantization_config": section})
    plan = streamconv.plan(src, tmp_path / "out", quantize="W4A16", max_memory=ROOMY)  # which has no zero points
    assert "nothing is rounded" not in "\n".join(plan.notes)


def test_awq(tmp_path: Path) -> None:
    codes, zeros = RNG.integers(0, 16, (INPUTS, OUTPUTS)), RNG.integers(0, 16, (INPUTS // GROUP, OUTPUTS))
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).half() / 10
    stored = {"m.qweight": awq_words(codes), "m.qzeros": awq_words(zeros), "m.scales": scales, "m.bias": torch.ones(OUTPUTS).half()}
    made = dequantize(tmp_path, stored, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"})
    steps = torch.from_numpy((codes - zeros.repeat(GROUP, 0)).astype(np.float32)).half()
    assert torch.equal(made["m.weight"], (steps * scales.repeat_interleave(GROUP, 0)).t().bfloat16())
    assert made.keys() == {"m.weight", "m.bias"}


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    octets = torch.randint(0, 256, (8, 16), dtype=torch.uint8)
    scales, whole = (torch.rand(8, 2) + 0.1).to(torch.float8_e4m3fn), torch.tensor(0.37)
    stored = {"a.weight": octets, "a.weight_scale": scales, "a.weight_scale_2": whole, "a.input_scale": torch.tensor(1.0)}
    made = dequantize(tmp_path, stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert torch.equal(made["a.weight"], (VALUES[nibbles(octets)] * (scales.float() * whole).repeat_interleave(16, 1)).bfloat16())
    assert made.keys() == {"a.weight"}


def test_experts_of_four_bits_of_deepseek(tmp_path: Path) -> None:
    codes, exponents = torch.randint(-128, 128, (4, 64), dtype=torch.int8), torch.randint(110, 140, (4, 4), dtype=torch.uint8)
    stored = {"l.w1.weight": codes, "l.w1.scale": exponents.view(torch.float8_e8m0fnu)}
    made = dequantize(tmp_path, stored, {"quant_method": "fp8", "expert_dtype": "fp4"})
    powers = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(made["l.w1.weight"], (VALUES[nibbles(codes.view(torch.uint8))] * powers).bfloat16())


@pytest.mark.parametrize(
    ("scales", "bits", "told"),
    [(torch.float8_e4m3fn, 4, "there is no m.weight_global_scale"), (torch.uint8, 8, "expected 4 or 6 bits")],
)
def test_what_compressed_tensors_would_read_otherwise_is_refused(tmp_path: Path, scales: torch.dtype, bits: int, told: str) -> None:
    stored = {"m.weight_packed": torch.zeros(4, 16, dtype=torch.uint8), "m.weight_scale": torch.ones(4, 2).to(scales)}
    weights = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 16}
    with pytest.raises(CoverageError, match=told):
        dequantize(tmp_path, stored, {"quant_method": "compressed-tensors", "config_groups": {"all": {"weights": weights}}})
    assert not (tmp_path / "out").exists()


def test_versions_that_are_not_known_are_refused(tmp_path: Path) -> None:
    for section in ({"quant_method": "awq", "version": "gemv"}, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}):
        with pytest.raises(UsageError, match=r"known (is|are)"):
            dequantize(tmp_path / str(section["quant_method"]), {"w": torch.ones(2)}, section)


FLOATS = {"op": "dequantize_floats", "shape": [2, 4], "dtype": "float32", "codes": "float8_e4m3fn", "block": [1, 4]}
BLOCKS = {"op": "dequantize_blocks", "shape": [1, 32], "dtype": "float32", "codes": "q8_0"}
INTEGERS = {"op": "dequantize_integers", "shape": [2, 4], "dtype": "float32", "bits": 8, "along": "bytes", "block": [1, 4]}


@pytest.mark.parametrize(
    ("op", "change", "told"),
    [
        (FLOATS, {"codes": "int64"}, "no codes"),
        (FLOATS, {"block": [0, 4]}, "no codes"),
        (BLOCKS, {"codes": "q9"}, "do not consist of blocks"),
        (INTEGERS, {"offset": 10**9}, "no integers"),
        (INTEGERS, {"index": "both"}, "no integers"),
    ],
)
def test_what_no_op_is_is_refused_when_a_plan_is_read(op: dict[str, object], change: dict[str, object], told: str) -> None:
    inputs = [TensorSpec(DTYPES["uint8"], (8,)), TensorSpec(DTYPES["float32"], (2,))]
    with pytest.raises((CoverageError, FormatError), match=told):
        from_json({**op, **change}).infer(inputs)
