"""Gemma: the original PyTorch checkpoint <-> Hugging Face.

Facts: ``models/gemma/convert_gemma_weights_to_hf.py`` of transformers 4.57 (a59124e). It splits the fused q, k, v by head counts
that the user names, and only where there is one kv head or as many as heads; the output projection's width says the same of any.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Drop, Model, Option, Recipe, Rule, Side, Tie

_LAYER = "model.layers.{i}"
_SAME = "{self_attn.o_proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj,input_layernorm,post_attention_layernorm}"
_Q = "(shape('model.layers.0.self_attn.o_proj.weight')[1])"
_QKV = "(shape('model.layers.0.self_attn.qkv_proj.weight')[0])"


def _size_option(key: str, otherwise: str, meaning: str) -> Option:
    """A whole number of config.json, here or in the target's folder, or one that the tensors give."""
    return Option(f"{meaning}: {key} of config.json", default=f"{{config.{key} or sidecar.{key} or {otherwise}}}", kind="int")


_DEFAULTS = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None,
    "initializer_range": 0.02, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "use_cache": True,
}  # fmt: skip
_TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def hf_files(model: Model) -> dict[str, Any]:
    """config.json and generation_config.json, unless the target's folder has them."""
    heads = {key: model.options[key] for key in ("head_dim", "num_attention_heads", "num_key_value_heads")}
    if model.sidecar:
        return {}
    unknown = [key for key, value in heads.items() if value is None]
    if unknown:
        model.notes.append(f"config.json is not written: no value for {', '.join(unknown)}: give --set {unknown[0]}=N")
        return {}
    vocabulary, hidden = model.targets["model.embed_tokens.weight"].shape
    config = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **{key: model.config.get(key, value) for key, value in (_DEFAULTS | _TOKENS).items()},
        **heads,
        "hidden_size": hidden,
        "intermediate_size": model.targets["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith(".input_layernorm.weight") for name in model.targets),
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "dtype": model.dtype,
    }
    generation = {"_from_model_config": True, **{key: config[key] for key in _TOKENS}}
    return {"config.json": config, "generation_config.json": model.read("generation_config.json") or generation}


_GEMMA = Recipe(
    name="gemma-original2hf",
    summary="Gemma: original PyTorch checkpoint to Hugging Face, q, k, v split, the head tied to the embedding",
    rules=(
        Rule("embedder.weight", "model.embed_tokens.weight"),
        Tie("embedder.weight", "lm_head.weight", "model.embed_tokens.weight", when="has('model.embed_tokens.weight')"),
        Rule(
            f"{_LAYER}.self_attn.qkv_proj.weight",
            f"{_LAYER}.self_attn.{{q,k,v}}_proj.weight",
            "(q + kv + kv) c -> q c, kv c, kv c",
            dims={"q": _Q},
        ),
        Rule(f"{_LAYER}.{_SAME}.weight", f"{_LAYER}.{_SAME}.weight"),
        Rule("model.norm.weight", "model.norm.weight"),
        Drop("freqs_cis", "the rotary table: the model's own code computes it, and loads a checkpoint without it"),
    ),
    options={
        # 256 is what both sizes have that were published; the script has them built in.
        "head_dim": _size_option("head_dim", "(256 if shape('embedder.weight')[1] in [2048, 3072] else None)", "width of a head"),
        "num_attention_heads": _size_option("num_attention_heads", f"{_Q} // head_dim", "heads"),
        "num_key_value_heads": _size_option("num_key_value_heads", f"({_QKV} - {_Q}) // (2 * head_dim)", "heads of k and v"),
    },
    left=Side(format="torch", files=("{name*}.ckpt",), root="model_state_dict", stem="gemma.pth"),
    right=Side(writes=hf_files, expects=("tokenizer.model",)),
    reference="transformers 4.57 (a59124e) convert_gemma_weights_to_hf.py",
)

RECIPES = (
    _GEMMA,
    _GEMMA.inverse("gemma-hf2original", "Gemma: Hugging Face to the original PyTorch checkpoint, q, k, v fused"),
)
