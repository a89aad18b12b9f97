"""Quantizations that treat modules each in their own way: by class or name, with other bits, or stored the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, run, write
from safetensors import safe_open
from safetensors.torch import load_file

import streamconv
from streamconv.errors import CoverageError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden" / "quantized"
Tensors = dict[str, torch.Tensor]


def golden(name: str) -> tuple[Tensors, dict, Tensors]:
    """What a library stored, its config, and the numbers that it makes of it."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    expected = {key.removeprefix("expected."): value for key, value in tensors.items() if key.startswith("expected.")}
    return {key: value for key, value in tensors.items() if not key.startswith("expected.")}, config, expected


def dequantize(folder: Path, tensors: Tensors, config: dict, dtype: torch.dtype) -> Tensors:
    src = write(folder / "src", tensors, config={**config, "dtype": str(dtype).removeprefix("torch.")})
    streamconv.convert(src, folder / "out", dequantize=True, verify=True, max_memory=ROOMY)
    return read(folder / "out")


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape).to(torch.int32)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_four_bits_of_bitsandbytes_stored_in_another_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    tensors, config, expected = golden("nf4, nested, bfloat16")
    for name in expected:
        codes = tensors[name].reshape(-1)
        assert len(codes) % storage.itemsize == 0
        tensors[name] = codes.view(storage).reshape(-1, 1)
    assert_same(dequantize(tmp_path, tensors, config, torch.bfloat16), expected)


def test_eight_bits_of_bitsandbytes_that_lie_as_a_kernel_wants_them(tmp_path: Path) -> None:
    tensors, config, _ = golden("llm.int8")
    tensors["a.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CoverageError, match=r"a\.weight_format is not 0: its codes lie as kernels of a GPU want them"):
        dequantize(tmp_path, tensors, config, torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nf4, nested, bfloat16", "llm.int8", "GPTQ 2, 8 bits, float16"])
def test_matrices_of_gpt2_have_inputs_before_outputs_again(tmp_path: Path, name: str) -> None:
    tensors, config, expected = golden(name)
    modules = [key.removesuffix(".weight") for key in expected if key.endswith(".weight")]
    own = dict(zip(modules, ("h.0.attn.c_attn", "h.0.mlp.c_proj", "lm_head"), strict=False))

    def renamed(key: str) -> str:
        module = next((module for module in modules if key.startswith(f"{module}.")), None)
        return key if module is None else own[module] + key[len(module) :]

    tensors = {renamed(key): value for key, value in tensors.items()}
    expected = {renamed(key): value for key, value in expected.items()}
    turned = {key: value.T.contiguous() if ".c_" in key else value for key, value in expected.items()}
    dtype = next(iter(expected.values())).dtype
    assert_same(dequantize(tmp_path, tensors, {**config, "model_type": "gpt2"}, dtype), turned)


def gptq(bits: int, size: int) -> Tensors:
    inputs, outputs = 64, 32
    groups = {"qzeros": words(inputs // size, outputs * bits // 32), "scales": torch.rand(inputs // size, outputs).half()}
    return {"qweight": words(inputs * bits // 32, outputs), **groups}


def test_gptq_of_other_bits_for_some_modules(tmp_path: Path) -> None:
    """As gptqmodel has them: the first expression that a name begins with, and one after ``-:`` leaves modules alone."""
    modules = {"layers.0.q": (4, 32), "layers.1.q": (8, 64), "layers.1.down": (2, 32)}
    dynamic = {"-:head": {}, r"+:layers\.1\.down": {"bits": 2}, r".*\.1\.": {"bits": 8, "group_size": 64}}
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    tensors: Tensors = {"head.weight": torch.ones(4, 4).half()}
    expected = dict(tensors)
    for module, (bits, size) in modules.items():
        own = {f"{module}.{name}": value for name, value in gptq(bits, size).items()}
        section = {**base, "bits": bits, "group_size": size}
        expected |= dequantize(tmp_path / module, own, {"quantization_config": section}, torch.float16)
        tensors |= own
    assert_same(dequantize(tmp_path / "all", tensors, {"quantization_config": {**base, "dynamic": dynamic}}, torch.float16), expected)
    with pytest.raises(UsageError, match=r"layers\.1\.q\.qweight: gptq with bits 5 in groups of 32: known are 2, 3, 4 and 8 bits"):
        dequantize(tmp_path / "five", tensors, {"quantization_config": {**base, "dynamic": {r".*\.1\.q": {"bits": 5}}}}, torch.float16)


def test_targets_of_compressed_tensors_go_by_name_then_expression_then_class(tmp_path: Path) -> None:
    """Whatever their order: as its `match_targets` has them."""
    sizes = {"Linear": 16, "Embedding": 64, "re:.*mlp": 8, "re:.*mlp.down": 4, "layers.1.mlp.down": 32}
    size_of = {"layers.0.q": 16, "embed_tokens": 64, "layers.0.mlp.up": 8, "layers.0.mlp.down": 8, "layers.1.mlp.down": 32}
    tensors, expected = {}, {}
    for module, size in size_of.items():
        codes, scales = torch.randint(-128, 128, (4, 64)).to(torch.int8), torch.rand(4, 64 // size).bfloat16()
        tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scales}
        expected[f"{module}.weight"] = codes.bfloat16() * scales.repeat_interleave(size, 1)
    weights = {"num_bits": 8, "type": "int", "strategy": "group"}
    groups = {target: {"targets": [target], "weights": {**weights, "group_size": size}} for target, size in sizes.items()}
    section = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    assert_same(dequantize(tmp_path, tensors, {"quantization_config": section}, torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", "cls.predictions.decoder"), ("roberta", "lm_head.decoder"), ("whisper", "proj_out"), ("llama", "lm_head")]
)
@pytest.mark.parametrize("is_stored", [False, True])
def test_heads_are_left_alone_stored_or_tied(tmp_path: Path, kind: str, head: str, is_stored: bool) -> None:
    """Readers would look for scales of those that a config does not list."""
    weights = ["layer.0.dense", "embeddings.word_embeddings", *([head] if is_stored else [])]
    src = write(tmp_path / "src", {f"{module}.weight": torch.randn(8, 16) for module in weights}, config={"model_type": kind})
    streamconv.convert(src, tmp_path / "out", quantize="FP8_DYNAMIC", max_memory=ROOMY)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert head in ignored
    scales = {name for name in read(tmp_path / "out") if name.endswith("_scale")}
    assert scales == {"layer.0.dense.weight_scale"}


def compressed(shape: tuple[int, int]) -> tuple[Tensors, dict]:
    """A weight of integers with scales of this shape, and a config that says rows have one each."""
    tensors = {"m.weight": torch.ones(8, 16).to(torch.int8), "m.weight_scale": torch.ones(shape).bfloat16()}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}
    return tensors, {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def test_doctor_finds_what_dequantizing_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, config = compressed((9, 1))
    src = write(tmp_path / "shapes", tensors, config=config)
    assert run("doctor", src) == 1
    assert "8 x 16 values take scales [8, 1] by config.json (channel), found bfloat16[9, 1]" in capsys.readouterr().out


def test_doctor_finds_codes_that_no_config_tells_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, _ = compressed((8, 1))
    assert run("doctor", write(tmp_path / "codes", tensors, config={"dtype": "bfloat16"})) == 1
    assert "m.weight is int8[8, 16], beside m.weight_scale), and no quantization_config is there" in capsys.readouterr().out


def test_doctor_knows_four_bits_of_any_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, config, expected = golden("fp4, float32")
    weight, query = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    own = {name.replace(weight, query): value for name, value in tensors.items() if name.startswith(weight)}
    own[query] = own[query].reshape(-1).view(torch.bfloat16).reshape(-1, 1)
    rows, columns = expected[weight].shape
    sizes = {"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": columns, "num_attention_heads": 1, "head_dim": rows}
    run("doctor", write(tmp_path / "src", own, config={**config, **sizes}))
    assert "problem" not in capsys.readouterr().out


def test_numbers_whose_config_says_that_they_are_quantized(tmp_path: Path) -> None:
    """They are quantized like others, and the config that was left there goes, wherever it stands."""
    _, config = compressed((8, 1))
    text = {"model_type": "llama", **config}
    src = write(tmp_path / "src", {"m.weight": torch.randn(8, 16)}, config={**config, "text_config": text})
    streamconv.convert(src, tmp_path / "out", quantize="W8A8", max_memory=ROOMY)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["format"] == "int-quantized"
    assert written["text_config"] == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("scheme", "kind", "is_told"),
    [("W4A16", "mixtral", False), ("NVFP4A16", "mixtral", True), ("W8A8", "mixtral", True), ("FP8_DYNAMIC", "gpt_oss", True)],
)
def test_experts_that_transformers_does_not_read_are_told_of(tmp_path: Path, scheme: str, kind: str, is_told: bool) -> None:
    """It passes over NVFP4's scale of all scales there, and stops at others; experts of gpt-oss it reads in stacks only."""
    stack = torch.randn(2, 128, 256).bfloat16()
    config = {"model_type": kind, "hidden_size": 256 if kind == "mixtral" else 128}
    src = write(tmp_path / "src", {"model.layers.0.mlp.experts.gate_up_proj": stack}, config=config)
    report = streamconv.convert(src, tmp_path / "out", quantize=scheme, max_memory=ROOMY)
    assert any("transformers 5.24 does not read" in note for note in report.notes) == is_told


@pytest.mark.parametrize(("scheme", "kind", "is_told"), [("W4A16", "t5", True), ("FP8_DYNAMIC", "t5", False), ("W4A16", "llama", False)])
def test_models_that_transformers_does_not_open_are_told_of(tmp_path: Path, scheme: str, kind: str, is_told: bool) -> None:
    """Where it initializes weights by name that packed codes do not have."""
    src = write(tmp_path / "src", {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(128, 128)}, config={"model_type": kind})
    plan = streamconv.plan(src, tmp_path / "out", quantize=scheme, max_memory=ROOMY)
    assert any("does not open a t5 quantized" in note for note in plan.notes) == is_told
