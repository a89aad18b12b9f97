"""DeepSeek-V3 and R1 in MindSpore Transformers: the parts of multi-head latent attention apart, experts stacked, float8 weights read.

Facts: mindformers dev (fd4deeb), ``research/deepseek3/convert_weight.py`` and ``convert_reversed.py``, whose options default to the 671B
model's sizes; here they come from config and tensors. Rotary rows are even positions first on MindSpore's side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.recipe import Drop, Make, Model, Option, Recipe, Rule, Side, from_config
from streamconv.recipes.mindspore.mindformers import TRAINING, as_many, both_ways

_LAYER = "model.layers.{i}"
_PREDICTED = "model.layers.{i+depth}"  # a layer for multi-token prediction, which are numbered after the others
_ATTENTION, _OWN_ATTENTION = f"{_LAYER}.self_attn", f"{_LAYER}.attention"
_MLP, _OWN_MLP = f"{_LAYER}.mlp", f"{_LAYER}.feed_forward"
_EXPERTS, _OWN_EXPERTS = f"{_MLP}.experts.{{e}}", f"{_OWN_MLP}.routed_experts"

_EMBEDDING, _HEAD = "model.tok_embeddings.embedding_weight", "lm_head.weight"
_ALL = f"(count('{_LAYER}.input_layernorm.weight') + count('{_LAYER}.attention_norm.weight'))"
_PREDICTING = f"(count('{_LAYER}.enorm.weight') + count('model.mtp_norms.{{i}}.weight'))"
_DEPTH = f"min(num_layers, {_ALL} - {_PREDICTING})"
_TAKEN = f"({_DEPTH} + num_nextn_predict_layers)"
_GROUPED = "use_grouped_gemm"


def _norm(left: str, right: str, **more: Any) -> Rule:
    """What stays float32 in MindSpore's model."""
    return Rule(left, right, cast="float32", firm=True, **more)


_MLA = (
    Rule(f"{_ATTENTION}.{{q_a_proj,o_proj}}.weight", f"{_OWN_ATTENTION}.{{q2l_proj,wo}}.weight"),
    _norm(f"{_ATTENTION}.{{q_a,kv_a}}_layernorm.weight", f"{_OWN_ATTENTION}.{{lq,lkv}}_norm.weight"),
    Rule(
        f"{_ATTENTION}.q_b_proj.weight",
        f"{_OWN_ATTENTION}.{{l2q_nope_proj,l2q_pe_proj}}.weight",
        "(h (a + r two)) c -> (h a) c, (h two r) c",
    ),
    Rule(
        f"{_ATTENTION}.kv_a_proj_with_mqa.weight",
        f"{_OWN_ATTENTION}.{{kv2l_latent_kv,kv2l_k_pe}}.weight",
        "(l + r two) c -> l c, (two r) c",
    ),
    Rule(
        f"{_ATTENTION}.kv_b_proj.weight",
        f"{_OWN_ATTENTION}.{{lkv2kv_k_nope,lkv2kv_v}}.weight",
        "(h (a + v)) c -> (h a) c, (h v) c",
    ),
    _norm(f"{_LAYER}.{{input,post_attention}}_layernorm.weight", f"{_LAYER}.{{attention,ffn}}_norm.weight"),
)


def _router(own: str, weight: str, bias: str, when: str, *, firm: bool) -> tuple[Rule, ...]:
    """The router, whose matrix stays float32 where it is ``firm``."""
    cast = "float32" if firm else None
    return (
        Rule(f"{_MLP}.gate.weight", f"{own}.{weight}", "e c -> e c", when=when, optional=True, sparse=True, cast=cast, firm=firm),
        _norm(f"{_MLP}.gate.e_score_correction_bias", f"{own}.{bias}", layout="e -> e", when=when, optional=True, sparse=True),
    )


_MOE = (
    Rule("model.layers.{d}.mlp.{gate,down,up}_proj.weight", "model.layers.{d}.feed_forward.w{1,2,3}.weight", optional=True),
    Rule(f"{_MLP}.shared_experts.{{gate,down,up}}_proj.weight", f"{_OWN_MLP}.shared_experts.w{{1,2,3}}.weight", optional=True, sparse=True),
    *_router(_OWN_EXPERTS, "router_dense.weight", "topk_bias", _GROUPED, firm=False),
    *_router(f"{_OWN_EXPERTS}.router", "dense.weight", "router.topk_bias", f"not {_GROUPED}", firm=True),
    Rule(
        f"{_EXPERTS}.{{gate,up}}_proj.weight",
        f"{_OWN_EXPERTS}.ffn.w1",
        "e f c, e f c -> e c (f + f)",
        when=_GROUPED,
        optional=True,
        sparse=True,
    ),
    Rule(f"{_EXPERTS}.down_proj.weight", f"{_OWN_EXPERTS}.ffn.w2", "e c f -> e f c", when=_GROUPED, optional=True, sparse=True),
    Rule(
        f"{_EXPERTS}.{{gate,down,up}}_proj.weight",
        f"{_OWN_EXPERTS}.ffn.w{{1,2,3}}.weight",
        "e f c -> e f c",
        when=f"not {_GROUPED}",
        optional=True,
        sparse=True,
    ),
)


def _copy(name: str, own: str) -> Drop:
    """A tensor that the layers for multi-token prediction repeat."""
    return Drop(
        f"{_PREDICTED}.{name}",
        f"MindSpore's model has {own} for it",
        when="num_nextn_predict_layers",
        op={"op": "same", "tensor": f"'{own}'"},
        dims={"i": "num_nextn_predict_layers"},
    )


_MTP = (
    _norm(f"{_PREDICTED}.{{enorm,hnorm}}.weight", "model.mtp_hidden_fusers.{i}.{norm_emb,norm}.weight", optional=True, sparse=True),
    Rule(f"{_PREDICTED}.eh_proj.weight", "model.mtp_hidden_fusers.{i}.dense.weight", optional=True, sparse=True),
    _norm(f"{_PREDICTED}.shared_head.norm.weight", "model.mtp_norms.{i}.weight", optional=True, sparse=True),
    _copy("embed_tokens.weight", _EMBEDDING),
    _copy("shared_head.head.weight", _HEAD),
)

_ROUTED = f"(count('{_MLP}.gate.weight') + count('{_OWN_EXPERTS}.{{at:router_dense,router.dense}}.weight'))"
_GATE, _DOWN, _UP = (
    ("gate_proj", "w1", (f"{_OWN_EXPERTS}.ffn.w1",)),
    ("down_proj", "w2", (f"{_OWN_EXPERTS}.ffn.w2",)),
    ("up_proj", "w3", (f"{_OWN_EXPERTS}.ffn.w1",)),
)
_WHOLE = {
    **as_many(
        _ROUTED,
        {
            f"{part} of the experts and mlp.gate are not in the same layers": (
                f"{_MLP}.experts.0.{part}.weight",
                f"{_OWN_EXPERTS}.ffn.{own}.weight",
                *own_stacks,
            )
            for part, own, own_stacks in (_GATE, _DOWN, _UP)
        },
    ),
    **as_many(
        _ROUTED,
        {
            "e_score_correction_bias and mlp.gate are not in the same layers": (
                f"{_MLP}.gate.e_score_correction_bias",
                f"{_OWN_EXPERTS}.{{at:topk_bias,router.router.topk_bias}}",
            ),
            **{
                f"{part} of the shared experts and mlp.gate are not in the same layers": (
                    f"{_MLP}.shared_experts.{part}.weight",
                    f"{_OWN_MLP}.shared_experts.{own}.weight",
                )
                for part, own, _ in (_GATE, _DOWN, _UP)
            },
        },
        or_none=True,
    ),
    **as_many(
        f"{_ALL} - {_ROUTED}",
        {
            f"some layers have neither experts nor {part} of their own, or both": (f"{_MLP}.{part}.weight", f"{_OWN_MLP}.{own}.weight")
            for part, own, _ in (_GATE, _DOWN, _UP)
        },
    ),
    **as_many(
        _PREDICTING,
        {
            f"not every layer for multi-token prediction has {part}": (f"{_LAYER}.{part}.weight", f"model.{own}.weight")
            for part, own in (
                ("enorm", "mtp_hidden_fusers.{i}.norm_emb"),
                ("hnorm", "mtp_hidden_fusers.{i}.norm"),
                ("eh_proj", "mtp_hidden_fusers.{i}.dense"),
                ("shared_head.norm", "mtp_norms.{i}"),
            )
        },
    ),
}

_REASON, _FEWER = "a layer beyond --set num_layers", f"{_TAKEN} < {_ALL}"
_LEFT_OUT = (
    Drop(f"{_LAYER}.{{rest*}}", _REASON, _FEWER, where=f"i >= {_TAKEN}"),
    Make(f"{_LAYER}.{{rest*}}", _REASON, _FEWER, where=f"i >= {_TAKEN}"),
    Make("model.{part:mtp_hidden_fusers,mtp_norms}.{i}.{rest*}", _REASON, _FEWER, where="i >= num_nextn_predict_layers"),
)


def hf_files(model: Model) -> dict[str, Any]:
    """config.json without what it says of float8 weights, where it does."""
    config: Mapping[str, Any] = model.sidecar or model.config
    return {"config.json": {key: value for key, value in config.items() if key != "quantization_config"}} if config else {}


_SPLIT = Recipe(
    rules=(
        Rule("model.embed_tokens.weight", _EMBEDDING),
        _norm("model.norm.weight", "model.norm_out.weight"),
        Rule(_HEAD, _HEAD),
        *_MLA,
        *_MOE,
        *_MTP,
        *_LEFT_OUT,
        *TRAINING,
    ),
    dims={
        "i": _TAKEN,
        "depth": _DEPTH,
        "d": "min(first_k_dense_replace, num_layers)",
        "h": "=n_head",
        "a": "=qk_nope_head_dim",
        "r": "=qk_rope_head_dim // 2",
        "two": 2,
        "v": "=v_head_dim",
        "l": "=kv_lora_rank",
        "e": "=num_routed_experts",
    },
    requires=_WHOLE,
    right=Side(stem="ms-model", index="param_name_map.json", writes=hf_files),
)

_DEEPSEEK3 = Recipe(
    name="deepseek3-hf2ms",
    summary="DeepSeek-V3, R1: Hugging Face to MindSpore, float8 weights as bfloat16, experts stacked",
    rules=(
        Rule(
            "{name*}.weight{part:,_scale_inv}",
            "{name*}.weight",
            when="has('{name*}.weight_scale_inv') or has('{name*}.weight', 'float8')",
            partial=True,
            optional=True,
            op={
                "op": "dequantize",
                "rows": "config.quantization_config.weight_block_size[0] or 128",
                "columns": "config.quantization_config.weight_block_size[1] or 128",
            },
        ),
        Rule("{name*}", "{name*}", optional=True, fallback=True),
    ),
    options={
        **from_config(
            n_head="num_attention_heads",
            qk_nope_head_dim="qk_nope_head_dim",
            qk_rope_head_dim="qk_rope_head_dim",
            v_head_dim="v_head_dim",
            kv_lora_rank="kv_lora_rank",
            first_k_dense_replace="first_k_dense_replace",
        ),
        "num_routed_experts": Option(
            "n_routed_experts of config.json, else as many as the router knows",
            default="{config.n_routed_experts or sidecar.n_routed_experts or "
            f"shape('{_MLP}.gate.weight')[0] or shape('{_OWN_EXPERTS}.{{router:router_dense,router.dense}}.weight')[0]}}",
            kind="int",
        ),
        "num_layers": Option(
            "how many layers to take, those for multi-token prediction aside; the rest is left out",
            default=f"{{{_ALL} - {_PREDICTING}}}",
            kind="int",
        ),
        "num_nextn_predict_layers": Option(
            "how many layers for multi-token prediction there are after these",
            default=f"{{{_PREDICTING} if num_layers >= {_ALL} - {_PREDICTING} else 0}}",
            kind="int",
        ),
        "use_grouped_gemm": Option(
            "whether MindSpore's model has experts for grouped matrix products: transposed, gate and up in one",
            default=f"{{not has('{_OWN_EXPERTS}.ffn.w1.weight')}}",
            kind="bool",
        ),
    },
    left=Side(writes=hf_files),
    then=_SPLIT,
    reference="mindformers dev (fd4deeb), research/deepseek3/convert_weight.py and convert_reversed.py",
)

RECIPES = both_ways(_DEEPSEEK3)
