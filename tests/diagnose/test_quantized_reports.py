"""What inspect and doctor say of quantized checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import random_tensor, run, write
from quantized_models import stored
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden" / "quantized"
WAYS = {
    "4 bits, group, bfloat16": "3 weights by compressed-tensors, int4 g32 sym",
    "4 bits, group, asymmetric, float16": "3 weights by compressed-tensors, int4 g32 asym",
    "3 bits, channel, asymmetric, bfloat16": "3 weights by compressed-tensors, int3 per channel asym",
    "float, block, bfloat16": "compressed-tensors, fp8 128x128",
    "int8, asymmetric, bfloat16": "int8 per channel asym",
    "mxfp4, bfloat16": "fp4 g32",
    "nvfp4, bfloat16": "fp4 g16",
    "nf4, nested, bfloat16": "3 weights by bitsandbytes, nf4 g64, scales quantized",
    "mxfp4 of gpt-oss": "1 weights by mxfp4, fp4 g32",
}


def checkpoint(folder: Path, name: str) -> Path:
    path = GOLDEN / f"{name}.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith("expected.")}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return write(folder / "x", tensors, config={"dtype": "bfloat16", "model_type": "any", "architectures": ["Any"], **config})


@pytest.mark.parametrize("name", WAYS)
def test_inspect_says_what_is_quantized_in_which_way(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", checkpoint(tmp_path, name)) == 0
    said = capsys.readouterr().out
    assert WAYS[name] in said
    assert "with --dequantize: " in said


def test_each_case_that_is_stored_is_read() -> None:
    assert {path.stem for path in stored(GOLDEN)} >= WAYS.keys()


def test_doctor_tells_of_configs_that_tensors_contradict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = checkpoint(tmp_path, "4 bits, group, bfloat16")
    run("doctor", src)
    assert "quantiz" not in capsys.readouterr().out
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.vision_tower.other"]
    (src / "config.json").write_text(json.dumps(config))
    run("doctor", src)
    assert "ignore names model.vision_tower.other, which no tensor is below" in capsys.readouterr().out
    plain = write(tmp_path / "plain", {"w": random_tensor(4, 4).to(torch.bfloat16)}, config=config)
    run("doctor", plain)
    assert "it says that weights are quantized by compressed-tensors, and none is" in capsys.readouterr().out
    half = {name: value for name, value in load_file(src / "model.safetensors").items() if not name.endswith("0.mlp.up_proj.weight_scale")}
    run("doctor", write(tmp_path / "half", half, config=config))
    assert "there is no model.layers.0.mlp.up_proj.weight_scale" in capsys.readouterr().out


def test_inspect_gives_the_size_of_the_numbers_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = checkpoint(tmp_path, "4 bits, group, bfloat16")
    assert run("inspect", src, "--json") == 0
    told = json.loads(capsys.readouterr().out)["quantization"]
    assert run("convert", src, tmp_path / "out", "--dequantize", "--quiet") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "out", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert told == {
        "method": "compressed-tensors", "weights": {"int4 g32 sym": 3}, "dtype": "bfloat16", "dequantized_size": plain["total_size"]
    }  # fmt: skip
    assert plain["quantization"] is None


@pytest.mark.parametrize(
    ("name", "scale", "value", "told"),
    [
        ("4 bits, group, bfloat16", "model.layers.0.mlp.up_proj.weight_scale", 0.0, "1 of 48 scales are zero"),
        ("4 bits, group, bfloat16", "model.layers.0.mlp.up_proj.weight_scale", float("nan"), "1 of 48 values are NaN or infinite"),
        ("4 bits, group, bfloat16", "model.layers.1.mlp.up_proj.weight_scale", float("inf"), "1 of 680 values are NaN or infinite"),
        ("mxfp4, bfloat16", "model.layers.0.mlp.up_proj.weight_scale", 255, "1 of 48 scales are NaN or infinite"),
    ],
)
def test_doctor_tells_of_scales_that_cannot_be_one(
    tmp_path: Path, name: str, scale: str, value: float, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src = checkpoint(tmp_path, name)
    run("doctor", src, "--data")
    assert "scales are" not in capsys.readouterr().out
    tensors = load_file(src / "model.safetensors")
    tensors[scale][1, 1] = value
    write(src, tensors)
    assert run("doctor", src, "--data") == 1
    said = capsys.readouterr().out
    assert f"{scale}: {told}" in said
    assert run("doctor", src) == 0, "it takes the numbers to tell"


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "modelopt", "hqq"])
def test_doctor_tells_of_configs_that_16_bit_checkpoints_have_kept(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "any", "architectures": ["Any"], "quantization_config": {"quant_method": method}}
    src = write(tmp_path / "x", {"model.layers.0.mlp.up_proj.weight": random_tensor(4, 4).to(torch.bfloat16)}, config=config)
    assert run("doctor", src) == 1
    assert method in capsys.readouterr().out
