"""Makes a checkpoint with the names, shapes and config of a known model, filled with random numbers or with holes.

    python -m tools.make_checkpoint llama-3-8b DIR --size 8GB
    python -m tools.make_checkpoint deepseek-v3 DIR --sparse
    python -m tools.make_checkpoint --check DIR

A sparse checkpoint takes almost no disk: each tensor is a hole between two stamps made from its name, so that ``--check`` can tell
whether a conversion which keeps names put each tensor's first and last byte at their places. The file format is written and read
here by its own few lines, not by the package under test.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from streamconv.errors import UsageError
from streamconv.units import format_size, parse_size

Config = dict[str, Any]
Shapes = dict[str, tuple[str, tuple[int, ...]]]

# dtype -> its name in the file, bytes. A file holds the later ones first, then by name: the order in which the safetensors library saves.
DTYPES = {
    "uint8": ("U8", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int32": ("I32", 4),
    "float32": ("F32", 4), "int64": ("I64", 8),
}  # fmt: skip
FLOATS = ("float32", "bfloat16", "float16")
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
_STAMP = 8
_BLOCK = 8 << 20
_CHUNK = 4 << 20


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype][1]


# ---------------------------------------------------------------------------------------------------------------------------------
# The shapes: one function per kind of model, from the model's own config


def _linear(name: str, out: int, inner: int, dtype: str, *, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{name}.weight": (dtype, (out, inner))}
    return weight | {f"{name}.bias": (dtype, (out,))} if bias else weight


def _norm(name: str, size: int, dtype: str, *, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{name}.weight": (dtype, (size,))}
    return weight | {f"{name}.bias": (dtype, (size,))} if bias else weight


def bert_shapes(config: Config) -> Shapes:
    """BERT, as a sentence encoder stores it."""
    dtype, hidden, inter = config["torch_dtype"], config["hidden_size"], config["intermediate_size"]
    positions = config["max_position_embeddings"]
    tensors: Shapes = {
        "embeddings.position_ids": ("int64", (1, positions)),
        "embeddings.word_embeddings.weight": (dtype, (config["vocab_size"], hidden)),
        "embeddings.position_embeddings.weight": (dtype, (positions, hidden)),
        "embeddings.token_type_embeddings.weight": (dtype, (config["type_vocab_size"], hidden)),
    }
    tensors |= _norm("embeddings.LayerNorm", hidden, dtype, bias=True)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            tensors |= _linear(f"{layer}.attention.self.{part}", hidden, hidden, dtype, bias=True)
        tensors |= _linear(f"{layer}.attention.output.dense", hidden, hidden, dtype, bias=True)
        tensors |= _norm(f"{layer}.attention.output.LayerNorm", hidden, dtype, bias=True)
        tensors |= _linear(f"{layer}.intermediate.dense", inter, hidden, dtype, bias=True)
        tensors |= _linear(f"{layer}.output.dense", hidden, inter, dtype, bias=True)
        tensors |= _norm(f"{layer}.output.LayerNorm", hidden, dtype, bias=True)
    return tensors | _linear("pooler.dense", hidden, hidden, dtype, bias=True)


def llama_shapes(config: Config, *, prefix: str = "", qkv_bias: bool = False) -> Shapes:
    """Llama and Qwen2 (biases on q, k, v), and Mixtral where the config names experts."""
    dtype, hidden, inter = config["torch_dtype"], config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    tensors: Shapes = {f"{prefix}model.embed_tokens.weight": (dtype, (config["vocab_size"], hidden))}
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{i}"
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            tensors |= _linear(f"{layer}.self_attn.{part}_proj", config[heads] * head, hidden, dtype, bias=qkv_bias)
        tensors |= _linear(f"{layer}.self_attn.o_proj", hidden, hidden, dtype)
        if "num_local_experts" in config:
            moe = f"{layer}.block_sparse_moe"
            tensors |= _linear(f"{moe}.gate", config["num_local_experts"], hidden, dtype)
            for expert in range(config["num_local_experts"]):
                tensors |= _linear(f"{moe}.experts.{expert}.w1", inter, hidden, dtype)
                tensors |= _linear(f"{moe}.experts.{expert}.w2", hidden, inter, dtype)
                tensors |= _linear(f"{moe}.experts.{expert}.w3", inter, hidden, dtype)
        else:
            tensors |= _linear(f"{layer}.mlp.gate_proj", inter, hidden, dtype)
            tensors |= _linear(f"{layer}.mlp.up_proj", inter, hidden, dtype)
            tensors |= _linear(f"{layer}.mlp.down_proj", hidden, inter, dtype)
        tensors |= _norm(f"{layer}.input_layernorm", hidden, dtype)
        tensors |= _norm(f"{layer}.post_attention_layernorm", hidden, dtype)
    tensors |= _norm(f"{prefix}model.norm", hidden, dtype)
    return tensors | _linear(f"{prefix}lm_head", config["vocab_size"], hidden, dtype)


def quantized_llama_shapes(config: Config) -> Shapes:
    """Llama with the weights of its layers' linear modules quantized as the config says: in blocks of fp8, or packed."""
    tensors: Shapes = {}
    for name, (dtype, shape) in llama_shapes(config).items():
        if len(shape) == 2 and ".layers." in name:
            tensors |= _quantized(name, config["quantization_config"], shape)
        else:
            tensors[name] = dtype, shape
    return tensors


def _quantized(name: str, quantization: Config, shape: tuple[int, ...]) -> Shapes:
    """The tensors that stand for a weight of ``shape``."""
    rows, columns = shape
    if quantization["quant_method"] == "fp8":
        down, across = quantization["weight_block_size"]
        return {
            name: ("float8_e4m3fn", shape),
            f"{name}_scale_inv": ("float32", (math.ceil(rows / down), math.ceil(columns / across))),
        }
    (group,) = quantization["config_groups"].values()
    scales = rows, columns // group["weights"]["group_size"]
    if group["format"] == "mxfp4-pack-quantized":
        return {f"{name}_packed": ("uint8", (rows, columns // 2)), f"{name}_scale": ("uint8", scales)}
    return {f"{name}_packed": ("int32", (rows, columns // 8)), f"{name}_scale": ("bfloat16", scales), f"{name}_shape": ("int64", (2,))}


def internvl_shapes(config: Config) -> Shapes:
    """InternVL, with the names of its files in Hugging Face form: an InternViT, a projector, a Qwen2."""
    dtype, vision, text = config["torch_dtype"], config["vision_config"], config["text_config"]
    hidden, inter, patch = vision["hidden_size"], vision["intermediate_size"], tuple(vision["patch_size"])
    patches = math.prod(side // step for side, step in zip(vision["image_size"], patch, strict=True))
    norm_bias = vision["norm_type"] == "layer_norm"
    embeddings = "vision_tower.embeddings"
    tensors: Shapes = {
        f"{embeddings}.cls_token": (dtype, (1, 1, hidden)),
        f"{embeddings}.patch_embeddings.projection.weight": (dtype, (hidden, vision["num_channels"], *patch)),
        f"{embeddings}.patch_embeddings.projection.bias": (dtype, (hidden,)),
        f"{embeddings}.position_embeddings": (dtype, (1, patches + 1, hidden)),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_tower.encoder.layer.{i}"
        tensors |= {f"{layer}.lambda_1": (dtype, (hidden,)), f"{layer}.lambda_2": (dtype, (hidden,))}
        for part in "qkv":
            tensors |= _linear(f"{layer}.attention.{part}_proj", hidden, hidden, dtype, bias=vision["attention_bias"])
        if vision["use_qk_norm"]:
            tensors |= _norm(f"{layer}.attention.q_norm", hidden, dtype) | _norm(f"{layer}.attention.k_norm", hidden, dtype)
        tensors |= _linear(f"{layer}.attention.projection_layer", hidden, hidden, dtype, bias=True)
        tensors |= _norm(f"{layer}.layernorm_before", hidden, dtype, bias=norm_bias)
        tensors |= _norm(f"{layer}.layernorm_after", hidden, dtype, bias=norm_bias)
        tensors |= _linear(f"{layer}.mlp.fc1", inter, hidden, dtype, bias=True)
        tensors |= _linear(f"{layer}.mlp.fc2", hidden, inter, dtype, bias=True)
    merged = round(hidden / config["downsample_ratio"] ** 2)
    tensors |= _norm("multi_modal_projector.layer_norm", merged, dtype, bias=True)
    tensors |= _linear("multi_modal_projector.linear_1", text["hidden_size"], merged, dtype, bias=True)
    tensors |= _linear("multi_modal_projector.linear_2", text["hidden_size"], text["hidden_size"], dtype, bias=True)
    return tensors | llama_shapes(text | {"torch_dtype": dtype}, prefix="language_model.", qkv_bias=True)


def deepseek_shapes(config: Config) -> Shapes:
    """DeepSeek-V3: latent attention, experts, matrices in fp8 with a scale for each block, and the layer that predicts one token more."""
    dtype, hidden, heads, vocab = config["torch_dtype"], config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, v_head, layers = config["qk_nope_head_dim"], config["v_head_dim"], config["num_hidden_layers"]
    rows, columns = config["quantization_config"]["weight_block_size"]

    def quantized(name: str, out: int, inner: int) -> Shapes:
        scales = (math.ceil(out / rows), math.ceil(inner / columns))
        return {f"{name}.weight": ("float8_e4m3fn", (out, inner)), f"{name}.weight_scale_inv": ("float32", scales)}

    def mlp(name: str, inter: int) -> Shapes:
        gate, up = quantized(f"{name}.gate_proj", inter, hidden), quantized(f"{name}.up_proj", inter, hidden)
        return gate | up | quantized(f"{name}.down_proj", hidden, inter)

    tensors: Shapes = {"model.embed_tokens.weight": (dtype, (vocab, hidden))}
    for i in range(layers + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{i}"
        if i >= layers:
            tensors |= _linear(f"{layer}.embed_tokens", vocab, hidden, dtype)
            tensors |= _norm(f"{layer}.enorm", hidden, dtype) | _norm(f"{layer}.hnorm", hidden, dtype)
            tensors |= _linear(f"{layer}.eh_proj", hidden, 2 * hidden, dtype)
        attention = f"{layer}.self_attn"
        tensors |= quantized(f"{attention}.q_a_proj", q_rank, hidden) | _norm(f"{attention}.q_a_layernorm", q_rank, dtype)
        tensors |= quantized(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
        tensors |= quantized(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        tensors |= _norm(f"{attention}.kv_a_layernorm", kv_rank, dtype)
        tensors |= quantized(f"{attention}.kv_b_proj", heads * (nope + v_head), kv_rank)
        tensors |= quantized(f"{attention}.o_proj", hidden, heads * v_head)
        if i < config["first_k_dense_replace"]:
            tensors |= mlp(f"{layer}.mlp", config["intermediate_size"])
        else:
            experts, inter = config["n_routed_experts"], config["moe_intermediate_size"]
            tensors |= _linear(f"{layer}.mlp.gate", experts, hidden, dtype)
            tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = ("float32", (experts,))
            for expert in range(experts):
                tensors |= mlp(f"{layer}.mlp.experts.{expert}", inter)
            tensors |= mlp(f"{layer}.mlp.shared_experts", inter * config["n_shared_experts"])
        tensors |= _norm(f"{layer}.input_layernorm", hidden, dtype) | _norm(f"{layer}.post_attention_layernorm", hidden, dtype)
        if i >= layers:
            tensors |= _norm(f"{layer}.shared_head.norm", hidden, dtype) | _linear(f"{layer}.shared_head.head", vocab, hidden, dtype)
    return tensors | _norm("model.norm", hidden, dtype) | _linear("lm_head", vocab, hidden, dtype)


# ---------------------------------------------------------------------------------------------------------------------------------
# The models: config.json as published


def _llama(**sizes: Any) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    } | sizes


def _packed(format: str, **weights: Any) -> Config:  # noqa: A002
    """What compressed-tensors says of linear weights of 4 bits."""
    weights = {"num_bits": 4, "dynamic": False, "symmetric": True, "strategy": "group", **weights}
    group = {"format": format, "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.20.0",
    }


_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_LLAMA_7B = _llama(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, vocab_size=32000
)


def _internvl(vision: Config, text: Config) -> Config:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151674,
        }
        | text,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "image_size": [448, 448],
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-06,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "num_channels": 3,
            "patch_size": [14, 14],
            "projection_dropout": 0.0,
            "torch_dtype": "bfloat16",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
        }
        | vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


@dataclass(frozen=True)
class Model:
    """A known model: its config, what tensors that gives, and the size at which its publisher cut the files."""

    config: Config
    shapes: Callable[[Config], Shapes]
    max_shard_size: str = "5GB"


MODELS = {
    "minilm": Model(
        {
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 384,
            "initializer_range": 0.02,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": 12,
            "num_hidden_layers": 6,
            "pad_token_id": 0,
            "position_embedding_type": "absolute",
            "torch_dtype": "float32",
            "type_vocab_size": 2,
            "use_cache": True,
            "vocab_size": 30522,
        },
        bert_shapes,
    ),
    "llama-3-8b": Model(_llama(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32), llama_shapes),
    "llama-2-7b": Model(_LLAMA_7B, llama_shapes),
    "llama-2-7b-fp8": Model(_LLAMA_7B | {"quantization_config": _FP8}, quantized_llama_shapes),
    "llama-2-7b-int4": Model(
        _LLAMA_7B | {"quantization_config": _packed("pack-quantized", group_size=128, type="int")}, quantized_llama_shapes
    ),
    "llama-2-7b-mxfp4": Model(
        _LLAMA_7B
        | {"quantization_config": _packed("mxfp4-pack-quantized", group_size=32, type="float", scale_dtype="torch.uint8", zp_dtype=None)},
        quantized_llama_shapes,
    ),
    "llama-3-70b": Model(_llama(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80), llama_shapes),
    "mixtral-8x7b": Model(
        {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 32000,
        },
        llama_shapes,
    ),
    "internvl3-78b": Model(
        _internvl(
            {
                "attention_bias": False,
                "hidden_size": 3200,
                "intermediate_size": 12800,
                "norm_type": "rms_norm",
                "num_attention_heads": 25,
                "num_hidden_layers": 45,
                "use_qk_norm": True,
            },
            {
                "hidden_size": 8192,
                "intermediate_size": 29568,
                "max_window_layers": 70,
                "num_attention_heads": 64,
                "num_hidden_layers": 80,
                "num_key_value_heads": 8,
            },
        ),
        internvl_shapes,
    ),
    "internvl3-8b": Model(
        _internvl(
            {
                "attention_bias": True,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "norm_type": "layer_norm",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "use_qk_norm": False,
            },
            {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "max_window_layers": 28,
                "num_attention_heads": 28,
                "num_hidden_layers": 28,
                "num_key_value_heads": 4,
            },
        ),
        internvl_shapes,
    ),
    "deepseek-v3": Model(
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "hidden_act": "silu",
            "hidden_size": 7168,
            "initializer_range": 0.02,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": _FP8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        deepseek_shapes,
        "4.26GB",
    ),
}


def with_layers(config: Config, layers: int) -> Config:
    """The same model with another number of layers.

    A vision tower has at most that many too. A DeepSeek without a layer of experts does without its prediction layer, which has them.
    """
    config = copy.deepcopy(config)
    config.get("text_config", config)["num_hidden_layers"] = layers
    if "vision_config" in config:
        config["vision_config"]["num_hidden_layers"] = min(layers, config["vision_config"]["num_hidden_layers"])
    if "first_k_dense_replace" in config and layers <= config["first_k_dense_replace"]:
        config["num_nextn_predict_layers"] = 0
    return config


def with_dtype(config: Config, dtype: str) -> Config:
    """The same model in another element type; quantized matrices and their scales stay what they are."""
    config = copy.deepcopy(config)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part["torch_dtype"] = dtype
    return config


def total_size(shapes: Shapes) -> int:
    """Bytes of all tensors."""
    return sum(nbytes(*spec) for spec in shapes.values())


def with_size(model: Model, config: Config, size: int) -> Config:
    """The same model with the number of layers, one at least, that brings its size nearest to ``size``."""

    @functools.cache
    def total(layers: int) -> int:
        return total_size(model.shapes(with_layers(config, layers)))

    above = 1
    while total(above) < size:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if total(middle) < size else (below, middle)
    nearest = below if below and size - total(below) < total(above) - size else above
    return with_layers(config, nearest)


# ---------------------------------------------------------------------------------------------------------------------------------
# The files


@dataclass(frozen=True)
class Placed:
    """A tensor in a file: ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    offset: int
    nbytes: int


def split(shapes: Shapes, max_shard_size: int) -> list[Shapes]:
    """The tensors of each file, in order; a file exceeds ``max_shard_size`` only if it is a single tensor."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, spec in shapes.items():
        size = nbytes(*spec)
        if shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += size
    return shards


def layout(shapes: Shapes) -> tuple[bytes, list[Placed]]:
    """The file's first bytes, up to its data, and where each tensor is: what the safetensors library would write."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets = []
    end = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (-_RANK[item[1][0]], item[0])):
        start, end = end, end + nbytes(dtype, shape)
        entries[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [start, end]}
        offsets.append((name, dtype, start, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [Placed(name, dtype, data + start, end - start) for name, dtype, start, end in offsets]


def stamp(name: str) -> bytes:
    """The eight bytes that begin and end the sparse tensor of this name, if it has at least sixteen."""
    return hashlib.blake2b(name.encode(), digest_size=_STAMP).digest()


def _stamps(tensors: Iterable[Placed]) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every write; the end of one tensor and the start of the next are one."""
    pending, start = b"", 0
    for tensor in tensors:
        if tensor.nbytes < 2 * _STAMP:
            continue
        for offset in (tensor.offset, tensor.offset + tensor.nbytes - _STAMP):
            if pending and offset != start + len(pending):
                yield start, pending
                pending = b""
            start = start if pending else offset
            pending += stamp(tensor.name)
    if pending:
        yield start, pending


@functools.cache
def _block(dtype: str, seed: int, *, positive: bool) -> memoryview | bytes:
    """Random elements, all finite, to cut tensors from."""
    import numpy as np

    generator = np.random.default_rng([seed, _RANK[dtype], positive])
    if dtype in {"uint8", "int32"}:  # codes, which may be all, or exponents around that of 1
        return generator.integers(110, 130, _BLOCK, dtype=np.uint8).data if positive else generator.bytes(_BLOCK)
    if dtype == "float8_e4m3fn":  # without its bit of highest weight a magnitude is below 2, and never NaN
        return (generator.integers(0, 256, _BLOCK, dtype=np.uint8) & np.uint8(0xBF)).data
    block = np.empty(_BLOCK // DTYPES[dtype][1], dtype={"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype])
    for part in np.split(block, 8):
        normal = generator.standard_normal(part.size, dtype=np.float32) * np.float32(0.02)
        if positive:
            normal = np.abs(normal) + np.float32(1e-4)
        part[:] = normal.view(np.uint32) >> 16 if dtype == "bfloat16" else normal
    return block.view(np.uint8).data


def _write_random(file: BinaryIO, tensor: Placed, seed: int, shapes: Shapes) -> None:
    """Fills a tensor with pieces cut out of the block at places drawn from its name: no two tensors are alike, none is periodic."""
    if tensor.dtype == "int64":
        numbers: Iterable[int] = range(tensor.nbytes // 8)
        if tensor.name.endswith(".weight_shape"):
            rows, words = shapes[tensor.name.replace("_shape", "_packed")][1]
            numbers = rows, words * 8
        file.write(b"".join(struct.pack("<q", number) for number in numbers))
        return
    places = random.Random(f"{seed} {tensor.name}")
    itemsize = DTYPES[tensor.dtype][1]
    block = _block(tensor.dtype, seed, positive=tensor.name.endswith(("_scale_inv", "_scale")))
    left = tensor.nbytes
    while left:
        start = places.randrange((_BLOCK - _CHUNK) // itemsize) * itemsize
        left -= file.write(block[start : start + min(left, _CHUNK)])


def write_shard(path: Path, shapes: Shapes, *, sparse: bool = False, seed: int = 0, every: Shapes | None = None) -> None:
    """Writes one safetensors file; ``every`` are the tensors of all files, where some of these tell the shapes of others."""
    head, tensors = layout(shapes)
    with path.open("xb", buffering=0) as raw:
        file: Any = raw
        if sparse:
            file.truncate(tensors[-1].offset + tensors[-1].nbytes if tensors else len(head))
        view = memoryview(head)
        while view:
            view = view[file.write(view) :]
        if sparse:
            for offset, data in _stamps(tensors):
                os.pwrite(file.fileno(), data, offset)
        else:
            for tensor in tensors:
                _write_random(file, tensor, seed, every or shapes)


def make_checkpoint(
    model: str | Model,
    directory: str | Path,
    *,
    layers: int | None = None,
    size: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    sparse: bool = False,
    seed: int = 0,
    one_tensor: int | None = None,
) -> list[Path]:
    """Writes a checkpoint of ``model`` (or a key of MODELS) to a directory that is new or empty; returns its safetensors files.

    Args:
        model: whose names, shapes and config to take.
        directory: where to.
        layers: how many layers, if not as many as the model has.
        size: or: about how many bytes; the number of layers follows.
        dtype: the element type, if not the model's own.
        max_shard_size: bytes of a file, if not as its publisher cut them.
        sparse: holes and stamps (see ``check_stamps``) instead of random numbers.
        seed: other random numbers.
        one_tensor: adds a matrix ``extra.weight`` of about this many bytes.

    Raises:
        FileExistsError: the directory has something in it.
    """
    known = MODELS[model] if isinstance(model, str) else model
    config = with_dtype(known.config, dtype) if dtype else known.config
    if layers is not None:
        config = with_layers(config, layers)
    elif size is not None:
        config = with_size(known, config, size)
    shapes = known.shapes(config)
    if one_tensor is not None:
        elements = one_tensor // DTYPES[config["torch_dtype"]][1]
        columns = min(4096, max(1, math.isqrt(elements)))
        shapes["extra.weight"] = (config["torch_dtype"], (max(1, elements // columns), columns))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    shards = split(shapes, max_shard_size or parse_size(known.max_shard_size))
    paths = [directory / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_shard(path, shard, sparse=sparse, seed=seed, every=shapes)
    places = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total_size(shapes)}, "weight_map": dict(sorted(places.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return paths


# ---------------------------------------------------------------------------------------------------------------------------------
# The check


def _ends(path: Path) -> Iterator[tuple[str, tuple[bytes, bytes] | None]]:
    """Each tensor of a file and its first and last bytes, if it is long enough to be stamped."""
    with path.open("rb", buffering=0) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(os.pread(file.fileno(), length, 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if end - start >= 2 * _STAMP:
                data = 8 + length
                yield name, (os.pread(file.fileno(), _STAMP, data + start), os.pread(file.fileno(), _STAMP, data + end - _STAMP))
            else:
                yield name, None


def check_stamps(where: str | Path | Iterable[str | Path], *, source_name: Callable[[str], str] = str) -> list[str]:
    """The names, sorted, of the tensors that do not begin and end with the stamps of a sparse checkpoint.

    Args:
        where: a directory, whose ``*.safetensors`` and index are looked at, or files.
        source_name: gives the name that a tensor of ``where`` had when it was stamped, where a conversion renamed it.

    Returns:
        Wrong names, and those that an index promises and no file has. Tensors under 16 bytes carry no stamp and are never wrong.

    Raises:
        FileNotFoundError: there is no safetensors file.
    """
    promised: set[str] = set()
    if isinstance(where, str | Path) and Path(where).is_dir():
        for index in Path(where).glob("*.safetensors.index.json"):
            promised |= json.loads(index.read_text(encoding="utf-8"))["weight_map"].keys()
        files = sorted(Path(where).glob("*.safetensors"))
    else:
        files = [Path(where)] if isinstance(where, str | Path) else [Path(file) for file in where]
    if not files:
        raise FileNotFoundError(f"no safetensors files in {where}")
    seen: set[str] = set()
    wrong: set[str] = set()
    for file in files:
        for name, ends in _ends(file):
            seen.add(name)
            if ends is not None and ends != (stamp(source_name(name)),) * 2:
                wrong.add(name)
    return sorted(wrong | (promised - seen))


# ---------------------------------------------------------------------------------------------------------------------------------
# The command


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a number of layers: {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.make_checkpoint", description="Make a checkpoint of a known model's shapes.")
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="new or empty")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--layers", type=_positive, metavar="N", help="this many layers instead of the model's")
    amount.add_argument("--size", type=_size, help="as many layers as bring the total near this size, such as 8GB")
    parser.add_argument("--dtype", choices=FLOATS, help="element type (default: the model's)")
    parser.add_argument("--max-shard-size", type=_size, metavar="SIZE", help="of a file (default: 5GB; deepseek-v3: as published)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="holes with a stamp at both ends of each tensor instead of numbers")
    parser.add_argument("--one-tensor", type=_size, metavar="SIZE", help="add a matrix extra.weight of this size")
    parser.add_argument("--check", type=Path, metavar="DIR", help="look whether the stamps in DIR are right, make nothing")
    return parser


def _check(directory: Path) -> int:
    wrong = check_stamps(directory)
    for name in wrong:
        print(name)
    print(f"{len(wrong)} wrong" if wrong else "all stamps are right", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 1 means that stamps are wrong, 2 that nothing could be done."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check is None and options.directory is None:
        parser.error("MODEL and DIR are needed, or --check DIR")
    if options.check is not None and options.model is not None:
        parser.error("--check makes no checkpoint: leave out MODEL")
    try:
        if options.check is not None:
            return _check(options.check)
        paths = make_checkpoint(
            options.model,
            options.directory,
            layers=options.layers,
            size=options.size,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            sparse=options.sparse,
            seed=options.seed,
            one_tensor=options.one_tensor,
        )
    except (OSError, ValueError, struct.error) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    total = sum(path.stat().st_size for path in paths)
    disk = sum(path.stat().st_blocks * 512 for path in paths)
    print(f"{len(paths)} files, {format_size(total)}, {format_size(disk)} on disk in {options.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
