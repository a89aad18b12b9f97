"""Libraries open what they have saved themselves, and say what is wrong with what was changed since (``--check-load``)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_files import run
from safetensors.torch import load_file, save_file

from streamconv.library.loading import Loading, check_load

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPS = {**SIZES, "num_key_value_heads": 2, "vocab_size": 96}


def change(folder: Path, file: str, absent: str = "", misshapen: str = "") -> None:
    """Takes a tensor away, gives another a shape of its own, and adds one."""
    tensors = load_file(folder / file)
    tensors.pop(absent)
    tensors |= {misshapen: torch.zeros(3, 5), "extra.weight": torch.zeros(2)}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def assert_found(loading: Loading, absent: str, misshapen: str, folder: str = "") -> None:
    """The three faults, and no other."""
    assert not loading.errors
    assert loading.missing == (folder + absent,)
    assert loading.unexpected == (f"{folder}extra.weight",)
    assert [(one.name, one.stored) for one in loading.mismatched] == [(folder + misshapen, (3, 5))]


@pytest.fixture
def llama(transformers, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPS)).bfloat16()
    model.save_pretrained(tmp_path / "llama", max_shard_size="100kB")
    return tmp_path / "llama"


@pytest.fixture
def bert(transformers, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    transformers.BertModel(transformers.BertConfig(vocab_size=31, **SIZES)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_transformers(container, llama, tmp_path, capsys):
    assert run("convert", llama, tmp_path / "out", "--format", container, "--check-load", "--json") == 0
    load = json.loads(capsys.readouterr().out)["load"]
    assert (load["library"], load["class"], load["missing"]) == ("transformers", "LlamaForCausalLM", [])


def test_transformers_and_what_does_not_fit(bert):
    absent, misshapen = "embeddings.word_embeddings.weight", "pooler.dense.weight"
    change(bert, "model.safetensors", absent, misshapen)
    assert_found(check_load(bert), absent, misshapen)


def test_an_expert_that_is_missing_fails_its_layers_conversion(transformers, tmp_path):
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **GROUPS))
    model.save_pretrained(tmp_path / "in")
    assert check_load(tmp_path / "in").fits
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    del tensors[next(name for name in tensors if "experts.2.w1" in name)]
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    (error,) = check_load(tmp_path / "in").errors
    assert error.startswith("model.layers.0.mlp.experts.gate_up_proj: ")


@pytest.mark.parametrize("scheme", ["fp8", "W4A16", "FP8_DYNAMIC"])
def test_quantized_checkpoints_are_judged_by_what_is_stored(scheme, llama, tmp_path):
    if scheme != "fp8":
        pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    assert run("convert", llama, out, "--quantize", scheme, "--check-load", "--quiet") == 0
    tensors = load_file(out / "model.safetensors")
    scale = next(name for name in tensors if "scale" in name)
    del tensors[scale]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert check_load(out).missing == (scale,)


def test_a_quantizer_that_is_not_there(llama, tmp_path, capsys):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "unheard-of"}}))
    assert run("doctor", llama, "--check-load") == 2
    assert "quantized by 'unheard-of', which transformers cannot open here" in capsys.readouterr().err


def test_pipelines_of_diffusers(transformers, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    vae.save_pretrained(tmp_path / "in" / "vae")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=31, bos_token_id=0, eos_token_id=2, **SIZES))
    text.save_pretrained(tmp_path / "in" / "text_encoder")
    parts = {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"], "own": ["own", "Own"]}
    index = {"_class_name": "StableDiffusionPipeline", **parts, "scheduler": ["diffusers", "DDIMScheduler"], "unet": [None, None]}
    (tmp_path / "in" / "model_index.json").write_text(json.dumps(index))
    loading = check_load(tmp_path / "in")
    assert loading.fits
    assert loading.unchecked == ("own: Own of own is not in the library, and code beside a checkpoint is not run",)
    assert check_load(tmp_path / "in" / "vae").model_class == "AutoencoderKL"
    absent, misshapen = "encoder.conv_in.weight", "encoder.conv_out.weight"
    change(tmp_path / "in" / "vae", "diffusion_pytorch_model.safetensors", absent, misshapen)
    assert_found(check_load(tmp_path / "in"), absent, misshapen, "vae/")


def test_sentence_transformers(bert, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    parts = [modules.Transformer(str(bert)), modules.Pooling(128, "mean"), modules.Dense(128, 16)]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "in"))
    assert check_load(tmp_path / "in").fits
    change(tmp_path / "in" / "2_Dense", "model.safetensors", "linear.bias", "linear.weight")
    assert_found(check_load(tmp_path / "in"), "linear.bias", "linear.weight", "2_Dense/")


def test_adapters_of_peft(llama, transformers, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.LlamaForCausalLM.from_pretrained(llama)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(str(tmp_path / "in"))
    assert check_load(tmp_path / "in").fits
    own = "base_model.model.model.layers.0.self_attn.q_proj"
    change(tmp_path / "in", "adapter_model.safetensors", f"{own}.lora_A.weight", f"{own}.lora_B.weight")
    assert_found(check_load(tmp_path / "in"), f"{own}.lora_A.default.weight", f"{own}.lora_B.default.weight")
    config = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b"}))
    assert run("doctor", tmp_path / "in", "--check-load") == 2
    assert "its base model 'a/b' is neither a folder" in capsys.readouterr().err
