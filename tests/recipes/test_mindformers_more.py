"""ChatGLM, CogVLM2, GPT-2, Whisper and DeepSeek-V3 of MindSpore Transformers against its scripts' tables, written out plainly, and back."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, raw, read_any, refusal, run, write, write_ckpt
from einops import rearrange

import streamconv
from streamconv import recipes
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.formats import Extent, Source
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes, evaluate
from streamconv.graph.moves import Move
from streamconv.graph.node import apply
from streamconv.graph.ops import Dequantize, from_json
from streamconv.planning import fitting
from tools import make_checkpoint as made

FP32, BF16, FP16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn


def convert(family, source, target, *more, way="hf2ms"):
    assert run("convert", source, target, "--recipe", f"{family}-{way}", "--quiet", *more) == 0
    return read_any(target)


def there_and_back(tmp_path, family, tensors, config, *options, wanted):
    """Checks what is made of a Hugging Face checkpoint, and that the way back leads to where it began."""
    source = write(tmp_path / "hf", tensors, shards=2, config=config)
    assert_same(convert(family, source, tmp_path / "ms", *options), wanted)
    assert_same(convert(family, tmp_path / "ms", tmp_path / "back", *options, way="ms2hf"), tensors)


def options_of(**given):
    return [word for name, value in given.items() for word in ("--set", f"{name}={value}")]


def replaced(name, table):
    for old, new in table:
        name = name.replace(old, new)
    return name


# ChatGLM ------------------------------------------------------------------------------------------------------------


def glm(heads, groups, dim, *, bias=True, layers=2, hidden=12, inner=10, dtype=BF16):
    rows = (heads + 2 * groups) * dim
    shapes = {"transformer.embedding.word_embeddings.weight": (17, hidden), "transformer.rotary_pos_emb.inv_freq": (dim // 4,)}
    for i in range(layers):
        layer = f"transformer.encoder.layers.{i}"
        shapes |= {f"{layer}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
        shapes[f"{layer}.self_attention.query_key_value.weight"] = (rows, hidden)
        shapes |= {f"{layer}.self_attention.query_key_value.bias": (rows,)} if bias else {}
        shapes[f"{layer}.self_attention.dense.weight"] = (hidden, heads * dim)
        shapes[f"{layer}.mlp.dense_h_to_4h.weight"] = (2 * inner, hidden)
        shapes[f"{layer}.mlp.dense_4h_to_h.weight"] = (hidden, inner)
    shapes |= {"transformer.encoder.final_layernorm.weight": (hidden,), "transformer.output_layer.weight": (17, hidden)}
    config = {
        "model_type": "chatglm",
        "num_attention_heads": heads,
        "kv_channels": dim,
        "ffn_hidden_size": inner,
        "num_layers": layers,
        "multi_query_attention": groups != heads,
        "multi_query_group_num": groups,
    }
    return numbered(shapes, dtype), config


def own_glm(tensors, heads, groups, dim, *, qkv_concat=True, mlp_concat=True, use_rearrange_rope=False):
    found = {}
    for name, tensor in tensors.items():
        if "query_key_value" in name and (not qkv_concat or use_rearrange_rope):
            parts = list(tensor.split([heads * dim, groups * dim, groups * dim]))
            if use_rearrange_rope:
                parts[:2] = [
                    rearrange(part, "(h e two) ... -> (h two e) ...", h=h, two=2)
                    for part, h in zip(parts[:2], (heads, groups), strict=True)
                ]
            if qkv_concat:
                found[name] = torch.cat(parts)
            else:
                found |= {name.replace("query_key_value", part): t for part, t in zip(("wq", "wk", "wv"), parts, strict=True)}
        elif "dense_h_to_4h" in name and not mlp_concat:
            found |= {name.replace("dense_h_to_4h", f"dense_{part}"): t for part, t in zip(("left", "right"), tensor.chunk(2), strict=True)}
        else:
            found[name.replace("word_embeddings.weight", "embedding_weight")] = tensor
    return found


@pytest.mark.sampled(7)
@pytest.mark.parametrize("sizes", [(4, 2, 8), (3, 3, 4), (5, 1, 6)], ids=["grouped", "all heads", "one group"])
@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3)), ids=str)
def test_glm(tmp_path, sizes, switches):
    switches = dict(zip(("qkv_concat", "mlp_concat", "use_rearrange_rope"), switches, strict=True))
    tensors, config = glm(*sizes)
    there_and_back(tmp_path, "glm-n", tensors, config, *options_of(**switches), wanted=own_glm(tensors, *sizes, **switches))


def test_glm_by_options_alone_and_by_a_config_that_says_how(tmp_path):
    tensors, config = glm(4, 2, 8, bias=False)
    wanted = own_glm(tensors, 4, 2, 8, qkv_concat=False, use_rearrange_rope=True)
    said = write(tmp_path / "said", tensors, config={**config, "qkv_concat": False, "use_rearrange_rope": True})
    assert_same(convert("glm-n", said, tmp_path / "one"), wanted)
    bare = write(tmp_path / "bare", tensors)
    sizes = {"num_attention_heads": 4, "kv_channels": 8, "multi_query_attention": "true", "multi_query_group_num": 2}
    assert_same(convert("glm-n", bare, tmp_path / "two", *options_of(qkv_concat="false", use_rearrange_rope="yes", **sizes)), wanted)


def test_glm_from_a_checkpoint_that_training_wrote(tmp_path):
    tensors, config = glm(4, 2, 8)
    own = own_glm(tensors, 4, 2, 8)
    own["transformer.embedding.embedding_table"] = own.pop("transformer.embedding.embedding_weight")
    layer = "transformer.encoder.layers.0.self_attention.query_key_value"
    factors = {f"{layer}.lora_{part}.weight": random_tensor(4, 4, seed=n) for n, part in enumerate("AB")}
    own |= {f"{layer}.tk_delta_lora_{part}": factors[f"{layer}.lora_{part.upper()}.weight"] for part in "ab"}
    own |= {"global_step": torch.tensor(3), f"adam_m.{layer}.weight": random_tensor(2)}
    source = write_ckpt(tmp_path / "ms", own, config=config)
    assert_same(convert("glm-n", source, tmp_path / "hf", way="ms2hf"), tensors | factors)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_attention_heads": 2}, ["query_key_value", "64"]),
        ({"multi_query_group_num": 1}, ["query_key_value", "64"]),
        ({"ffn_hidden_size": 11, "mlp_concat": "false"}, ["dense_h_to_4h", "20 elements", "f=11"]),
        ({"use_rearrange_rope": "perhaps"}, ["true or false"]),
    ],
)
def test_glm_with_sizes_that_are_not_the_models(tmp_path, capsys, given, says):
    tensors, config = glm(4, 2, 8)
    source = write(tmp_path / "hf", tensors, config=config)
    options = options_of(**{"qkv_concat": "False", **given})
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "glm-n-hf2ms", *options)
    assert all(part in message for part in says), message


def test_glm_needs_sizes_to_split(tmp_path, capsys):
    source = write(tmp_path / "hf", glm(4, 2, 8)[0])
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "glm-n-hf2ms", "--set", "qkv_concat=False")
    assert "--set" in message
    assert "config.json" in message


# GPT-2 --------------------------------------------------------------------------------------------------------------


def gpt(hidden=12, layers=2, *, masks=True, dtype=FP32):
    shapes = {"wte.weight": (19, hidden), "wpe.weight": (8, hidden)}
    for i in range(layers):
        shapes |= {f"h.{i}.{norm}.{kind}": (hidden,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        for part, inner, outer in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
            shapes |= {f"h.{i}.{part}.weight": (inner * hidden, outer * hidden), f"h.{i}.{part}.bias": (outer * hidden,)}
        shapes |= {f"h.{i}.attn.bias": (1, 1, 8, 8), f"h.{i}.attn.masked_bias": ()} if masks else {}
    return numbered(shapes | {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}, dtype)


GPT_BLOCK = [
    ("ln_1.weight", "layernorm1.gamma"), ("ln_1.bias", "layernorm1.beta"), ("ln_2.weight", "layernorm2.gamma"),
    ("ln_2.bias", "layernorm2.beta"), ("attn.masked_bias", "attention.masked_beta"), ("attn.bias", "attention.beta"),
    ("attn.c_proj", "attention.projection"), ("mlp.c_fc", "output.mapping"), ("mlp.c_proj", "output.projection"),
]  # fmt: skip
GPT_TOP = {
    "ln_f.weight": "backbone.layernorm.gamma",
    "ln_f.bias": "backbone.layernorm.beta",
    "wte.weight": "backbone.embedding.word_embedding.embedding_table",
    "wpe.weight": "backbone.embedding.position_embedding.embedding_table",
}


def own_gpt(tensors):
    found = {}
    for name, tensor in tensors.items():
        if ".attn.c_attn." in name:
            layer, kind = name.replace("h.", "backbone.blocks.", 1).split(".attn.c_attn.")
            for n, part in enumerate(tensor.chunk(3, -1), 1):
                found[f"{layer}.attention.dense{n}.{kind}"] = part.t() if part.dim() > 1 else part
        else:
            found[GPT_TOP.get(name) or replaced(name, [("h.", "backbone.blocks."), *GPT_BLOCK])] = tensor
    return found


@pytest.mark.parametrize(("hidden", "layers", "masks"), [(12, 2, True), (7, 1, False), (4, 11, True)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gpt(tmp_path, hidden, layers, masks, dtype):
    tensors = gpt(hidden, layers, masks=masks, dtype=dtype)
    there_and_back(tmp_path, "gpt", tensors, {"n_layer": layers}, "--set", "layers=12", wanted=own_gpt(tensors))


def test_gpt_with_a_prefix_and_a_head(tmp_path):
    tensors = gpt()
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": tensors["wte.weight"]}
    source = write(tmp_path / "hf", prefixed, config={"n_layer": 2})
    assert_same(convert("gpt", source, tmp_path / "ms"), own_gpt(tensors))
    assert streamconv.plan(source, tmp_path / "x", recipe="gpt-hf2ms", max_memory="4GB").dropped == ("lm_head.weight",)


def test_gpt_with_fewer_layers(tmp_path):
    tensors, fewer = gpt(layers=3), gpt(layers=2)
    source = write(tmp_path / "hf", tensors, config={"n_layer": 3})
    kept = {name: tensors[name] for name in fewer}
    assert_same(convert("gpt", source, tmp_path / "ms", "--set", "layers=2"), own_gpt(kept))
    dropped = streamconv.plan(source, tmp_path / "x", recipe="gpt-hf2ms", options={"layers": 2}, max_memory="4GB").dropped
    assert set(dropped) == {name for name in tensors if name.startswith("h.2.")}


@pytest.mark.parametrize("name", ["h.1.attn.c_attn.bias", "h.0.ln_2.weight", "wpe.weight", "h.1.mlp.c_fc.weight"])
def test_gpt_without_a_tensor(tmp_path, capsys, name):
    tensors = gpt()
    del tensors[name]
    source = write(tmp_path / "hf", tensors, config={"n_layer": 2})
    assert name in refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "gpt-hf2ms")
    own = own_gpt(gpt())
    lost = next(key for key in own if key not in own_gpt(tensors))
    del own[lost]
    assert lost in refusal(capsys, "convert", write_ckpt(tmp_path / "ms", own), tmp_path / "out", "--recipe", "gpt-ms2hf")


def test_gpt_with_a_tensor_too_many(tmp_path, capsys):
    source = write(tmp_path / "hf", gpt() | {"score.weight": random_tensor(3)})
    assert "score.weight: no rule" in refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "gpt-hf2ms")


# Whisper ------------------------------------------------------------------------------------------------------------


def whisper(encoders=2, decoders=2, width=8, inner=12, *, dtype=FP32, head=False):
    shapes = {"model.encoder.conv1.weight": (width, 5, 3), "model.encoder.conv2.weight": (width, width, 3)}
    shapes |= {f"model.encoder.conv{n}.bias": (width,) for n in (1, 2)}
    shapes |= {"model.decoder.embed_tokens.weight": (13, width)}
    for side, layers, attentions in (("encoder", encoders, ["self_attn"]), ("decoder", decoders, ["self_attn", "encoder_attn"])):
        shapes |= {f"model.{side}.embed_positions.weight": (9, width)}
        norms = [f"model.{side}.layer_norm"]
        for i in range(layers):
            layer = f"model.{side}.layers.{i}"
            for part in attentions:
                shapes |= {f"{layer}.{part}.{name}_proj.weight": (width, width) for name in ("q", "k", "v", "out")}
                shapes |= {f"{layer}.{part}.{name}_proj.bias": (width,) for name in ("q", "v", "out")}
            for name, rows, columns in (("fc1", inner, width), ("fc2", width, inner)):
                shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
            norms += [f"{layer}.{part}_layer_norm" for part in (*attentions, "final")]
        shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    return numbered(shapes | ({"proj_out.weight": (13, width)} if head else {}), dtype)


def own_whisper(tensors):
    found = {}
    for name, tensor in tensors.items():
        table = []
        if "embed_tokens.weight" in name or "embed_positions.weight" in name:
            table = [("weight", "embedding_weight")]
        elif "layer_norm" in name:
            table = [("weight", "gamma"), ("bias", "beta")]
        found[replaced(name, table)] = tensor.unsqueeze(2) if "conv1.weight" in name or "conv2.weight" in name else tensor
    return found


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("encoders", "decoders", "head"), [(2, 2, False), (3, 1, True)])
def test_whisper(tmp_path, encoders, decoders, head, dtype):
    tensors = whisper(encoders, decoders, dtype=dtype, head=head)
    config = {"encoder_layers": encoders, "decoder_layers": decoders}
    there_and_back(tmp_path, "whisper", tensors, config, wanted=own_whisper(tensors))


def test_whisper_without_a_head_around_it(tmp_path):
    tensors = {name.removeprefix("model."): tensor for name, tensor in whisper().items()}
    there_and_back(tmp_path, "whisper", tensors, None, wanted=own_whisper(tensors))


def test_whisper_with_a_layer_too_few(tmp_path, capsys):
    source = write(tmp_path / "hf", whisper(2, 1), config={"encoder_layers": 2, "decoder_layers": 2})
    assert "model.decoder.layers.1." in refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "whisper-hf2ms")


# CogVLM2 ------------------------------------------------------------------------------------------------------------


def cogvlm2(heads, groups, dim, *, image=False, layers=2, hidden=10, vision=6):
    rows, experts = (heads + 2 * groups) * dim, ("language", "vision") if image else ("language",)
    shapes = {"model.embed_tokens.weight": (11, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (11, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
        for part in experts:
            shapes[f"{layer}.self_attn.{part}_expert_query_key_value.weight"] = (rows, hidden)
            shapes[f"{layer}.self_attn.{part}_expert_dense.weight"] = (hidden, heads * dim)
            shapes |= {f"{layer}.mlp.{part}_mlp.{name}_proj.weight": (14, hidden) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.{part}_mlp.down_proj.weight"] = (hidden, 14)
        shapes |= {f"{layer}.self_attn.vision_expert_query_key_value.bias": (rows,)} if image else {}
    vit = "model.vision"
    shapes |= {f"{vit}.patch_embedding.cls_embedding": (1, vision), f"{vit}.patch_embedding.position_embedding.weight": (5, vision)}
    shapes |= {f"{vit}.patch_embedding.proj.weight": (vision, 3, 2, 2), f"{vit}.patch_embedding.proj.bias": (vision,)}
    for i in range(3):
        layer = f"{vit}.transformer.layers.{i}"
        for name, rows, columns in (
            ("attention.query_key_value", 3 * vision, vision), ("attention.dense", vision, vision), ("mlp.fc1", 9, vision),
            ("mlp.fc2", vision, 9),
        ):  # fmt: skip
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        shapes |= {f"{layer}.{norm}_layernorm.{kind}": (vision,) for norm in ("input", "post_attention") for kind in ("weight", "bias")}
    shapes |= {f"{vit}.linear_proj.norm1.{kind}": (hidden,) for kind in ("weight", "bias")}
    shapes |= {f"{vit}.linear_proj.{name}.weight": (8, 8) for name in ("linear_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h")}
    shapes |= {f"{vit}.conv.weight": (vision, vision, 2, 2), f"{vit}.conv.bias": (vision,), f"{vit}.boi": (1, 1, hidden)}
    tensors = numbered(shapes | {f"{vit}.eoi": (1, 1, hidden)}, BF16)
    rope = random_tensor(dim // 2, dtype=BF16, seed=99)
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": rope for i in range(layers)}
    config = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_multi_query_heads": groups,
        "head_dim": dim,
        "vision_config": {"num_hidden_layers": 3},
    }
    return tensors, config


COGVLM2_VIT = [
    ("model.vision.transformer.layers", "vision_encoder.blocks"), ("model.vision.patch_embedding.", "vision_encoder.patch_embed."),
    ("attention.dense", "attn.proj"), ("attention.query_key_value", "attn.qkv"), ("post_attention_layernorm.weight", "norm2.gamma"),
    ("post_attention_layernorm.bias", "norm2.beta"), ("input_layernorm.weight", "norm1.gamma"), ("input_layernorm.bias", "norm1.beta"),
    ("patch_embed.cls_embedding", "cls_token"), ("patch_embed.position_embedding.weight", "pos_embed"),
]  # fmt: skip
COGVLM2_VIDEO = [
    ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attention_norm"),
    ("self_attn.language_expert_dense", "attention.wo"), ("mlp.language_mlp.gate_proj", "feed_forward.w1"),
    ("mlp.language_mlp.up_proj", "feed_forward.w3"), ("mlp.language_mlp.down_proj", "feed_forward.w2"),
]  # fmt: skip
COGVLM2_ENDS = [("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight"), ("model.norm.weight", "model.norm_out.weight")]


def own_cogvlm2(tensors, heads, groups, dim, *, modal, sft):
    found = {}
    pet = "pet_model.lora_model." if sft == "lora" else ""
    prefix = f"llm_model.{pet if modal == 'video' else ''}"
    for name, tensor in tensors.items():
        if name.endswith("self_attn.rotary_emb.inv_freq"):
            found[f"llm_model.{pet}model.freqs_mgr.freqs"] = tensor
        elif name.startswith(("model.vision.patch_embedding", "model.vision.transformer")):
            new = replaced(name, COGVLM2_VIT)
            found[new] = tensor.unsqueeze(0) if new.endswith(("cls_token", "pos_embed")) else tensor
        elif name.startswith("model.vision"):
            new = name.replace("model.vision", "mlp_adapter")
            found[replaced(new, [("norm1.weight", "norm1.gamma"), ("norm1.bias", "norm1.beta")])] = tensor
        elif modal == "video" and "query_key_value" in name:
            layer = prefix + name.removesuffix("self_attn.language_expert_query_key_value.weight")
            parts = tensor.split([heads * dim, groups * dim, groups * dim])
            found |= {f"{layer}attention.w{part}.weight": t for part, t in zip("qkv", parts, strict=True)}
        else:
            table = COGVLM2_VIDEO if modal == "video" else [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")]
            found[prefix + replaced(name, [*COGVLM2_ENDS, *table])] = tensor
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sizes", [(4, 2, 8), (3, 1, 4), (2, 2, 6)], ids=["grouped", "one group", "all heads"])
@pytest.mark.parametrize("modal", ["video", "image"])
@pytest.mark.parametrize("sft", ["full", "lora"])
def test_cogvlm2(tmp_path, sizes, modal, sft):
    tensors, config = cogvlm2(*sizes, image=modal == "image")
    wanted = own_cogvlm2(tensors, *sizes, modal=modal, sft=sft)
    there_and_back(tmp_path, "cogvlm2", tensors, config, *options_of(modal=modal, sft=sft), wanted=wanted)


def test_cogvlm2_image_without_experts_for_vision(tmp_path):
    tensors, config = cogvlm2(4, 2, 8)
    wanted = own_cogvlm2(tensors, 4, 2, 8, modal="image", sft="full")
    there_and_back(tmp_path, "cogvlm2", tensors, config, "--set", "modal=image", wanted=wanted)


def test_cogvlm2_back_without_a_config(tmp_path):
    tensors, _ = cogvlm2(4, 2, 8, layers=3)
    source = write_ckpt(tmp_path / "ms", own_cogvlm2(tensors, 4, 2, 8, modal="video", sft="full"))
    assert_same(convert("cogvlm2", source, tmp_path / "hf", way="ms2hf"), tensors)


@pytest.mark.parametrize("given", [{"num_attention_heads": 3}, {"num_multi_query_heads": 1}, {"head_dim": 16}])
def test_cogvlm2_with_heads_that_are_not_the_models(tmp_path, capsys, given):
    tensors, config = cogvlm2(4, 2, 8)
    source = write(tmp_path / "hf", tensors, config=config)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "cogvlm2-hf2ms", *options_of(**given))
    assert "language_expert_query_key_value" in message


# DeepSeek-V3 --------------------------------------------------------------------------------------------------------

DEEPSEEK = {
    "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "hidden_size": 20, "intermediate_size": 18, "moe_intermediate_size": 6,
    "n_shared_experts": 1, "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "n_routed_experts": 12,
    "num_attention_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "vocab_size": 23, "quantization_config": {"quant_method": "fp8", "weight_block_size": [7, 4]},
}  # fmt: skip


def deepseek3(*, quantized=False, **sizes):
    """A small model of these sizes, whose embeddings are where it repeats them as they should be."""
    config = DEEPSEEK | sizes
    tensors = {}
    for seed, (name, (dtype, shape)) in enumerate(made.deepseek_shapes(config).items()):
        if quantized or not name.endswith("_scale_inv"):
            tensors[name] = random_tensor(
                *shape, dtype=getattr(torch, dtype) if quantized or not dtype.startswith("float8") else BF16, seed=seed
            )
    for name in tensors:
        if name.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
            tensors[name] = tensors["lm_head.weight" if "head" in name else "model.embed_tokens.weight"].clone()
    return tensors, config if quantized else {key: value for key, value in config.items() if key != "quantization_config"}


def dequantized(weight, scales, rows, columns):
    spread = scales.float().repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return (weight.float() * spread).to(BF16)


def plain(tensors, config):
    """The tensors without scales, all in bfloat16 or as they were."""
    block = config.get("quantization_config", {}).get("weight_block_size")
    return {
        name: dequantized(tensor, tensors[f"{name}_scale_inv"], *block) if tensor.dtype == FP8 else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def own_deepseek3(tensors, config, *, grouped=True, dtype=BF16):
    t = {name: tensor.float() for name, tensor in tensors.items()}
    heads, nope, rope = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    layers, dense, experts = (config[key] for key in ("num_hidden_layers", "first_k_dense_replace", "n_routed_experts"))
    found = {
        "model.tok_embeddings.embedding_weight": t["model.embed_tokens.weight"],
        "model.norm_out.weight": t["model.norm.weight"],
        "lm_head.weight": t["lm_head.weight"],
    }
    for i in range(layers + config["num_nextn_predict_layers"]):
        old, new = f"model.layers.{i}", f"model.layers.{i}"
        attention, own = f"{old}.self_attn", f"{new}.attention"
        for a, b in (("q_a_proj", "q2l_proj"), ("q_a_layernorm", "lq_norm"), ("kv_a_layernorm", "lkv_norm"), ("o_proj", "wo")):
            found[f"{own}.{b}.weight"] = t[f"{attention}.{a}.weight"]
        q = t[f"{attention}.q_b_proj.weight"].unflatten(0, (heads, nope + rope))
        found[f"{own}.l2q_nope_proj.weight"] = q[:, :nope].flatten(0, 1)
        found[f"{own}.l2q_pe_proj.weight"] = rearrange(q[:, nope:], "h (e two) i -> (h two e) i", two=2)
        kv = t[f"{attention}.kv_a_proj_with_mqa.weight"]
        found[f"{own}.kv2l_latent_kv.weight"] = kv[:-rope]
        found[f"{own}.kv2l_k_pe.weight"] = rearrange(kv[-rope:], "(e two) i -> (two e) i", two=2)
        kv = t[f"{attention}.kv_b_proj.weight"].unflatten(0, (heads, -1))
        found[f"{own}.lkv2kv_k_nope.weight"] = kv[:, :nope].flatten(0, 1)
        found[f"{own}.lkv2kv_v.weight"] = kv[:, nope:].flatten(0, 1)
        found[f"{new}.attention_norm.weight"] = t[f"{old}.input_layernorm.weight"]
        found[f"{new}.ffn_norm.weight"] = t[f"{old}.post_attention_layernorm.weight"]
        names = {"gate": "w1", "down": "w2", "up": "w3"}
        mlp, ffn = f"{old}.mlp", f"{new}.feed_forward"
        if i < dense:
            found |= {f"{ffn}.{b}.weight": t[f"{mlp}.{a}_proj.weight"] for a, b in names.items()}
        else:
            found |= {f"{ffn}.shared_experts.{b}.weight": t[f"{mlp}.shared_experts.{a}_proj.weight"] for a, b in names.items()}
            stack = {a: torch.stack([t[f"{mlp}.experts.{e}.{a}_proj.weight"] for e in range(experts)]) for a in names}
            routed = f"{ffn}.routed_experts"
            found[f"{routed}.router_dense.weight" if grouped else f"{routed}.router.dense.weight"] = t[f"{mlp}.gate.weight"]
            found[f"{routed}.topk_bias" if grouped else f"{routed}.router.router.topk_bias"] = t[f"{mlp}.gate.e_score_correction_bias"]
            if grouped:
                found[f"{routed}.ffn.w1"] = torch.cat([stack["gate"].mT, stack["up"].mT], 2)
                found[f"{routed}.ffn.w2"] = stack["down"].mT
            else:
                found |= {f"{routed}.ffn.{b}.weight": stack[a] for a, b in names.items()}
        if i >= layers:
            fuser = f"model.mtp_hidden_fusers.{i - layers}"
            found |= {
                f"{fuser}.{b}.weight": t[f"{old}.{a}.weight"] for a, b in (("enorm", "norm_emb"), ("hnorm", "norm"), ("eh_proj", "dense"))
            }
            found[f"model.mtp_norms.{i - layers}.weight"] = t[f"{old}.shared_head.norm.weight"]
    kept = ("norm", "router.dense", "topk_bias")
    return {name: tensor if any(part in name for part in kept) else tensor.to(dtype) for name, tensor in found.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "not grouped"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0, "num_attention_heads": 1},
        {"num_nextn_predict_layers": 2, "num_hidden_layers": 1, "first_k_dense_replace": 1, "qk_rope_head_dim": 6},
        {"num_hidden_layers": 11, "first_k_dense_replace": 11, "num_nextn_predict_layers": 0},
    ],
    ids=["all", "no prediction", "two predictions", "no experts"],
)
def test_deepseek3(tmp_path, grouped, sizes):
    tensors, config = deepseek3(**sizes)
    source = write(tmp_path / "hf", tensors, shards=3, config=config)
    options = options_of(use_grouped_gemm=grouped)
    assert_same(convert("deepseek3", source, tmp_path / "ms", *options), own_deepseek3(tensors, config, grouped=grouped))
    # How experts are stored is seen; norms were and stay float32 unless told otherwise.
    found = convert("deepseek3", tmp_path / "ms", tmp_path / "back", "--dtype", "bf16", way="ms2hf")
    assert_same(found, {name: tensor.to(BF16) for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_deepseek3_with_a_dtype(tmp_path, dtype):
    tensors, config = deepseek3()
    source = write(tmp_path / "hf", tensors, config=config)
    found = convert("deepseek3", source, tmp_path / "ms", "--dtype", str(dtype))
    assert_same(found, own_deepseek3(tensors, config, dtype=dtype))


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "not grouped"])
def test_deepseek3_from_float8(tmp_path, grouped):
    tensors, config = deepseek3(quantized=True)
    source = write(tmp_path / "hf", tensors, shards=4, config=config)
    given = ("--set", f"use_grouped_gemm={grouped}", "--max-shard-size", "5KB", "--verify")
    found = convert("deepseek3", source, tmp_path / "ms", *given)
    wanted = plain(tensors, config)
    assert_same(found, own_deepseek3(wanted, config, grouped=grouped))
    files = {path.name for path in (tmp_path / "ms").iterdir()}
    where = json.loads((tmp_path / "ms" / "param_name_map.json").read_text())
    assert set(where) == set(found)
    assert set(where.values()) | {"param_name_map.json", "config.json"} == files
    assert all(name.startswith("ms-model-") for name in where.values())
    assert "quantization_config" not in json.loads((tmp_path / "ms" / "config.json").read_text())
    assert run("verify", source, tmp_path / "ms", "--recipe", "deepseek3-hf2ms", "--set", f"use_grouped_gemm={grouped}", "--quiet") == 0

    back = convert("deepseek3", tmp_path / "ms", tmp_path / "back", "--dtype", "bf16", "--sidecars-from", source, way="ms2hf")
    assert_same(back, {name: tensor.to(BF16) for name, tensor in wanted.items()})
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert any("dequantize of the other direction is not undone" in line for line in recipes.get("deepseek3-ms2hf").lost)


def test_deepseek3_as_ckpt(tmp_path):
    tensors, config = deepseek3()
    source = write(tmp_path / "hf", tensors, config=config)
    found = convert("deepseek3", source, tmp_path / "ms", "--format", "mindspore")
    assert [path.name for path in (tmp_path / "ms").glob("*.ckpt")] == ["model.ckpt"]
    assert_same(found, own_deepseek3(tensors, config))


def test_deepseek3_with_fewer_layers(tmp_path):
    tensors, config = deepseek3()
    source = write(tmp_path / "hf", tensors, config=config)
    for name, given, taken in (
        ("two", {"num_layers": 2}, {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}),
        ("three", {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 0}),
        ("more", {"num_layers": 61}, {}),
    ):
        made_of = own_deepseek3(tensors, config | taken)
        assert_same(convert("deepseek3", source, tmp_path / name, *options_of(**given)), made_of)
    whole = write(tmp_path / "own", own_deepseek3(tensors, config), config=config)
    back = convert("deepseek3", whole, tmp_path / "back", "--set", "num_layers=2", "--dtype", "bf16", way="ms2hf")
    kept = {name for name in tensors if not name.startswith(("model.layers.2.", "model.layers.3."))}
    assert_same(back, {name: tensors[name].to(BF16) for name in kept})


@pytest.mark.parametrize(
    ("lost", "options", "says"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv", {}, ["experts.3.up_proj", "scales", "float8"]),
        ("model.layers.1.mlp.experts.3.up_proj.weight", {}, ["experts.3.up_proj.weight is missing"]),
        ("model.layers.2.mlp.experts.11.{}_proj.weight", {}, ["experts.11.gate_proj.weight is missing"]),
        ("model.layers.1.self_attn.kv_b_proj.weight", {}, ["model.layers.1.self_attn.kv_b_proj.weight is missing"]),
        ("model.layers.2.input_layernorm.weight", {}, ["model.layers.2."]),
        ("model.layers.3.mlp.gate.weight", {}, ["mlp.gate", "not in the same layers"]),
        ("model.layers.3.eh_proj.weight", {}, ["eh_proj", "multi-token prediction"]),
        (None, {"n_head": 4}, ["q_b_proj", "h=4"]),
        (None, {"qk_rope_head_dim": 2}, ["q_b_proj"]),
        (None, {"v_head_dim": 4}, ["kv_b_proj"]),
        (None, {"num_routed_experts": 8}, ["e=8"]),
    ],
)
def test_deepseek3_refused(tmp_path, capsys, lost, options, says):
    tensors, config = deepseek3(quantized=True)
    for part in ("gate", "up", "down") if lost else ():
        for name in (lost.format(part), *([f"{lost.format(part)}_scale_inv"] if "{" in lost else [])):
            tensors.pop(name, None)
    source = write(tmp_path / "hf", tensors, config=config)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "deepseek3-hf2ms", *options_of(**options))
    assert all(part in message for part in says), message


def test_deepseek3_without_any_scale(tmp_path, capsys):
    tensors, config = deepseek3(quantized=True)
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    source = write(tmp_path / "hf", left, config=config)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "deepseek3-hf2ms")
    assert "the scales of its blocks" in message


def test_deepseek3_with_scales_of_other_blocks(tmp_path, capsys):
    tensors, config = deepseek3(quantized=True)
    del config["quantization_config"]
    source = write(tmp_path / "hf", tensors, config=config)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "deepseek3-hf2ms")
    assert "scales" in message
    assert "128 x 128" in message


# Dequantization -----------------------------------------------------------------------------------------------------


def quantized_node(path, rows, columns, block, dtype, scale_dtype=FP32):
    """A node over two stored tensors with all codes, NaNs among them, and what it should be."""
    weight = torch.from_numpy(np.random.default_rng(rows).integers(0, 256, (rows, columns), dtype=np.uint8)).view(dtype)
    scales = (random_tensor(math.ceil(rows / block[0]), math.ceil(columns / block[1])) * 1e-3).to(scale_dtype)
    path.write_bytes(raw(weight) + raw(scales))
    leaves, start = [], 0
    for tensor in (weight, scales):
        spec = TensorSpec(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        leaves.append(Source(spec, (Extent(str(path), start, spec.nbytes),)))
        start += spec.nbytes
    wanted = dequantized(weight, scales, *block)
    wanted[wanted.isnan()] = math.nan
    return apply(Dequantize((rows, columns), block), *leaves), wanted


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(300, 257, (128, 128)), (1, 1, (128, 128)), (7, 5, (2, 3)), (129, 400, (128, 128)), (600, 512, (64, 32))]
)
def test_any_region_is_dequantized_alike_within_its_arena(tmp_path, rows, columns, block, dtype):
    node, wanted = quantized_node(tmp_path / "x", rows, columns, block, dtype)
    assert from_json(node.op.to_json()) == node.op
    bits = wanted.view(torch.int16).flatten()
    moves = [
        Move((rows * columns,), 0, (1,), 0, (1,)),
        Move((columns, rows), 0, (rows, 1), 0, (1, columns)),
        Move((rows, columns), 3, (2 * columns, 2), 0, (columns, 1)),
    ]
    draw = np.random.default_rng(columns)
    for _ in range(6):
        start = int(draw.integers(rows * columns))
        moves.append(Move((int(draw.integers(1, rows * columns - start + 1)),), 0, (1,), start, (1,)))
        top, left = int(draw.integers(rows)), int(draw.integers(columns))
        box = (int(draw.integers(1, columns - left + 1)), int(draw.integers(1, rows - top + 1)))
        moves.append(Move(box, 0, (box[1], 1), top * columns + left, (1, columns)))
    data = (tmp_path / "x").read_bytes()

    def read(_path, offset, view):
        view[:] = data[offset : offset + len(view)]

    for move in moves:
        arena = Arena(arena_bytes(node, move.numel * 2, scattered=True))
        out = np.zeros(1 + move.dst + sum((n - 1) * d for n, d in zip(move.sizes, move.dst_strides, strict=True)), dtype=np.uint16)
        evaluate(node, move, out, arena, read)
        places = [np.zeros((), dtype=np.int64), np.zeros((), dtype=np.int64)]
        for n, d, s in zip(move.sizes, move.dst_strides, move.src_strides, strict=True):
            places = [at[..., None] + np.arange(n) * step for at, step in zip(places, (d, s), strict=True)]
        got = torch.from_numpy(out.view(np.int16)[move.dst + places[0]])
        assert torch.equal(got, bits[torch.from_numpy(move.src + places[1])]), move
        assert arena.mark == 0


@pytest.mark.slow
def test_tiles_of_any_size_give_the_same_bytes(tmp_path, monkeypatch):
    tensors, config = deepseek3(quantized=True, hidden_size=260, moe_intermediate_size=140, num_hidden_layers=2, n_routed_experts=5)
    source = write(tmp_path / "hf", tensors, config=config | {"quantization_config": {"weight_block_size": [128, 128]}} | {})
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        shape = tensors[name.removesuffix("_scale_inv")].shape
        tensors[name] = random_tensor(*(math.ceil(size / 128) for size in shape))
    config["quantization_config"] = {"weight_block_size": [128, 128]}
    source = write(tmp_path / "hf", tensors, config=config)
    wanted = own_deepseek3(plain(tensors, config), config)
    for number, tile in enumerate((1 << 10, 7000, 1 << 16, 1 << 23)):
        monkeypatch.setattr(fitting, "TILE", tile)
        monkeypatch.setattr(fitting, "SCATTERED_TILE", tile)
        assert_same(convert("deepseek3", source, tmp_path / str(number)), wanted)


def streamed(*words):
    """What the command line prints as JSON, in a process of its own that may take half a gigabyte."""
    command = [sys.executable, "-c", "import sys; from streamconv.cli import main; sys.exit(main())", *map(str, words), "--json"]
    done = subprocess.run([*command, "--max-memory", "500MB"], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_deepseek3_of_the_published_shape_is_planned_in_half_a_gigabyte(tmp_path):
    made.make_checkpoint("deepseek-v3", tmp_path / "hf", sparse=True)
    plan = streamed("plan", tmp_path / "hf", tmp_path / "ms", "--recipe", "deepseek3-hf2ms")
    assert plan["peak_memory"] <= 500e6
    assert plan["dropped"] == ["model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight"]
    shapes = {row["target"]: (row["dtype"], row["shape"]) for row in plan["mapping"]}
    assert shapes["model.layers.60.feed_forward.routed_experts.ffn.w1"] == ("bfloat16", [256, 7168, 4096])
    assert shapes["model.layers.0.attention.l2q_pe_proj.weight"] == ("bfloat16", [128 * 64, 1536])


@pytest.mark.slow
def test_deepseek3_of_400_million_parameters_takes_half_a_gigabyte(tmp_path):
    config = made.MODELS["deepseek-v3"].config | {
        "hidden_size": 2048, "moe_intermediate_size": 1024, "intermediate_size": 3000, "n_routed_experts": 16, "num_hidden_layers": 3,
        "first_k_dense_replace": 1, "num_attention_heads": 16, "vocab_size": 3000,
    }  # fmt: skip
    (tmp_path / "hf").mkdir()
    made.write_shard(tmp_path / "hf" / "model.safetensors", made.deepseek_shapes(config))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    done = streamed("convert", tmp_path / "hf", tmp_path / "ms", "--recipe", "deepseek3-hf2ms", "--max-shard-size", "300MB", "--verify")
    assert done["peak_rss"] <= done["peak_memory"] <= 500e6
    given, found = streamconv.open(tmp_path / "hf"), streamconv.open(tmp_path / "ms")
    for expert in (0, 15):
        name = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        wanted = dequantized(given[name].torch(), given[f"{name}_scale_inv"].torch(), 128, 128)
        own = found["model.layers.2.feed_forward.routed_experts.ffn.w2"].torch(rows=slice(expert, expert + 1))[0].t()
        assert torch.equal(own.isnan(), wanted.isnan())
        assert torch.equal(own.nan_to_num(), wanted.nan_to_num())
