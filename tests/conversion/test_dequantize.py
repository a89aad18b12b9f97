"""``--dequantize``: in one pass with casts and recipes, told by the plan, the config and the files beside it; and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from checkpoint_files import assert_same, random_tensor, read, refusal, run, write
from random_graphs import settings_of
from safetensors.torch import save_file

import streamconv

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [64, 64]}
CONFIG = {"torch_dtype": "float16", "text_config": {"quantization_config": QUANTIZATION, "torch_dtype": "float16"}, "hidden_size": 70}
Q, NORM = "model.layers.{}.q.weight", "model.norm.weight"


def checkpoint(folder, config=CONFIG):
    """Two matrices with the scales of their blocks, in other files, one of what serves activations, and a norm."""
    tensors = {NORM: torch.ones(70, dtype=torch.float32)}
    for layer in (0, 1):
        tensors[Q.format(layer)] = (random_tensor(100, 70, seed=layer) * 60).clamp(-440, 440).to(FP8)
    tensors |= {f"{Q.format(layer)}_scale_inv": random_tensor(2, 2, seed=9 + layer) for layer in (0, 1)}
    tensors["model.layers.0.q.input_scale"] = torch.ones(1)
    return write(folder, tensors, shards=3, config=config)


def numbers(src, dtype):
    """What its weights stand for: each code times the scale of its block, in float32, rounded once."""
    stored = read(src)
    wanted = {NORM: stored[NORM]}
    for layer in (0, 1):
        scales = stored[f"{Q.format(layer)}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)[:100, :70]
        wanted[Q.format(layer)] = (stored[Q.format(layer)].float() * scales).to(dtype)
    return wanted


def test_weights_become_numbers_of_the_dtype_that_the_config_gives(tmp_path, capsys):
    src, out = checkpoint(tmp_path / "x"), tmp_path / "out"
    (src / "hf_quant_config.json").write_text("{}")
    assert run("plan", src, out, "--dequantize", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dropped"] == ["model.layers.0.q.input_scale"]
    row = next(row for row in told["mapping"] if row["target"] == Q.format(1))
    assert (row["sources"], row["layout"], row["dtype"]) == ([Q.format(1), f"{Q.format(1)}_scale_inv"], "dequantize", "float16")
    assert run("convert", src, out, "--dequantize", "--verify", "--quiet") == 0
    assert_same(read(out), numbers(src, torch.float16))
    assert json.loads((out / "config.json").read_text()) == {
        "torch_dtype": "float16", "text_config": {"torch_dtype": "float16"}, "hidden_size": 70
    }  # fmt: skip
    assert not (out / "hf_quant_config.json").exists()
    assert run("verify", src, out, "--dequantize", "--quiet") == 0
    assert run("verify", src, out, "--quiet") == 1
    assert run("convert", src, out, "--dequantize", "--resume", "--quiet") == 0


def test_a_dtype_that_is_asked_for_is_the_only_rounding(tmp_path):
    src, out = checkpoint(tmp_path / "x"), tmp_path / "out"
    kept = ("--dtype", "bf16", "--keep-dtype", NORM, "--keep-dtype", Q.format(0))
    assert run("convert", src, out, "--dequantize", *kept, "--quiet") == 0
    assert_same(read(out), numbers(src, BF16) | {Q.format(0): numbers(src, torch.float16)[Q.format(0)]})
    bare = checkpoint(tmp_path / "bare", {"quantization_config": QUANTIZATION})
    assert run("convert", bare, tmp_path / "usual", "--dequantize", "--quiet") == 0
    assert_same(read(tmp_path / "usual"), numbers(bare, BF16))
    assert json.loads((tmp_path / "usual" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_a_recipe_sees_numbers(tmp_path):
    rules = [{"rule": "model.layers.{i}.q.weight", "right": "wq.{i}", "layout": "a b -> b a"}, {"rule": NORM, "right": "norm"}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"rules": rules}))
    src = checkpoint(tmp_path / "x")
    options = ("--recipe", tmp_path / "r.yaml", "--dequantize", "--dtype", "float32")
    assert run("convert", src, tmp_path / "out", *options, "--quiet") == 0
    wanted = numbers(src, torch.float32)
    assert_same(read(tmp_path / "out"), {"norm": wanted[NORM], **{f"wq.{k}": wanted[Q.format(k)].t().contiguous() for k in (0, 1)}})
    assert run("verify", src, tmp_path / "out", *options, "--quiet") == 0
    plan = streamconv.plan(src, tmp_path / "again", recipe=str(tmp_path / "r.yaml"), dequantize=True, max_memory="4GB")
    assert {source for row in plan.mapping for source in row.sources} | {*plan.dropped} == set(read(src))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized by hqq (by config.json): known are awq, bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}, "model.layers.0.q.weight is"),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_refused_by_name(tmp_path, capsys, config, told):
    src = checkpoint(tmp_path / "x", config)
    for command in (("convert", src, tmp_path / "out"), ("plan", src, tmp_path / "out"), ("verify", src, src)):
        assert told in refusal(capsys, *command, "--dequantize")
    assert not (tmp_path / "out").exists()


def test_what_is_not_quantized_is_refused(tmp_path, capsys):
    src = write(tmp_path / "x", {NORM: torch.ones(3)}, config={"dtype": "float32"})
    assert "nothing in it is quantized" in refusal(capsys, "convert", src, tmp_path / "out", "--dequantize")


def packed_checkpoint(folder):
    """A matrix of 64 rows and 1024 columns as integers of four bits in words, with the scales of groups of 128."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}},
    }
    tensors = {
        "layers.0.q.weight_packed": torch.arange(64 * 128, dtype=torch.int32).reshape(64, 128) * 77_777,
        "layers.0.q.weight_scale": random_tensor(64, 8).to(BF16),
        "layers.0.q.weight_shape": torch.tensor([64, 1024]),
    }
    return write(folder, tensors, config={"quantization_config": quantization, "dtype": "bfloat16"})


INTEGERS = {"qweight": (16, 256), "qzeros": (1, 32), "g_idx": (128,)}
LACKING = "no quantization_config says how codes are packed: put the model's config.json beside them, or give --sidecars-from DIR"


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        ("GPTQ", INTEGERS),
        ("GPTQ", {"qweight": (16, 256), "qzeros": (1, 32)}),
        ("AWQ", {"qweight": (128, 32), "qzeros": (1, 32)}),
        ("compressed-tensors", {"weight_packed": (256, 16), "weight_shape": (2,)}),
    ],
)
def test_what_only_a_config_says_is_said_to_be_missing(method, shapes, tmp_path, capsys):
    scales = {"weight_scale" if "weight_packed" in shapes else "scales": torch.ones(1, 256).half()}
    tensors = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()} | scales
    save_file({f"q.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "bare.safetensors")
    codes = next(iter(shapes))
    line = refusal(capsys, "convert", tmp_path / "bare.safetensors", tmp_path / "out", "--dequantize")
    assert line.startswith(f"--dequantize: its tensors look like {method} (q.{codes} is int32[")
    assert line.endswith(LACKING)
    assert f"quantized by {method}; {LACKING}" in refusal(capsys, "plan", tmp_path / "bare.safetensors", tmp_path / "out", "--to", "bf16")
    assert LACKING in refusal(capsys, "plan", tmp_path / "bare.safetensors", tmp_path / "out", "--dtype", "bf16")


def test_a_config_from_elsewhere_says_how_codes_are_packed(tmp_path):
    src = packed_checkpoint(tmp_path / "x")
    (tmp_path / "bare").mkdir()
    file = (src / "model.safetensors").rename(tmp_path / "bare" / "model.safetensors")
    options = ("--sidecars-from", src, "--quiet")
    assert run("convert", file, tmp_path / "out", "--dequantize", *options) == 0
    assert run("convert", file, tmp_path / "other", "--to", "bf16", *options) == 0
    assert read(tmp_path / "out").keys() == {"layers.0.q.weight"}
    assert_same(read(tmp_path / "out"), read(tmp_path / "other"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}
    assert run("verify", file, tmp_path / "out", "--dequantize", *options) == 0


def test_a_plan_tells_what_is_read_of_several_tensors_in_tiles_of_whole_rows(tmp_path):
    src = packed_checkpoint(tmp_path / "x")
    with settings_of(TILE=40_000, SMALLEST_TILE=1):
        plan = streamconv.plan(src, tmp_path / "out", dequantize=True)
    assert plan.summary()["bytes_read"] == 64 * 128 * 4 + 64 * 8 * 2
    assert [segment.tile for file in plan.files for segment in file.segments] == [(19 * 1024,)]
