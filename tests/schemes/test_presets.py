"""``--quantize``: what a library that defines a preset makes of a model, bit for bit, and says of it in config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, failure, read, refusal, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from preset_models import CONFIG, PRESETS, STORED, by_library, write_model
from quantized_models import decompressed
from safetensors import safe_open
from safetensors.torch import load_file

import streamconv
from streamconv.schemes.registry import presets

GOLDEN = Path(__file__).parent.parent / "golden" / "presets"
CASES = [(preset, dtype) for dtype, presets in STORED.items() for preset in presets]
BF16 = torch.bfloat16
LAYER = "model.layers.0"
FNUZ = "fp8_e4m3fnuz"


def source(folder: Path, dtype: torch.dtype = BF16) -> Path:
    return write_model(folder / "src", load_file(GOLDEN / f"{str(dtype).removeprefix('torch.')}.safetensors"))


def quantize(src: Path, dst: Path, preset: str, *more: object) -> dict[str, torch.Tensor]:
    assert run("convert", src, dst, "--quantize", preset, *more, "--quiet", "--max-memory", ROOMY) == 0
    return read(dst)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as bytes, which NaNs and negative zeros are told apart by."""
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}


def check(folder: Path, dtype: torch.dtype, preset: str, expected: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    src = source(folder, dtype)
    made = quantize(src, folder / "out", preset, "--verify")
    kept = {name: tensor for name, tensor in load_file(src / "model.safetensors").items() if "_proj" not in name}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in made.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in {**kept, **expected}.items()
    }
    assert_same(bits(made), bits({**kept, **expected}))
    said = json.loads((folder / "out" / "config.json").read_text())
    left = ["lm_head", "model.embed_tokens"]
    if config:
        assert {**said["quantization_config"], "ignore": sorted(said["quantization_config"]["ignore"])} == {**config, "ignore": left}
    assert {key: value for key, value in said.items() if key != "quantization_config"} == json.loads((src / "config.json").read_text())


@pytest.mark.parametrize(("preset", "dtype"), CASES, ids=str)
def test_what_a_library_once_made(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = GOLDEN / f"{str(dtype).removeprefix('torch.')}.{preset}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    check(tmp_path, dtype, preset, load_file(path), config)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", ["fp8", *PRESETS])
def test_what_a_library_makes(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    try:
        expected, config = by_library(preset, dtype)
    except ImportError as error:
        pytest.skip(str(error))
    expected = {name: tensor for name, tensor in expected.items() if "_proj" in name}
    check(tmp_path, dtype, preset, expected, config)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("preset", ["fp8", *PRESETS])
def test_transformers_loads_it(preset: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    quantize(source(tmp_path), tmp_path / "out", preset)
    settings: dict[str, object] = {}
    if preset == "W4A16_ASYM":  # of a model without data compressed-tensors 0.20 packs no zero points: its own files are loaded so, too
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **settings)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert model is not None


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_decompresses_it(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantize(source(tmp_path, dtype), tmp_path / "out", preset)
    theirs, ours = decompressed(tmp_path / "out"), numbers(tmp_path / "out", tmp_path / "plain")
    assert_same(bits({name: tensor.to(dtype) for name, tensor in theirs.items()}), bits({name: ours[name] for name in theirs}))


@pytest.mark.oracle
@pytest.mark.parametrize("spread", [14, 3], ids=str)
def test_compressed_tensors_decompresses_what_was_mxfp4(spread: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    test_mxfp4_in_blocks_of_one_byte_floats("FP8_BLOCK", spread, tmp_path, capsys)
    assert_same(decompressed(tmp_path / "out"), numbers(tmp_path / "src", tmp_path / "plain"))


@pytest.mark.oracle
def test_compressed_tensors_decompresses_what_was_fp8(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    test_blocks_of_one_byte_floats_go_from_one_library_to_another_without_rounding("fp8", "FP8_BLOCK", tmp_path)
    theirs, ours = decompressed(tmp_path / "after"), numbers(tmp_path / "before", tmp_path / "plain")
    repacked = [name for name in theirs if f"{name}_scale_inv" in read(tmp_path / "before")]
    assert repacked
    assert_same(bits({name: theirs[name].to(BF16) for name in repacked}), bits({name: ours[name] for name in repacked}))


@pytest.mark.parametrize("preset", ["fp8", FNUZ, *PRESETS])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.sampled(5)
def test_blocks_without_a_scale_are_told(value: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And may be forbidden: ``--strict-values``. Zeros have one."""
    weight = torch.randn(256, 300 if preset in ("FP8_BLOCK", "W8A8", "FP8_DYNAMIC", FNUZ) else 256).to(BF16)
    columns = weight.shape[1]
    weight[140, 130], weight[:, :128] = float(value), 0
    src = write(tmp_path / "x", {"a.weight": weight}, config={"dtype": "bfloat16"})
    rows, width = presets()[preset].block
    count = min(rows, 128) * min(width, columns)
    for tiles in ((), ("--workers", "1", "--max-shard-size", "20kB")):
        assert run("convert", src, tmp_path / "out", "--quantize", preset, "--overwrite", "--max-memory", ROOMY, *tiles) == 0
        assert f"note: {count} values in 1 tensor have no scale, for NaN or infinity in their block" in capsys.readouterr().out
    assert run("convert", src, tmp_path / "b", "--quantize", preset, "--losses", "--json", "--max-memory", ROOMY) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["unscaled"]["values"], told["overflowed"]["values"]) == (count, 0)
    assert [row["unscaled"] for row in told["losses"]] == [count]
    line = failure(capsys, 3, "convert", src, tmp_path / "strict", "--quantize", preset, "--strict-values")
    assert f"--strict-values: {count} values of 1 tensors have no scale" in line
    assert not list((tmp_path / "strict").glob("*.safetensors"))


@pytest.mark.parametrize("preset", ["fp8", FNUZ, *PRESETS])
def test_numbers_come_back_near_what_they_were(preset: str, tmp_path: Path) -> None:
    src = source(tmp_path, torch.float32)
    plain = back(quantize_to(src, tmp_path / "a", preset), tmp_path / "plain")
    original = read(src)
    assert plain.keys() == original.keys()
    for name, tensor in plain.items():
        assert (tensor - original[name]).abs().max() <= 0.2 * original[name].abs().max(), name
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_numbers_that_mxfp4_holds_are_a_fixed_point(tmp_path: Path) -> None:
    """Its largest magnitudes are 1 or 1.5 times a power of two, whose scale holds all smaller ones; those of others may need another."""
    once = back(quantize_to(source(tmp_path, torch.float32), tmp_path / "a", "MXFP4A16"), tmp_path / "once")
    twice = back(quantize_to(tmp_path / "once", tmp_path / "b", "MXFP4A16"), tmp_path / "twice")
    for name, tensor in once.items():
        assert torch.equal(twice[name], tensor), name  # -0 has become 0


def quantize_to(src: Path, dst: Path, preset: str) -> Path:
    quantize(src, dst, preset)
    return dst


def back(src: Path, dst: Path) -> dict[str, torch.Tensor]:
    assert run("convert", src, dst, "--dequantize", "--dtype", "float32", "--quiet", "--max-memory", ROOMY) == 0
    return read(dst)


@pytest.mark.parametrize("preset", ["W4A16", "NVFP4A16", "FP8_DYNAMIC"])
def test_a_quantized_source_is_quantized_in_another_way_in_one_pass(preset: str, tmp_path: Path) -> None:
    src = source(tmp_path)
    quantize(src, tmp_path / "fp8", "fp8")
    once = quantize(tmp_path / "fp8", tmp_path / "once", preset)
    assert run("convert", tmp_path / "fp8", tmp_path / "plain", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
    assert_same(bits(once), bits(quantize(tmp_path / "plain", tmp_path / "twice", preset)))
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_has_made_it_stores_as_it_is(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = source(tmp_path)
    quantize(src, tmp_path / "once", preset)
    twice = quantize(tmp_path / "once", tmp_path / "twice", preset, "--verify")
    assert_same(bits(twice), bits(read(tmp_path / "once")))
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()
    assert run("plan", tmp_path / "once", tmp_path / "again", "--quantize", preset, "--max-memory", ROOMY) == 0
    assert "nothing is rounded" in capsys.readouterr().out


@pytest.mark.parametrize(("first", "second"), [("fp8", "FP8_BLOCK"), ("FP8_BLOCK", "fp8")])
def test_blocks_of_one_byte_floats_go_from_one_library_to_another_without_rounding(first: str, second: str, tmp_path: Path) -> None:
    src = source(tmp_path)
    before = quantize(src, tmp_path / "before", first, "--ignore", r"re:.*down_proj")
    after = quantize(tmp_path / "before", tmp_path / "after", second, "--ignore", r"re:.*down_proj", "--verify")
    codes = [name for name, tensor in before.items() if tensor.dtype == after.get(name, tensor.float()).dtype == torch.float8_e4m3fn]
    assert codes
    assert_same(bits({name: after[name] for name in codes}), bits({name: before[name] for name in codes}))
    old, new = (f"{codes[0]}{'_scale_inv' if preset == 'fp8' else '_scale'}" for preset in (first, second))
    assert torch.equal(after[new].float(), before[old].float())
    plain, again = numbers(tmp_path / "before", tmp_path / "a"), numbers(tmp_path / "after", tmp_path / "b")
    assert_same(bits({name: again[name] for name in codes}), bits({name: plain[name] for name in codes}))


EVERY = torch.arange(256, dtype=torch.uint8)  # codes


def test_codes_of_float8_e4m3fn_become_those_of_amd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As vLLM's `normalize_e4m3fn_to_e4m3fnuz` makes them: the same bits, -0 as 0, scales twice as large; its NaNs stay what they are."""
    codes = EVERY.repeat(300).reshape(200, 384)  # blocks at its ends are short
    exponents = torch.randint(110, 130, (2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = {"a": torch.rand(2, 3), "b": torch.rand(2, 3).to(BF16), "c": exponents.view(torch.float8_e8m0fnu)}
    stored = {f"{name}.weight": codes.view(torch.float8_e4m3fn) for name in scales}
    stored |= {f"{name}.weight_scale_inv": tensor for name, tensor in scales.items()}
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"dtype": "bfloat16", "quantization_config": section}
    src = write(tmp_path / "src", stored | {"plain.weight": torch.ones(128, 128, dtype=BF16)}, config=config)
    made = quantize(src, tmp_path / "out", FNUZ, "--verify")
    wanted = codes.where(codes != 0x80, 0).where(codes & 0x7F != 0x7F, 0x80)
    for name, tensor in scales.items():
        assert torch.equal(made[f"{name}.weight"].view(torch.uint8), wanted)
        assert torch.equal(made[f"{name}.weight_scale_inv"], 2 * tensor.float())
    assert made["plain.weight"].dtype == BF16  # which the source has not quantized either
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head", "plain"]
    assert run("plan", src, tmp_path / "again", "--quantize", FNUZ, "--max-memory", ROOMY) == 0
    assert "3 of 3 quantized weights hold the numbers of the source's codes" in capsys.readouterr().out
    assert run("verify", src, tmp_path / "out", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
    made["a.weight_scale_inv"][0, 0] *= 2
    other = write(tmp_path / "other", made, config={"dtype": "bfloat16", "quantization_config": said})
    assert run("verify", src, other, "--dequantize", "--quiet", "--max-memory", ROOMY) == 1


def test_rounding_to_codes_of_amd_goes_by_those_of_transformers(tmp_path: Path) -> None:
    src = source(tmp_path)
    quantize(src, tmp_path / "fp8", "fp8", "--ignore", "re:.*self_attn")
    once = quantize(src, tmp_path / "once", FNUZ, "--ignore", "re:.*self_attn")
    twice = quantize(tmp_path / "fp8", tmp_path / "twice", FNUZ)
    assert_same(bits(once), bits(twice))
    assert run("verify", tmp_path / "fp8", tmp_path / "once", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0


@pytest.mark.parametrize("preset", ["fp8", "FP8_BLOCK"])
@pytest.mark.parametrize("spread", [15, 14, 3], ids=str)
def test_mxfp4_in_blocks_of_one_byte_floats(preset: str, spread: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(spread)
    codes = torch.randint(0, 256, (256, 192), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(120 - spread, 121, (256, 12), dtype=torch.uint8, generator=generator)
    exponents[::128, ::4], exponents[1::128, ::4] = 120 - spread, 120  # both ends in each block
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}}},
    }
    stored = {"m.weight_packed": codes, "m.weight_scale": exponents}
    src = write(tmp_path / "src", stored, config={"dtype": "bfloat16", "quantization_config": section})
    assert run("convert", src, tmp_path / "out", "--quantize", preset, "--verify", "--max-memory", ROOMY) == 0
    is_exact = spread <= 14
    assert ("nothing is rounded" in "".join(capsys.readouterr())) == is_exact
    assert read(tmp_path / "out")["m.weight"].dtype == torch.float8_e4m3fn
    before, after = numbers(src, tmp_path / "a")["m.weight"], numbers(tmp_path / "out", tmp_path / "b")["m.weight"]
    assert torch.equal(before, after) == is_exact


def numbers(src: Path, dst: Path) -> dict[str, torch.Tensor]:
    assert run("convert", src, dst, "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
    return read(dst)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("preset", ["fp8", *PRESETS])
def test_any_shards_and_a_stream_of_bytes_are_the_same(preset: str, tmp_path: Path) -> None:
    src = source(tmp_path)
    whole = quantize(src, tmp_path / "whole", preset)
    assert_same(bits(quantize(src, tmp_path / "shards", preset, "--max-shard-size", "20kB", "--workers", "1")), bits(whole))
    streamconv.convert(src, "memory://presets/out", quantize=preset, max_memory=ROOMY, overwrite=True)
    found = streamconv.open("memory://presets/out")
    assert_same(bits({name: found[name].torch() for name in found}), bits(whole))
    assert run("verify", src, tmp_path / "whole", "--quantize", preset, "--quiet") == 0


def test_modules_that_are_named_are_left_alone(tmp_path: Path) -> None:
    src = source(tmp_path)
    made = quantize(src, tmp_path / "out", "W4A16", "--ignore", f"{LAYER}.self_attn.o_proj", "--ignore", r"re:.*\.mlp\.")
    assert {name for name in made if name.endswith("_packed")} == {f"{LAYER}.self_attn.{name}_proj.weight_packed" for name in "qkv"}
    left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(left) == {
        "lm_head", "model.embed_tokens", f"{LAYER}.self_attn.o_proj", *(f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
    }  # fmt: skip


def test_what_a_preset_passes_over_is_named_in_the_config(tmp_path: Path) -> None:
    """fp8 takes whole blocks only: matrices of other sizes stay as they are."""
    made = quantize(source(tmp_path), tmp_path / "out", "fp8")
    assert {name for name in made if name.endswith("_scale_inv")} == {
        f"{LAYER}.{name}_proj.weight_scale_inv" for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert left == ["lm_head", f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj", "model.embed_tokens"] or set(left) == {
        "lm_head", f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj", "model.embed_tokens"
    }  # fmt: skip


def test_names_that_readers_may_have_others_for_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' own names go into the config, too, where it knows the model and has others."""
    tensors = {"vision.a.weight": torch.ones(8, 128, dtype=BF16), "text.a.weight": torch.ones(8, 128, dtype=BF16)}
    config = {"model_type": "none", "text_config": {"model_type": "none"}}
    src = write(tmp_path / "x", tensors, config=config)
    for preset, is_told in (("W8A16", True), ("fp8_e4m3fnuz", False)):
        assert run("plan", src, tmp_path / "out", "--quantize", preset, "--ignore", "vision.a", "--max-memory", ROOMY) == 0
        assert ("names what is left alone as files do (vision.a)" in capsys.readouterr().out) == is_told


@pytest.mark.oracle
@pytest.mark.parametrize("preset", ["fp8", "W8A16"])
def test_transformers_knows_what_is_left_alone_of_a_model_of_several(preset: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=128)
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    transformers.LlavaForConditionalGeneration(config).to(BF16).save_pretrained(tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "out", preset, "--ignore", "re:vision_tower", "--ignore", "re:multi_modal_projector")
    _, told = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told


STACK = "model.layers.0.mlp.experts"


def test_stacked_experts_are_written_one_by_one_and_share_their_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stacks = {f"{STACK}.gate_up_proj": torch.randn(3, 64, 128).to(BF16), f"{STACK}.down_proj": torch.randn(3, 128, 32).to(BF16)}
    src = write(tmp_path / "stacked", stacks, config={"model_type": "qwen3_moe", "dtype": "bfloat16"})
    apart = {}
    for expert in range(3):
        gate, up = stacks[f"{STACK}.gate_up_proj"][expert].chunk(2)
        names = {"gate_proj": gate, "up_proj": up, "down_proj": stacks[f"{STACK}.down_proj"][expert]}
        apart |= {f"{STACK}.{expert}.{name}.weight": tensor.contiguous() for name, tensor in names.items()}
    other = write(tmp_path / "apart", apart, config={"model_type": "qwen3_moe", "dtype": "bfloat16"})
    made = quantize(src, tmp_path / "a", "NVFP4A16", "--verify")
    assert_same(bits(made), bits(quantize(other, tmp_path / "b", "NVFP4A16")))
    assert torch.equal(made[f"{STACK}.1.gate_proj.weight_global_scale"], made[f"{STACK}.1.up_proj.weight_global_scale"])


def gpt_oss(inputs: int, height: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"gate_up_proj": (2, inputs, 2 * height), "down_proj": (2, height, inputs)}
    biases = {"gate_up_proj_bias": (2, 2 * height), "down_proj_bias": (2, inputs)}
    return {f"{STACK}.{name}": torch.randn(shape).to(BF16) for name, shape in (shapes | biases).items()}


def as_modules(stacks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as llm-compressor has them: outputs before inputs, gate and up, which take turns, apart."""
    modules = {}
    for name, tensor in stacks.items():
        part, end = name.removeprefix(f"{STACK}.").removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
        for expert in range(2):
            rows = tensor[expert] if end == "bias" else tensor[expert].T
            apart = {"gate_proj": rows[::2], "up_proj": rows[1::2]} if part == "gate_up_proj" else {part: rows}
            modules |= {f"{STACK}.{expert}.{module}.{end}": matrix.contiguous() for module, matrix in apart.items()}
    return modules


@pytest.mark.parametrize("preset", ["FP8_BLOCK", "NVFP4A16"])
def test_experts_whose_inputs_come_first_are_turned(preset: str, tmp_path: Path) -> None:
    stacks = gpt_oss(160, 96)
    src = write(tmp_path / "stacked", stacks, config={"model_type": "gpt_oss", "dtype": "bfloat16"})
    other = write(tmp_path / "apart", as_modules(stacks), config={"model_type": "gpt_oss", "dtype": "bfloat16"})
    leaves = ("--ignore", r"re:.*experts\.1\.down")
    assert_same(bits(quantize(src, tmp_path / "a", preset, *leaves, "--verify")), bits(quantize(other, tmp_path / "b", preset, *leaves)))


def test_mxfp4_of_gpt_oss_in_blocks_of_one_byte_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Expert by expert, without a rounding: a power of two as scale of each block makes all codes exact."""
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, rows, columns in (("gate_up_proj", 192, 160), ("down_proj", 160, 96)):
        stored[f"{STACK}.{name}_blocks"] = torch.randint(0, 256, (2, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        stored[f"{STACK}.{name}_scales"] = torch.randint(112, 127, (2, rows, columns // 32), dtype=torch.uint8, generator=generator)
    config = {"model_type": "gpt_oss", "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    src = write(tmp_path / "src", stored, config=config)
    quantize(src, tmp_path / "out", "FP8_BLOCK", "--verify")
    assert run("plan", src, tmp_path / "again", "--quantize", "FP8_BLOCK", "--max-memory", ROOMY) == 0
    assert "6 of 6 quantized weights hold the numbers of the source's codes" in capsys.readouterr().out
    assert_same(bits(numbers(tmp_path / "out", tmp_path / "b")), bits(numbers(src, tmp_path / "a")))
    assert run("verify", src, tmp_path / "out", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "openai_privacy_filter"])
def test_experts_that_were_turned_are_stacks_again(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacks = {name: tensor for name, tensor in gpt_oss(160, 96).items() if kind != "llama4" or "bias" not in name}
    src = write(
        tmp_path / "src",
        {**stacks, "lm_head.weight": torch.ones(4, 4).to(BF16)},
        config={"model_type": kind, "hidden_size": 160, "dtype": "bfloat16"},
    )
    quantize(src, tmp_path / "out", "FP8_DYNAMIC", "--verify")
    back = numbers(tmp_path / "out", tmp_path / "back")
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in read(src).items()}
    for name, tensor in stacks.items():
        assert (back[name] - tensor).abs().max() <= 0.07 * tensor.abs().max()
    assert_same(bits(quantize(tmp_path / "back", tmp_path / "again", "FP8_DYNAMIC")), bits(read(tmp_path / "out")))
    tensors = read(tmp_path / "out")
    del tensors[f"{STACK}.1.up_proj.weight"], tensors[f"{STACK}.1.up_proj.weight_scale"]
    write(tmp_path / "torn", tensors, config=json.loads((tmp_path / "out" / "config.json").read_text()))
    assert "expert 1 is not whole" in refusal(capsys, "convert", tmp_path / "torn", tmp_path / "none", "--dequantize")


def test_a_stack_of_one_byte_floats_is_taken_apart_without_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = {f"{STACK}.gate_up_proj": torch.randn(2, 256, 128).to(BF16)}
    src = write(tmp_path / "src", stack, config={"model_type": "qwen3_moe", "dtype": "bfloat16"})
    before = quantize(src, tmp_path / "fp8", "fp8")[f"{STACK}.gate_up_proj"]
    after = quantize(tmp_path / "fp8", tmp_path / "out", "FP8_BLOCK", "--verify")
    for expert in range(2):
        for name, rows in zip(("gate", "up"), before[expert].chunk(2), strict=True):
            assert torch.equal(after[f"{STACK}.{expert}.{name}_proj.weight"].view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("preset", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_experts_of_gpt_oss_are_what_llm_compressor_makes_of_them(preset: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    llmcompressor = pytest.importorskip("llmcompressor")
    modifiers = pytest.importorskip("llmcompressor.modifiers.quantization")
    config = transformers.GptOssConfig(
        num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, vocab_size=64, hidden_size=256, intermediate_size=128,
        head_dim=32, num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"],
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(BF16)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(tmp_path / "src")
    made = quantize(tmp_path / "src", tmp_path / "out", preset)
    recipe = modifiers.QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head", "re:.*router"])
    model = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "src", dtype=BF16)
    llmcompressor.oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    assert_same(bits(made), bits(read(tmp_path / "theirs")))


def test_stacks_stay_stacks_in_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 256, 128).to(BF16)
    src = write(tmp_path / "x", {f"{STACK}.gate_up_proj": stack}, config={"model_type": "qwen3_moe"})
    made = quantize(src, tmp_path / "out", "fp8")
    assert run("plan", src, tmp_path / "again", "--quantize", "fp8", "--max-memory", ROOMY) == 0
    assert "1 stacks of experts stay so" in capsys.readouterr().out
    for expert in range(3):
        alone = write(tmp_path / f"x{expert}", {"a.weight": stack[expert].contiguous()}, config={"model_type": "qwen3_moe"})
        one = quantize(alone, tmp_path / f"out{expert}", "fp8")
        assert torch.equal(made[f"{STACK}.gate_up_proj"][expert].view(torch.uint8), one["a.weight"].view(torch.uint8))
        assert torch.equal(made[f"{STACK}.gate_up_proj_scale_inv"][expert], one["a.weight_scale_inv"])


@pytest.mark.parametrize(
    ("tensors", "config", "options", "told"),
    [
        ({"a.weight": torch.ones(8, 100)}, CONFIG, ("W4A16",), "a.weight has 100 columns, W4A16 takes them in groups of 128"),
        ({"a.weight": torch.ones(8, 20)}, CONFIG, ("NVFP4A16",), "a.weight has 20 columns, NVFP4A16 takes them in groups of 16"),
        ({"a.weight": torch.ones(8, 128)}, CONFIG, ("W4A17",), "--quantize W4A17: there is no such scheme"),
        ({"a.weight": torch.ones(8, 128)}, CONFIG, ("W4A16", "--ignore", "b"), "--ignore b: no linear module is called so"),
        ({"a.weight": torch.ones(8, 128)}, CONFIG, ("W4A16", "--ignore", "re:("), "--ignore re:(: not a regular expression"),
        ({"a.norm.weight": torch.ones(8, 128)}, CONFIG, ("W4A16",), "there is no weight of a linear module that it takes"),
        ({"a.weight": torch.ones(8, 128)}, None, ("W4A16",), "there is no config.json beside SRC"),
        ({f"{STACK}.gate_up_proj": torch.ones(2, 7, 128)}, {"model_type": "any"}, ("W4A16",), "no gate and up of one height"),
        (
            {f"{STACK}.down_proj": torch.ones(2, 128, 256)}, {"model_type": "any", "hidden_size": 256}, ("W4A16",),
            "has inputs first by hidden_size 256, which is not known of any",
        ),
        (
            {f"{STACK}.gate_up_proj": torch.ones(2, 128, 256)}, {"model_type": "any", "hidden_size": 128}, ("fp8",),
            "has inputs first by hidden_size 128, which is not known of any",
        ),
        ({"h.0.attn.c_attn.weight": torch.ones(128, 128)}, {"model_type": "gpt2"}, ("W4A16",), "is of a Conv1D"),
        ({"a.weight": torch.ones(8, 128)}, CONFIG, ("W4A16", "--format", "mindspore"), "mindspore files are read by no library"),
        (
            {f"{STACK}.down_proj": torch.ones(2, 128, 128)}, {"model_type": "gpt_oss"}, ("fp8",), "has inputs before outputs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, object] | None, options: tuple[str, ...], told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    src = write(tmp_path / "x", tensors, config=config)
    assert told in refusal(capsys, "convert", src, tmp_path / "out", "--quantize", *options)
    assert not (tmp_path / "out").exists()


def test_files_of_ranks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "tp-split", "--set", "model_parallel=2", "--set", f"plan={tmp_path / 'plan.json'}")
    (tmp_path / "plan.json").write_text(json.dumps({"a.weight": "colwise"}))
    src = write(tmp_path / "x", {"a.weight": torch.ones(16, 256)}, config={"model_type": "any"})
    assert "is of one rank" in refusal(capsys, "convert", src, tmp_path / "out", "--quantize", "W4A16", *options)


def test_ignore_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ignore names what --quantize leaves alone" in refusal(capsys, "convert", source(tmp_path), tmp_path / "out", "--ignore", "a")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tile_gives_the_codes_of_the_whole(data: st.DataObject) -> None:
    """Regions of codes, scales and zero points, each made alone, are those of all at once."""
    import numpy as np

    from streamconv.dtypes import DTYPES, TensorSpec
    from streamconv.graph.moves import Move, identity
    from streamconv.graph.node import Source, apply
    from streamconv.graph.ops.op import Values

    preset = presets()[data.draw(st.sampled_from(["fp8", FNUZ, *PRESETS]))]
    rows = preset.rows * data.draw(st.integers(1, 3)) if preset.rows > 1 else data.draw(st.integers(1, 150))
    columns = preset.columns * data.draw(st.integers(1, 3)) if preset.columns > 1 else data.draw(st.integers(1, 150))
    dtype = data.draw(st.sampled_from(["bfloat16", "float32"]))
    weight = Source(TensorSpec(DTYPES[dtype], (rows, columns)), ())
    numbers = np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal((rows, columns)).astype(np.float32)
    stored = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.view(np.uint32)
    before = stored.copy()
    shared = Source(TensorSpec(DTYPES["float32"], (1,)), ()) if preset.shared else None
    whole = np.array([37.5], np.float32).view(np.uint32)

    def make(node: object, region: Move) -> object:
        needs = node.op.needs(region, [child.spec for child in node.inputs])  # type: ignore[attr-defined]
        parts = []
        for child, need, flat in zip(node.inputs, needs, (stored.reshape(-1), whole), strict=False):  # type: ignore[attr-defined]
            axes = [np.arange(size) * stride for size, stride in zip(need.sizes, need.src_strides, strict=True)]
            places = need.src + sum(np.ix_(*axes)) if axes else np.array(need.src)
            parts.append(Values(flat[places], child.spec.dtype))
        out = np.zeros(region.sizes, f"u{node.spec.dtype.itemsize}")  # type: ignore[attr-defined]
        node.op.values(region, parts, Values(out, node.spec.dtype))  # type: ignore[attr-defined]
        return out

    for node in preset.encode("w", weight, shared).values():
        if getattr(node, "op", None) is None or node.op.kind != "quantize":
            continue
        height, width = node.spec.shape
        every = make(node, identity(height * width)).reshape(height, width)
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        down, across = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
        part = make(node, Move((down, across), 0, (across, 1), top * width + left, (width, 1)))
        assert (part == every[top : top + down, left : left + across]).all()
        assert apply(node.op, *node.inputs).spec == node.spec
    assert (stored == before).all()


def test_weights_that_share_a_scale_are_read_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the scale of all scales, whoever stores it, and once each for codes and scales."""
    from streamconv.engine.worker import Worker

    counted, original = [0], Worker._read

    def read_and_count(self: Worker, path: str, offset: int, view: memoryview) -> None:
        counted[0] += len(view.cast("B"))
        original(self, path, offset, view)

    src = source(tmp_path)
    monkeypatch.setattr(Worker, "_read", read_and_count)
    quantize(src, tmp_path / "out", "NVFP4A16")
    assert counted == [3 * sum(tensor.nbytes for name, tensor in load_file(src / "model.safetensors").items() if "_proj" in name)]
