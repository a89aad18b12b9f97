"""DeepSeek-V3: the layout on the Hub and that of DeepSeek's own inference code, one file for each rank.

Facts: deepseek-ai/DeepSeek-V3 at 9b4e978, ``inference/convert.py``.
"""

from __future__ import annotations

from streamconv.library.parallel import RANKS, TensorParallel
from streamconv.recipe import Drop, Option, Recipe, Rule, from_config, sparse

LAYER, OWN = "model.layers.{i}", "layers.{i}"
_STORED = ("{weight,weight_scale_inv}", "{weight,scale}")
_ATTENTION = ("{q_proj,q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}", "{wq,wq_a,wq_b,wkv_a,wkv_b,wo}")
_MLP = ("{gate_proj,down_proj,up_proj}", "{w1,w2,w3}")


def _matrices(where: str, own: str, names: tuple[str, str]) -> Rule:
    """Matrices of a layer, in fp8 with scales or not."""
    return Rule(f"{LAYER}.{where}.{names[0]}.{_STORED[0]}", f"{OWN}.{own}.{names[1]}.{_STORED[1]}", optional=True)


_WIDE = ("w1", "w3")
PLAN = {
    "embed": "colwise",
    "head": "colwise",
    **{f"layers.*.attn.{name}": "colwise" for name in ("wq", "wq_b", "wkv_b")},
    "layers.*.attn.wo": "rowwise",
    **{f"layers.*.ffn.{name}": "colwise" for name in _WIDE},
    **{f"layers.*.ffn.shared_experts.{name}": "colwise" for name in _WIDE},
    **{f"layers.*.ffn.{part}w2": "rowwise" for part in ("", "shared_experts.")},
    **{f"layers.*.ffn.experts.*.{name}": "grouped_gemm" for name in (*_WIDE, "w2")},
}
"""How ``convert.py`` divides tensors: the second values of its ``mapping``, and each expert to one rank."""

_LAYERS = from_config(n_layers="num_hidden_layers")
TO_RANKS = Recipe(
    name="deepseek3-hf2mp",
    summary="DeepSeek-V3 or R1, in fp8 or not, to the files that DeepSeek's own inference code reads, one for each rank",
    rules=sparse(
        Drop(f"{LAYER}.{{rest*}}", "the layer that predicts one token more is not used by that code", where="i >= n_layers"),
        Rule("model.embed_tokens.weight", "embed.weight"),
        Rule("model.norm.weight", "norm.weight"),
        Rule("lm_head.weight", "head.weight"),
        Rule(f"{LAYER}.{{input_layernorm,post_attention_layernorm}}.weight", f"{OWN}.{{attn_norm,ffn_norm}}.weight"),
        Rule(f"{LAYER}.self_attn.{{q_a_layernorm,kv_a_layernorm}}.weight", f"{OWN}.attn.{{q_norm,kv_norm}}.weight"),
        Rule(f"{LAYER}.mlp.gate.{{weight,e_score_correction_bias}}", f"{OWN}.ffn.gate.{{weight,bias}}"),
        _matrices("self_attn", "attn", _ATTENTION),
        _matrices("mlp", "ffn", _MLP),
        _matrices("mlp.shared_experts", "ffn.shared_experts", _MLP),
        _matrices("mlp.experts.{e}", "ffn.experts.{e}", _MLP),
    ),
    options={**_LAYERS, **from_config(n_experts="n_routed_experts")},
    reference="deepseek-ai/DeepSeek-V3 at 9b4e978, inference/convert.py",
    then=TensorParallel(
        options={"model_parallel": Option("how many ranks", 8)},
        right=RANKS,
        own=PLAN,
        number="model_parallel",
        even=True,
    ),
)
RECIPES = (TO_RANKS, TO_RANKS.inverse("deepseek3-mp2hf", "the files of DeepSeek's own inference code for DeepSeek-V3 to Hugging Face"))
