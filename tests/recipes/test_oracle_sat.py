"""What SwissArmyTransformer makes of the folders that are written here, and what is made of those that it saves."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import types
import warnings

import pytest
import sat_models
import torch
from checkpoint_files import run

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
VOCAB, LAYERS = 96, 2
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}


def apply_rotary(x, cos, sin, position_id, interleaved=False, **_):
    """In plain torch what SAT has a kernel for GPUs for."""
    assert not interleaved
    cos, sin = cos[position_id].unsqueeze(1), sin[position_id].unsqueeze(1)
    first, second = x.chunk(2, -1)
    return x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


@pytest.fixture(scope="module")
def sat():
    if importlib.util.find_spec("sat") is None:
        pytest.skip("SwissArmyTransformer is not installed")
    kernel = types.ModuleType("sat.model.position_embedding.triton_rotary")
    kernel.apply_rotary = apply_rotary
    sys.modules.setdefault(kernel.__name__, kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sat.model
        import sat.training.model_io

        sat.model.BaseModel.get_args()
        return sat


def spread(model):
    """The model with random weights of some size everywhere, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def load(sat, folder):
    """SAT's model of a folder, which must have every tensor that the model has."""
    model, args = sat.AutoModel.from_pretrained(str(folder))
    return model.float().eval(), args


def text(sat, model, mask=None):
    ids = torch.arange(1, 12).unsqueeze(0)
    positions = torch.arange(11).unsqueeze(0)
    mask = torch.ones(11, 11).tril()[None, None] if mask is None else mask
    types = {"token_type_ids": torch.zeros_like(ids)}
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, **types)[0]


def llama(transformers, kv_heads=2):
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=kv_heads, max_position_embeddings=64, **SIZES)
    return transformers.LlamaForCausalLM(config)


def mixtral(transformers):
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64, num_local_experts=3, rope_theta=1e6, **SIZES
    )
    return transformers.MixtralForCausalLM(config)


def gpt2(transformers):
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def bert(transformers):
    config = transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=16, layer_norm_eps=1e-5, **SIZES)  # SAT's head has no other
    return transformers.BertForMaskedLM(config)


CAUSAL = {"llama": llama, "llama/all heads": lambda t: llama(t, 4), "mixtral-8x7b": mixtral, "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("family", CAUSAL)
def test_sat_computes_what_the_hugging_face_model_does(sat, transformers, family, tmp_path):
    name = family.partition("/")[0]
    theirs = spread(CAUSAL[family](transformers))
    theirs.save_pretrained(tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", f"{name}-hf2sat", "--quiet") == 0
    with torch.no_grad():
        wanted = theirs(torch.arange(1, 12).unsqueeze(0)).logits
        model, args = load(sat, tmp_path / "sat")
        found = text(sat, model, torch.ones(1, 1, 11, 11) if family == "bert" else None)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()

    args.save, args.mode = str(tmp_path / "saved"), "inference"
    sat.training.model_io.save_checkpoint(7, model, None, None, args)
    assert (tmp_path / "saved" / "latest").read_text() == "7"
    tied = ["--set", f"tie_word_embeddings={str(bool(theirs.config.tie_word_embeddings)).lower()}"]
    assert run("convert", tmp_path / "saved", tmp_path / "back", "--recipe", f"{name}-sat2hf", *tied, "--quiet") == 0
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(torch.arange(1, 12).unsqueeze(0)).logits, wanted)


def test_vit(sat, transformers, tmp_path):
    theirs = spread(transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=16, num_labels=7, **SIZES)))
    theirs.save_pretrained(tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "vit-hf2sat", "--quiet") == 0
    model, _ = load(sat, tmp_path / "sat")
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs(image).logits
        ids, positions = torch.zeros(2, 1).long(), torch.arange(5).expand(2, -1)
        found = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones(1, 1), image=image)[0]
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert run("convert", tmp_path / "sat", tmp_path / "back", "--recipe", "vit-sat2hf", "--quiet") == 0
    with torch.no_grad():
        assert torch.equal(transformers.ViTForImageClassification.from_pretrained(tmp_path / "back").eval()(image).logits, wanted)


BROKEN = {"CaiT": "cait_model", "YOLOS": "yolos_model", "CLIP": "clip_model"}  # in 0.4.12, whose classes for all of them moved on


@pytest.mark.parametrize(
    "family",
    ["llama", "mixtral-8x7b", "chatglm", "chatglm2", "chatglm3", "gpt2", "bert", "roberta", "vit", "deit", "cait", "yolos", "clip", "eva2"],
)
def test_sats_model_has_just_the_tensors_that_are_written(sat, family, tmp_path, monkeypatch):
    sat_models.write_family(family, tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", f"{family}-hf2sat", "--quiet") == 0
    config = json.loads((tmp_path / "sat" / "model_config.json").read_text())
    given = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "init_scale": 1e-5, "num_classes": 7, **config}
    args = argparse.Namespace(**{**vars(sat.model.BaseModel.get_args()), **given})
    module = sat.model.official
    if config["model_class"] in BROKEN:
        module = importlib.import_module(f"sat.model.official.{BROKEN[config['model_class']]}")
        monkeypatch.setattr(sat.model.ViTModel, "property", property(lambda self: self.transformer.property), raising=False)
        for given_twice in ("layernorm_epsilon", "use_final_layernorm", "is_decoder"):
            monkeypatch.delitem(sat.transformer_defaults.ARGS_DEFAULT, given_twice)
    model = getattr(module, config["model_class"])(args)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = torch.load(tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == wanted


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_low_rank_matrices_are_merged_as_sat_does(sat, transformers, kv_heads, tmp_path):
    from sat.model.finetune.lora2 import LoraMixin

    llama(transformers, kv_heads).save_pretrained(tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "llama-hf2sat", "--quiet") == 0
    model, args = load(sat, tmp_path / "sat")
    model.add_mixin("lora", LoraMixin(LAYERS, 3, lora_alpha=2, layer_range=[1]), reinit=True)
    spread(model)
    args.save, args.mode = str(tmp_path / "tuned"), "inference"
    sat.training.model_io.save_checkpoint(1, model, None, None, args)
    model.get_mixin("lora").merge_lora()
    merge = ("--recipe", "sat-repartition", "--set", "merge_lora=true", "--set", "lora_alpha=2", "--quiet")
    assert run("convert", tmp_path / "tuned", tmp_path / "merged", *merge) == 0
    found = torch.load(tmp_path / "merged" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    wanted = model.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-6) for name, tensor in wanted.items())
