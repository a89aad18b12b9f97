"""The recipes of transformers' own mappings, beside what the library makes of the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import tiny_models
import torch
from checkpoint_files import assert_same, random_tensor, read, refusal, run, write

import streamconv
from streamconv.cli.command import main

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

TO_NATIVE, TO_HUB = "transformers-hub2native", "transformers-native2hub"
FEW = ("bert", "deepseek_v3", "ernie4_5_moe", "llama", "mixtral", "nomic_bert", "qwen2_moe", "qwen3_vl_moe")
UNEQUAL = {"olmo_hybrid", "molmo2"}
"""Types whose parts are of different sizes, which the library saves as equal ones: x is made by the way back."""


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers", minversion="5")
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        yield library


def loaded(model, folder):
    """The state dict that the library makes of the files in a folder."""
    with warnings.catch_warnings(action="ignore"):
        found, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return found.state_dict()


def check(model, kind, folder):
    """Both directions of one model, bit for bit."""
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder / "x")
    if kind in UNEQUAL:
        config = json.loads((folder / "x" / "config.json").read_text())
        write(folder / "y", model.state_dict(), config=config)
        assert run("convert", folder / "y", folder / "ours", "--recipe", TO_HUB, "--quiet") == 0
        (folder / "x").rename(folder / "theirs")
        (folder / "ours").rename(folder / "x")
    wanted = loaded(model, folder / "x")
    assert run("convert", folder / "x", folder / "native", "--recipe", TO_NATIVE, "--quiet") == 0
    assert_same(read(folder / "native"), wanted)
    assert run("convert", folder / "native", folder / "back", "--recipe", TO_HUB, "--quiet") == 0
    assert_same(read(folder / "back"), read(folder / "x"))


@pytest.mark.parametrize("kind", FEW)
def test_some_types(transformers, tmp_path, kind):
    check(tiny_models.build(transformers, kind), kind, tmp_path)


@pytest.mark.oracle
@pytest.mark.slow
def test_all_types(transformers, tmp_path):
    """Every type that has a mapping: at least sixty hold, thirty of them with a tensor operation; the others say why they do not."""
    found = tiny_models.types(transformers)
    held, reasons = [], {}
    for number, kind in enumerate(found):
        step = "building"
        try:
            model = tiny_models.build(transformers, kind)
            step = "reloading by the library"
            if kind not in UNEQUAL:
                with warnings.catch_warnings(action="ignore"):
                    model.save_pretrained(tmp_path / f"{number}-own")
                loaded(model, tmp_path / f"{number}-own")
            step = "converting"
            (tmp_path / str(number)).mkdir()
            check(model, kind, tmp_path / str(number))
            held.append(kind)
        except Exception as error:  # noqa: BLE001
            reasons[kind] = f"{step}: {' '.join(str(error).split())[:160]}"
    for kind, reason in reasons.items():
        print(f"{kind}: {reason}")
    operations = [kind for kind in held if found[kind]]
    print(f"{len(held)} of {len(found)} types hold, {len(operations)} with a tensor operation")
    assert not {kind: reason for kind, reason in reasons.items() if reason.startswith("converting")}
    assert len(held) >= 60
    assert len(operations) >= 30


def llama(transformers, **sizes):
    """A small Llama with two heads for k and v."""
    torch.manual_seed(3)
    given = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 50, "head_dim": 4, **sizes,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))


# Sizes of what is taken apart ------------------------------------------------------------------------------------------


def test_parts_of_different_sizes_come_back_as_they_were(transformers, tmp_path):
    """OLMo Hybrid's convolutions of q, k and v: the library saves three thirds, which are not the model's."""
    model = tiny_models.build(transformers, "olmo_hybrid")
    check(model, "olmo_hybrid", tmp_path)
    ours = read(tmp_path / "x")
    layer = next(name.rpartition(".q_conv1d")[0] for name in ours if name.endswith(".q_conv1d.weight"))
    rows = [ours[f"{layer}.{part}_conv1d.weight"].shape[0] for part in "qkv"]
    assert rows == [ours[f"{layer}.{part}_proj.weight"].shape[0] for part in "qkv"]
    assert len(set(rows)) > 1
    theirs = read(tmp_path / "theirs")
    assert [theirs[f"{layer}.{part}_conv1d.weight"].shape[0] for part in "qkv"] != rows


def test_fused_heads_of_different_numbers_come_back_as_they_were(transformers):
    """Eight, two and two heads in one tensor: 8 + 2 + 2 parts of it, not 4 + 4 + 4."""
    from streamconv.library.model import _part_sizes

    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    assert _part_sizes(names, 48, {}, llama(transformers).config) == [32, 8, 8]
    fused = [f"encoder.{part}.weight" for part in ("query", "key", "value")]
    assert _part_sizes(fused, 48, {}, llama(transformers).config) == [32, 8, 8]


# Names -----------------------------------------------------------------------------------------------------------------


def test_legacy_names_are_read_as_the_library_reads_them(transformers, tmp_path):
    """gamma and beta of TensorFlow's norms."""
    model = tiny_models.build(transformers, "bert")
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in read(tmp_path / "x").items()
    }
    assert any(name.endswith(".gamma") for name in old)
    write(tmp_path / "old", old, config=config)
    wanted = loaded(model, tmp_path / "old")
    assert run("convert", tmp_path / "old", tmp_path / "native", "--recipe", TO_NATIVE, "--quiet") == 0
    assert_same(read(tmp_path / "native"), wanted)


def test_weight_norms_old_names_are_read_as_the_library_reads_them(transformers, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convs = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embedding_groups": 2}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **convs, num_conv_pos_embeddings=4, vocab_size=12))
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    swaps = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {}
    for name, tensor in read(tmp_path / "x").items():
        new = next((new for new in swaps if new in name), "")
        old[name.replace(new, swaps.get(new, ""))] = tensor
    assert any(name.endswith("weight_g") for name in old)
    write(tmp_path / "old", old, config=config)
    wanted = loaded(model, tmp_path / "old")
    assert run("convert", tmp_path / "old", tmp_path / "native", "--recipe", TO_NATIVE, "--quiet") == 0
    assert_same(read(tmp_path / "native"), wanted)


def test_a_base_models_checkpoint_is_loaded_into_a_class_with_a_head(transformers, tmp_path, capsys):
    model = llama(transformers)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "whole")
        model.model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    write(tmp_path / "x", read(tmp_path / "base"), config=config)
    assert "lm_head.weight" in refusal(capsys, "convert", tmp_path / "x", tmp_path / "out", "--recipe", TO_NATIVE)
    assert not (tmp_path / "out").exists()
    options = ("--recipe", TO_NATIVE, "--set", "allow_missing=lm_*, score.*", "--quiet")
    assert run("convert", tmp_path / "x", tmp_path / "out", *options) == 0
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert_same(read(tmp_path / "out"), wanted)


@pytest.mark.parametrize("tied", ["copy", "keep"])
def test_tied_tensors_are_stored_under_both_names_or_once(transformers, tmp_path, tied):
    model = llama(transformers, tie_word_embeddings=True)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "x")
    assert "lm_head.weight" not in read(tmp_path / "x")
    assert run("convert", tmp_path / "x", tmp_path / "native", "--recipe", TO_NATIVE, "--set", f"tied={tied}", "--quiet") == 0
    native = read(tmp_path / "native")
    assert ("lm_head.weight" in native) == (tied == "copy")
    assert run("convert", tmp_path / "native", tmp_path / "back", "--recipe", TO_HUB, "--quiet") == 0
    assert_same(read(tmp_path / "back"), read(tmp_path / "x"))


def test_tied_tensors_that_differ_are_refused(transformers, tmp_path, capsys):
    model = llama(transformers, tie_word_embeddings=True)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    tensors = {**model.state_dict(), "lm_head.weight": random_tensor(50, 32, seed=9)}
    write(tmp_path / "native", tensors, config=config)
    for recipe in (TO_HUB, TO_NATIVE):
        assert "lm_head.weight" in refusal(capsys, "convert", tmp_path / "native", tmp_path / "back", "--recipe", recipe)
    assert not list((tmp_path / "back").glob("*.safetensors"))


# What is refused -------------------------------------------------------------------------------------------------------


def _without(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _renamed(tensors):
    tensors["model.layers.1.mlp.upp_proj.weight"] = random_tensor(3)


def _cut(tensors):
    tensors["model.norm.weight"] = random_tensor(31)


def _doubled(tensors):
    tensors["norm.weight"] = random_tensor(32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without, ["model.layers.1.mlp.up_proj.weight", "allow_missing"]),
        (_renamed, ["model.layers.1.mlp.upp_proj.weight", "nearest is model.layers.1.mlp.up_proj.weight"]),
        (_cut, ["model.norm.weight", "(31,)", "(32,)"]),
        (_doubled, ["norm.weight and model.norm.weight"]),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(transformers, tmp_path, capsys, change, told):
    model = llama(transformers)
    tensors = dict(model.state_dict())
    change(tensors)
    write(tmp_path / "x", tensors, config={**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    line = refusal(capsys, "convert", tmp_path / "x", tmp_path / "out", "--recipe", TO_NATIVE)
    if change is _doubled:
        assert "remove one of them" in line
        assert "model.norm.weight" in line
    else:
        assert all(text in line for text in told), line
    assert not (tmp_path / "out").exists()


def test_a_missing_expert_is_refused_by_name(transformers, tmp_path, capsys):
    model = tiny_models.build(transformers, "mixtral")
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "x")
    tensors = {name: tensor for name, tensor in read(tmp_path / "x").items() if ".experts.3.w2" not in name}
    write(tmp_path / "less", tensors, config=json.loads((tmp_path / "x" / "config.json").read_text()))
    assert "experts" in refusal(capsys, "convert", tmp_path / "less", tmp_path / "out", "--recipe", TO_NATIVE)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "model_type and architectures"),
        ({"model_type": "newest", "architectures": ["NewestForCausalLM"]}, "code beside a checkpoint is not run"),
        (
            {"model_type": "newest", "architectures": ["NewestModel"], "auto_map": {"AutoModel": "modeling_newest.NewestModel"}},
            "code beside a checkpoint is not run",
        ),
        ({"model_type": "llama", "architectures": ["logging"]}, "code beside a checkpoint is not run"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}, "cannot be built from config.json"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}},
            "quantized by 'gptq'",
        ),
    ],
)
def test_models_that_the_library_does_not_have_are_refused(transformers, tmp_path, capsys, config, told):
    write(tmp_path / "x", {"a": random_tensor(2)}, config=config)
    (tmp_path / "x" / "modeling_newest.py").write_text("raise SystemExit('this was run')")
    assert told in refusal(capsys, "convert", tmp_path / "x", tmp_path / "out", "--recipe", TO_NATIVE)


def test_without_the_library_the_recipe_says_what_to_install(tmp_path):
    write(tmp_path / "x", {"a": random_tensor(2)}, config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from streamconv.cli import main\n"
        f"sys.exit(main(['plan', {str(tmp_path / 'x')!r}, {str(tmp_path / 'out')!r}, '--recipe', {TO_NATIVE!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert "pip install 'streamconv[transformers]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_special_floats_in_a_config_are_read_as_the_library_writes_them(transformers, tmp_path):
    check(tiny_models.build(transformers, "nemotron_h"), "nemotron_h", tmp_path)


# fp8 -------------------------------------------------------------------------------------------------------------------


def quantized(transformers, folder):
    """A small DeepSeek-V3 whose matrices are stored in fp8 with a scale for each block, and what they stand for in bfloat16."""
    model = tiny_models.build(transformers, "deepseek_v3").to(torch.bfloat16)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder / "plain")
    config = json.loads((folder / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
    stored, plain = {}, {}
    for name, tensor in read(folder / "plain").items():
        matrix = tensor.dim() == 2 and "_proj" in name
        if matrix:
            rows, columns = (-(-size // 8) for size in tensor.shape)
            scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) + 0.5
            values = (tensor.float() * 50).to(torch.float8_e4m3fn)
            stored |= {name: values, name.removesuffix("weight") + "weight_scale_inv": scales}
            wide = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
            plain[name] = (values.float() * wide[: tensor.shape[0], : tensor.shape[1]]).to(torch.bfloat16)
        else:
            stored[name] = plain[name] = tensor.float() if name.endswith("correction_bias") else tensor
    write(folder / "fp8", stored, config=config)
    write(folder / "bf16", plain, config={key: value for key, value in config.items() if key != "quantization_config"})
    return stored


def test_fp8_matrices_and_scales_go_to_the_experts_together_and_come_back(transformers, tmp_path):
    stored = quantized(transformers, tmp_path)
    assert run("convert", tmp_path / "fp8", tmp_path / "native", "--recipe", TO_NATIVE, "--quiet") == 0
    native = read(tmp_path / "native")
    layer = "model.layers.1.mlp.experts"
    wanted = [torch.cat([stored[f"{layer}.{e}.{part}_proj.weight_scale_inv"] for part in ("gate", "up")]) for e in range(4)]
    assert torch.equal(native[f"{layer}.gate_up_proj_scale_inv"], torch.stack(wanted))
    assert native[f"{layer}.gate_up_proj"].dtype == torch.float8_e4m3fn
    assert run("convert", tmp_path / "native", tmp_path / "back", "--recipe", TO_HUB, "--quiet") == 0
    assert_same(read(tmp_path / "back"), stored)


def test_fp8_matrices_become_bfloat16_where_asked(transformers, tmp_path):
    quantized(transformers, tmp_path)
    assert run("convert", tmp_path / "fp8", tmp_path / "native", "--recipe", TO_NATIVE, "--dequantize", "--quiet") == 0
    assert run("convert", tmp_path / "bf16", tmp_path / "wanted", "--recipe", TO_NATIVE, "--quiet") == 0
    assert_same(read(tmp_path / "native"), read(tmp_path / "wanted"))
    assert "quantization_config" not in json.loads((tmp_path / "native" / "config.json").read_text())


@pytest.mark.oracle
def test_fp8_matrices_become_what_the_library_makes_of_them(transformers, tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_finegrained_fp8

    def validate(self, *_args, **_given):
        self.quantization_config.dequantize = True  # as it does without a GPU, once its other package is there

    quantized(transformers, tmp_path)
    monkeypatch.setattr(quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer, "validate_environment", validate)
    model = tiny_models.build(transformers, "deepseek_v3")
    wanted = loaded(model, tmp_path / "fp8")
    assert run("convert", tmp_path / "fp8", tmp_path / "native", "--recipe", TO_NATIVE, "--dequantize", "--quiet") == 0
    # It keeps some modules in float32 in memory; files hold them in the dtype that they were stored in.
    wide = {name for name, tensor in wanted.items() if tensor.dtype == torch.float32 and "correction_bias" not in name}
    assert wide <= {"model.layers.1.mlp.gate.weight"}
    assert_same(read(tmp_path / "native"), {n: tensor.to(torch.bfloat16) if n in wide else tensor for n, tensor in wanted.items()})


def with_576_rows(transformers, folder, block=(128, 128), scale_dtype=torch.float32):
    """A small DeepSeek-V3 whose kv_a_proj_with_mqa has the rows that the real one has, in fp8 and in what that stands for."""
    sizes = {
        "vocab_size": 32, "hidden_size": 40, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_shared_experts": 1, "max_position_embeddings": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).to(torch.bfloat16)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder / "plain")
    stored, plain = {}, {}
    for name, tensor in read(folder / "plain").items():
        stored[name] = plain[name] = tensor
        if tensor.dim() == 2 and "_proj" in name:
            counts = [-(-size // part) for size, part in zip(tensor.shape, block, strict=True)]
            scales = (torch.rand(*counts) * 0.01 + 0.001).to(scale_dtype)
            stored[name], stored[f"{name}_scale_inv"] = (tensor.float() * 400).to(torch.float8_e4m3fn), scales
            made = stored[name].float()
            for i in range(counts[0]):
                for j in range(counts[1]):
                    made[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scales[i, j].float()
            plain[name] = made.to(torch.bfloat16)
    config = json.loads((folder / "plain" / "config.json").read_text())
    write(folder / "wanted", plain, config=config)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [*block], "activation_scheme": "dynamic"}
    write(folder / "fp8", stored, config=config)
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] == 576
    return stored, plain


DEQUANTIZE = ("--recipe", TO_NATIVE, "--dequantize", "--quiet")


@pytest.mark.parametrize(("block", "scale_dtype"), [((128, 128), torch.float32), ((100, 7), torch.bfloat16)])
def test_blocks_are_as_large_as_config_json_says(transformers, tmp_path, block, scale_dtype):
    with_576_rows(transformers, tmp_path, block, scale_dtype)
    assert run("convert", tmp_path / "fp8", tmp_path / "native", *DEQUANTIZE, "--verify") == 0
    assert run("convert", tmp_path / "wanted", tmp_path / "plain-native", "--recipe", TO_NATIVE, "--quiet") == 0
    assert_same(read(tmp_path / "native"), read(tmp_path / "plain-native"))
    native = json.loads((tmp_path / "native" / "config.json").read_text())
    assert native == json.loads((tmp_path / "wanted" / "config.json").read_text())
    assert native["dtype"] == "bfloat16"
    assert run("convert", tmp_path / "native", tmp_path / "back", "--recipe", TO_HUB, "--quiet") == 0
    assert_same(read(tmp_path / "back"), read(tmp_path / "wanted"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dequantized_numbers_are_rounded_once_to_the_dtype_asked_for(transformers, tmp_path, dtype):
    stored, _ = with_576_rows(transformers, tmp_path)
    assert run("convert", tmp_path / "fp8", tmp_path / "native", *DEQUANTIZE, "--dtype", dtype) == 0
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    spread = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:576].expand(-1, 40)
    wanted = (stored[name].float() * spread).to(getattr(torch, dtype))
    assert torch.equal(read(tmp_path / "native")[name], wanted)
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == dtype


def test_without_a_block_size_576_rows_and_five_scales_are_refused(transformers, tmp_path, capsys):
    with_576_rows(transformers, tmp_path)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    line = refusal(capsys, "convert", tmp_path / "fp8", tmp_path / "native", *DEQUANTIZE)
    assert "kv_a_proj_with_mqa.weight" in line
    assert "weight_block_size" in line
    assert not (tmp_path / "native").exists()


REAL = [(576, 7168), (7168, 2304), (18432, 896), (1536, 7168), (24576, 192), (129, 130), (576, 18432), (32768, 64)]


@pytest.mark.oracle
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_come_to_the_numbers_that_the_library_has(transformers, tmp_path, shape, scale_dtype):
    """Its own code of a backward pass, which is the one place where it cuts blocks off at the edges."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    torch.manual_seed(1)
    weight = (torch.randn(shape) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) * 0.01 + 0.001).to(scale_dtype)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16"}
    config |= {
        "model_type": "llama", "architectures": ["LlamaModel"], "num_hidden_layers": 0, "vocab_size": shape[0], "hidden_size": shape[1],
        "num_attention_heads": 1,
    }  # fmt: skip
    name = "embed_tokens.weight"
    write(tmp_path / "x", {name: weight, f"{name}_scale_inv": scales, "norm.weight": torch.ones(shape[1])}, config=config)
    assert run("convert", tmp_path / "x", tmp_path / "out", *DEQUANTIZE) == 0
    wanted = _dequantize_fp8_weight(weight, scales.float(), [128, 128], torch.float32).to(torch.bfloat16)
    assert_same(read(tmp_path / "out"), {name: wanted, "norm.weight": torch.ones(shape[1])})


# dtypes ----------------------------------------------------------------------------------------------------------------


def test_mixed_dtypes_in_one_tensor_take_a_dtype(transformers, tmp_path, capsys):
    model = tiny_models.build(transformers, "mixtral")
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "x")
    tensors = {name: tensor.to(torch.bfloat16) if ".experts.1." in name else tensor for name, tensor in read(tmp_path / "x").items()}
    write(tmp_path / "mixed", tensors, config=json.loads((tmp_path / "x" / "config.json").read_text()))
    line = refusal(capsys, "convert", tmp_path / "mixed", tmp_path / "out", "--recipe", TO_NATIVE)
    assert "bfloat16, float32" in line
    assert run("convert", tmp_path / "mixed", tmp_path / "out", "--recipe", TO_NATIVE, "--dtype", "bfloat16", "--quiet") == 0
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert_same(read(tmp_path / "out"), wanted)


# Cost ------------------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys
from streamconv.cli.command import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("code", code, "peak", int(status["VmHWM"].split()[0]) * 1024, file=sys.stderr)
"""


def peak(*arguments):
    """Bytes of memory that a command line took at most, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *map(str, arguments), "--max-memory", "500MB", "--json"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert "code 0 peak" in done.stderr, done.stderr
    return int(done.stderr.split()[-1]), json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
def test_planning_the_largest_models_takes_500_mb(transformers, tmp_path, name):
    from tools.make_checkpoint import make_checkpoint

    make_checkpoint(name, tmp_path / "x", sparse=True)
    taken, plan = peak("plan", tmp_path / "x", tmp_path / "out", "--recipe", TO_NATIVE)
    assert taken <= 500_000_000
    assert plan["peak_memory"] <= 500_000_000
    assert plan["bytes_written"] > 90_000_000_000


@pytest.mark.slow
def test_experts_of_gigabytes_are_fused_within_500_mb(transformers, tmp_path):
    from tools.make_checkpoint import make_checkpoint

    make_checkpoint("mixtral-8x7b", tmp_path / "x", layers=1)
    taken, result = peak("convert", tmp_path / "x", tmp_path / "out", "--recipe", TO_NATIVE, "--verify")
    assert taken <= 500_000_000
    assert result["verified"]
    taken, _ = peak("convert", tmp_path / "out", tmp_path / "back", "--recipe", TO_HUB)
    assert taken <= 500_000_000
    assert run("verify", tmp_path / "x", tmp_path / "back", "--quiet") == 0


# Operations that compute -----------------------------------------------------------------------------------------------


@pytest.fixture
def doubling(transformers, monkeypatch):
    """A mapping of Llama's that doubles the two matrices that it makes one of: an operation that only the library's user knows."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

    class Double(ConversionOps):
        def convert(self, input_dict, **_given):
            return {name: [tensor * 2 for tensor in tensors] for name, tensors in input_dict.items()}

        @property
        def reverse_op(self):
            return self

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    names = ["self_attn.upper_proj", "self_attn.lower_proj"]
    mapping = [
        WeightConverter(names, "self_attn.o_proj", [Double(), Concatenate(dim=0)]),
        WeightRenaming("final_norm", "norm"),
    ]
    monkeypatch.setitem(known, "llama", mapping)


def halves(model):
    """The tensors of a model as that mapping has them."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "o_proj" in name:
            for part, half in zip(("upper", "lower"), tensor.chunk(2), strict=True):
                found[name.replace("o_proj", f"{part}_proj")] = half / 2
        else:
            found[name.replace("model.norm", "model.final_norm")] = tensor
    return found


def test_an_operation_that_computes_is_run_by_itself(transformers, doubling, tmp_path):
    model = llama(transformers)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    write(tmp_path / "x", halves(model), config=config)
    assert run("convert", tmp_path / "x", tmp_path / "native", "--recipe", TO_NATIVE, "--quiet", "--verify") == 0
    assert_same(read(tmp_path / "native"), model.state_dict())
    assert_same(read(tmp_path / "native"), loaded(model, tmp_path / "x"))


def test_a_plan_with_such_an_operation_is_plain_data(transformers, doubling, tmp_path):
    model = llama(transformers)
    write(tmp_path / "x", halves(model), config={**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    assert run("plan", tmp_path / "x", tmp_path / "native", "--recipe", TO_NATIVE, "--quiet", "--out", tmp_path / "plan.json") == 0
    assert run("run", tmp_path / "plan.json", "--quiet") == 0
    assert_same(read(tmp_path / "native"), model.state_dict())


def test_an_operation_that_computes_cannot_be_undone(transformers, doubling, tmp_path, capsys):
    model = llama(transformers)
    write(tmp_path / "native", model.state_dict(), config={**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    line = refusal(capsys, "convert", tmp_path / "native", tmp_path / "back", "--recipe", TO_HUB)
    assert "aten.mul" in line


def test_a_group_that_exceeds_the_budget_is_refused_by_name(transformers, doubling, tmp_path):
    from streamconv.errors import BudgetError

    model = llama(transformers, hidden_size=1024, num_attention_heads=64, head_dim=64, num_hidden_layers=1, intermediate_size=8)
    write(tmp_path / "x", halves(model), config={**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(BudgetError, match=r"model.layers.0.self_attn.o_proj.weight") as refused:
        streamconv.plan(tmp_path / "x", tmp_path / "out", recipe=TO_NATIVE, max_memory="100MB")
    assert "foreign" not in str(refused.value)


def test_the_way_back_says_what_it_does_not_bring_back(capsys):
    assert main(["recipes", TO_HUB]) == 0
    assert "lost: tensors that transformers passes over" in capsys.readouterr().out


def test_tensors_that_the_library_passes_over_are_dropped_by_its_own_pattern(transformers, tmp_path):
    model = tiny_models.build(transformers, "deepseek_v3")
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    extra = {"model.layers.61.eh_proj.weight": random_tensor(4, 4), "model.layers.61.enorm.weight": random_tensor(4)}
    write(tmp_path / "y", read(tmp_path / "x") | extra, config=config)
    made = streamconv.plan(tmp_path / "y", tmp_path / "native", recipe=TO_NATIVE, max_memory="4GB")
    assert set(made.dropped) == set(extra)
    (rule,) = made.account.dropped
    assert rule in model._keys_to_ignore_on_load_unexpected
    assert made.account.dropped[rule] == 2


def test_neither_library_is_loaded_where_its_recipes_are_not_used(tmp_path):
    write(tmp_path / "x", {"a": random_tensor(2)})
    code = (
        "import sys\nfrom streamconv.cli.command import main\n"
        "assert main(['recipes']) == 0\n"
        f"assert main(['recipes', {TO_NATIVE!r}]) == 0\n"
        f"assert main(['plan', {str(tmp_path / 'x')!r}, {str(tmp_path / 'out')!r}]) == 0\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stderr.strip() == "[]"
    assert TO_NATIVE in done.stdout
