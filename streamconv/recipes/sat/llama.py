"""Llama and Mixtral: Hugging Face layout <-> SwissArmyTransformer.

Facts: ``examples/llama/transform_param.py`` and ``examples/mixtral-8x7b/transform_param.py``. No script goes back; these are the inverses.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Drop, Model, Option, Rule, Tie, from_config
from streamconv.recipes.sat.partition import COMPUTED, TEXT_KEYS, Config, inv_freq, pair

_HF, _SAT = "model.layers.{i}", "transformer.layers.{i}"
_NORMS = "{input,post_attention}_layernorm.weight"
DECODER = (
    Rule("model.embed_tokens.weight", "transformer.word_embeddings.weight"),
    Rule("model.norm.weight", "transformer.final_layernorm.weight"),
    Rule(f"{_HF}.{_NORMS}", f"{_SAT}.{_NORMS}"),
)
"""The embedding and the norms."""
HEAD = (
    Rule("lm_head.weight", "mixins.lm.lm_head.weight", optional="tie_word_embeddings"),
    Tie("model.embed_tokens.weight", "mixins.lm.lm_head.weight", "transformer.word_embeddings.weight", when="tie_word_embeddings"),
)
"""The head, which SAT always stores."""
_ATTENTION = (
    Rule(
        f"{_HF}.self_attn.{{q,k,v}}_proj.weight",
        f"{_SAT}.attention.query_key_value.weight",
        "q c, k c, v c -> (q + k + v) c",
        dims={"q": "heads * head_size", "k": "kv_heads * head_size"},
    ),
    Rule(f"{_HF}.self_attn.o_proj.weight", f"{_SAT}.attention.dense.weight"),
)
INV_FREQ = Drop(f"{_HF}.self_attn.rotary_emb.inv_freq", COMPUTED)

TIED = {
    "tie_word_embeddings": Option(
        "whether the Hugging Face side stores the embedding for the head too",
        default="{(config.tie_word_embeddings or sidecar.tie_word_embeddings) == True}",
        kind="bool",
    )
}
_HEADS = {
    **from_config(heads="num_attention_heads", hidden_size="hidden_size"),
    "kv_heads": Option(
        "heads of keys and values",
        default="{config.num_key_value_heads or config.num_multi_query_heads or sidecar.num_key_value_heads or heads}",
        kind="int",
    ),
    "head_size": Option(
        "size of a head", default="{config.head_dim or config.hidden_size_per_attention_head or hidden_size / heads}", kind="int"
    ),
}


_THETA = "(config.rope_theta or config.rope_parameters.rope_theta)"
_SCALING = "(config.rope_scaling or config.rope_parameters)"
PLAIN_ROTARY = {
    f"{_SCALING}.rope_type in (None, 'default') and {_SCALING}.type in (None, 'default')": (
        "config.json scales the rotary embedding, which SAT's model does not: there is no such SAT model"
    ),
    "head_size * heads == hidden_size": "heads of {head_size} are not hidden_size / {heads}, which SAT's rotary embedding has",
}
BASE = {f"{_THETA} in (None, 10000)": "SAT's model has a rotary embedding of base 10000, config.json another rope_theta"}

_KEYS = {
    **TEXT_KEYS,
    "layernorm_epsilon": "rms_norm_eps",
    "num_multi_query_heads": "num_key_value_heads",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_FIXED = {"layernorm_order": "pre", "use_bias": False}
# Older models have both as mixins.
_LEGACY = {
    "is_gated_mlp": Option(
        "whether SAT's layers are gated themselves, not by a mixin, as older ones are",
        default="{not has('{rank*}/mixins.mlp.gate_proj.0.weight')}",
        kind="bool",
    ),
    "is_rotary_emb": Option(
        "whether SAT's model has a rotary embedding itself, not in a mixin, as older ones have",
        default="{not has('{rank*}/mixins.rotary.rotary_emb.inv_freq')}",
        kind="bool",
    ),
}
_LLAMA = Config(
    "LLaMAModel",
    {**_KEYS, "pad_token_id": "pad_token_id"},
    {**_FIXED, "pad_token_id": 0},
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False},
)


def llama_sat(model: Model) -> dict[str, Any]:
    """model_config.json, which says what the model has itself."""
    files = _LLAMA.to_sat(model)
    if files and not model.sidecar:
        files["model_config.json"] |= {key: True for key in _LEGACY if model.options[key]}
    return files


_MIXTRAL = Config(
    "MixtralModel",
    {**_KEYS, "num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
    {**_FIXED, "is_gated_mlp": True},
    {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
)

RECIPES = (
    *pair(
        "llama",
        "Llama, with or without grouped queries",
        (
            *DECODER,
            *HEAD,
            *_ATTENTION,
            Rule(f"{_HF}.mlp.{{up,down}}_proj.weight", f"{_SAT}.mlp.{{dense_h_to_4h,dense_4h_to_h}}.weight"),
            Rule(f"{_HF}.mlp.gate_proj.weight", f"{_SAT}.mlp.dense_h_to_4h_gate.weight", when="is_gated_mlp"),
            Rule(f"{_HF}.mlp.gate_proj.weight", "mixins.mlp.gate_proj.{i}.weight", when="not is_gated_mlp"),
            INV_FREQ,
            inv_freq("transformer.position_embeddings.inv_freq", "head_size", when="is_rotary_emb"),
            inv_freq("mixins.rotary.rotary_emb.inv_freq", "head_size", when="not is_rotary_emb"),
        ),
        options={**_HEADS, **TIED, **_LEGACY},
        requires={**PLAIN_ROTARY, **BASE},
        writes=(llama_sat, _LLAMA.to_hf),
        reference="examples/llama/transform_param.py",
    ),
    *pair(
        "mixtral-8x7b",
        "Mixtral of experts",
        (
            *DECODER,
            *HEAD,
            *_ATTENTION,
            Rule(
                f"{_HF}.block_sparse_moe.experts.{{e}}.{{w1,w2,w3}}.weight",
                f"{_SAT}.mlp.{{dense_h_to_4h_gate,dense_4h_to_h,dense_h_to_4h}}{{e?_}}.weight",
            ),
            Rule(f"{_HF}.block_sparse_moe.gate.weight", "mixins.mlp.gates.{i}.weight"),
            INV_FREQ,
            inv_freq("mixins.rotary.rotary_emb.inv_freq", "head_size", 1000000),
        ),
        options={**_HEADS, **TIED},
        requires={
            **PLAIN_ROTARY,
            f"{_THETA} in (None, 1000000)": "SAT's model has a rotary embedding of base 1000000, config.json another rope_theta",
        },
        writes=(_MIXTRAL.to_sat, _MIXTRAL.to_hf),
        reference="examples/mixtral-8x7b/transform_param.py",
    ),
)
