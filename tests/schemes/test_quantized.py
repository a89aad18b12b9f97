"""--dtype on quantized checkpoints: refused by name, whatever says so; and nothing inside a quantization is touched."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import assert_same, random_tensor, read, refusal, run, write

from streamconv.schemes.registry import schemes

FP8, BF16, F16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
X = "model.layers.0.mlp.up_proj"


def whole(*shape, dtype=torch.uint8):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int64).reshape(shape).to(dtype)


def fp8(*shape):
    return random_tensor(*shape).to(FP8)


CHECKPOINTS = {
    "fp8": ({f"{X}.weight": fp8(8, 8), f"{X}.weight_scale_inv": random_tensor(1, 1)}, {"quant_method": "fp8"}),
    "quark": (
        {f"{X}.weight": fp8(8, 8), f"{X}.weight_scale": torch.tensor(0.017)},
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}},
    ),
    "gptq": (
        {f"{X}.qweight": whole(1, 8, dtype=torch.int32), f"{X}.qzeros": whole(1, 1, dtype=torch.int32), f"{X}.scales": random_tensor(1, 8)},
        {"quant_method": "gptq", "bits": 4},
    ),
    "awq": (
        {f"{X}.qweight": whole(8, 1, dtype=torch.int32), f"{X}.qzeros": whole(1, 1, dtype=torch.int32), f"{X}.scales": random_tensor(1, 8)},
        {"quant_method": "awq", "version": "gemm"},
    ),
    "bitsandbytes": (
        {f"{X}.weight": whole(32, 1), f"{X}.weight.absmax": random_tensor(1), f"{X}.weight.quant_map": random_tensor(16)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    ),
    "bitsandbytes-8": ({f"{X}.weight": whole(8, 8, dtype=torch.int8), f"{X}.SCB": random_tensor(8)}, {"quant_method": "bitsandbytes"}),
    "compressed-tensors": (
        {f"{X}.weight_packed": whole(8, 1, dtype=torch.int32), f"{X}.weight_scale": random_tensor(8, 1)},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    ),
    "modelopt": ({f"{X}.weight": fp8(8, 8), f"{X}.weight_scale": torch.tensor(0.5)}, {"quant_method": "modelopt"}),
    "mxfp4": ({"model.experts.up_blocks": whole(2, 4, 1, 16), "model.experts.up_scales": whole(2, 4, 1)}, {"quant_method": "mxfp4"}),
    "hqq": ({f"{X}.W_q": whole(4, 8), f"{X}.scale": random_tensor(8, 1), f"{X}.zero": random_tensor(8, 1)}, {"quant_method": "hqq"}),
    "eetq": ({f"{X}.weight": whole(8, 8, dtype=torch.int8), f"{X}.weight_scales": random_tensor(8, dtype=F16)}, {"quant_method": "eetq"}),
    "torchao": ({f"{X}._weight_qdata": whole(8, 8, dtype=torch.int8), f"{X}._weight_scale": random_tensor(8)}, {"quant_method": "torchao"}),
    "quanto": ({f"{X}.weight._data": whole(8, 8, dtype=torch.int8), f"{X}.weight._scale": random_tensor(8, 1)}, {"quant_method": "quanto"}),
    "aqlm": ({f"{X}.codes": whole(2, 8, 1, dtype=torch.int16), f"{X}.scales": random_tensor(8)}, {"quant_method": "aqlm"}),
    "gguf": ({f"{X}.qweight": whole(8, 18), f"{X}.qweight_type": whole(1)}, {"quant_method": "gguf"}),
}
OTHERS = {"model.norm.weight": torch.ones(8), f"{X}.bias": torch.ones(8), "model.position_ids": torch.arange(4)}


def checkpoint(folder, kind, config=None):
    return write(folder / "x", {**CHECKPOINTS[kind][0], **OTHERS}, config=config)


def nested(kind, key="quantization_config"):
    return {"dtype": "float32", "model_type": "any", key: CHECKPOINTS[kind][1]}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_dtype_is_refused_for_quantized_weights_as_config_json_names_them(tmp_path, capsys, kind):
    src = checkpoint(tmp_path, kind, nested(kind))
    line = refusal(capsys, "convert", src, tmp_path / "out", "--dtype", "float16")
    assert f"quantized by {kind.removesuffix('-8')} (by config.json)" in line
    assert ("--dequantize --dtype float16" in line) == (CHECKPOINTS[kind][1]["quant_method"] in schemes())
    assert not (tmp_path / "out").exists()
    assert "quantized by" in refusal(capsys, "verify", src, src, "--dtype", "float16")
    assert run("convert", src, tmp_path / "out", "--quiet", "--max-shard-size", "100B") == 0
    assert_same(read(tmp_path / "out"), read(src))
    assert (tmp_path / "out" / "config.json").read_bytes() == (src / "config.json").read_bytes()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_dtype_is_refused_where_only_the_tensors_look_quantized(tmp_path, capsys, kind):
    src = checkpoint(tmp_path, kind)
    line = refusal(capsys, "convert", src, tmp_path / "out", "--dtype", "bf16")
    first = next(iter(CHECKPOINTS[kind][0]))
    assert f"{first} is" in line
    assert not (tmp_path / "out").exists()
    assert run("convert", src, tmp_path / "out.bin", "--quiet") == 0
    assert run("verify", src, tmp_path / "out.bin", "--quiet") == 0


@pytest.mark.parametrize(
    ("config", "file", "told"),
    [
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}, "fp8 (by config.json)"),
        ({"compression_config": {"format": "pack-quantized"}}, {}, "compressed-tensors (by config.json)"),
        ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "NVFP4 (hf_quant_config.json)"),
        ({}, {"quantize_config.json": {"bits": 4}}, "quantize_config (quantize_config.json)"),
        ({}, {"quant_config.json": {"quant_method": "awq"}}, "awq (quant_config.json)"),
    ],
)
def test_other_places_that_say_so(tmp_path, capsys, config, file, told):
    src = write(tmp_path / "x", OTHERS, config=config)
    for name, found in file.items():
        (src / name).write_text(json.dumps(found))
    assert told in refusal(capsys, "convert", src, tmp_path / "out", "--dtype", "float16")


def test_a_dtype_that_all_have_already_changes_nothing_and_says_so(tmp_path, capsys):
    others = {name: tensor.to(BF16) if tensor.is_floating_point() else tensor for name, tensor in OTHERS.items()}
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    src = write(tmp_path / "x", {**CHECKPOINTS["mxfp4"][0], **others}, config=config)
    assert run("convert", src, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert "mxfp4" in capsys.readouterr().out
    assert_same(read(tmp_path / "out"), read(src))
    only = write(tmp_path / "only", {f"{X}.weight": fp8(8, 8)})
    assert "a cast to float8" in refusal(capsys, "convert", only, tmp_path / "no", "--dtype", "bfloat16")


@pytest.mark.parametrize("kind", ["fp8", "quark", "gptq", "bitsandbytes", "bitsandbytes-8", "hqq"])
def test_what_belongs_to_the_quantization_may_be_kept_by_name(tmp_path, capsys, kind):
    src = checkpoint(tmp_path, kind, nested(kind))
    assert run("convert", src, tmp_path / "out", "--dtype", "float16", "--keep-dtype", f"{X}.[!b]*") == 0
    wanted = {**CHECKPOINTS[kind][0], **{n: t.to(F16) if t.is_floating_point() else t for n, t in OTHERS.items()}}
    assert_same(read(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**nested(kind), "dtype": "float16"}
    assert "stays as it is" in capsys.readouterr().out
    partly = ("--dtype", "float16", "--keep-dtype", "model.norm.weight")
    assert "scales be rounded" in refusal(capsys, "convert", src, tmp_path / "no", *partly)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.nrom.weight", "model.norm.weight"),
        ("model.layer.{i}.mlp.up_proj.bias", "model.layers.*.mlp.up_proj.bias"),
        ("*.mlp.upproj.bias", "model.layers.*.mlp.up_proj.bias"),
    ],
)
def test_a_pattern_that_keeps_nothing_is_refused_with_the_nearest_name(tmp_path, capsys, pattern, near):
    src = write(tmp_path / "x", OTHERS)
    for command in (("convert", src, tmp_path / "out"), ("plan", src, tmp_path / "out"), ("verify", src, src)):
        line = refusal(capsys, *command, "--dtype", "bf16", "--keep-dtype", "*.norm.*", "--keep-dtype", pattern)
        assert pattern in line
        assert f"the nearest is {near}" in line
    assert not (tmp_path / "out").exists()


def test_whole_numbers_of_models_that_are_not_quantized_do_not_hinder(tmp_path):
    tensors = {
        "attn.bias": whole(1, 1, 4, 4), "attn.relative_position_index": torch.arange(9), "bn.num_batches_tracked": torch.tensor(3),
        "bn.weight": torch.ones(3), "attn.logit_scale": torch.ones(2), "tokens": whole(3, dtype=torch.int32), "mask": torch.ones(2) > 0,
    }  # fmt: skip
    src = write(tmp_path / "x", tensors)
    assert run("convert", src, tmp_path / "out", "--dtype", "float16", "--quiet") == 0
    assert_same(read(tmp_path / "out"), {n: t.to(F16) if t.is_floating_point() else t for n, t in tensors.items()})
