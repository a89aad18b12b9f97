"""Mixtures of experts that go by their family's recipe in MindSpore Transformers: DeepSeek-V2 by DeepSeek's, Qwen2-MoE by Qwen's.

Facts: mindformers r1.5.0 (ece44cc) ``research/deepseek2/convert_weight.py``, r1.3.0 (f90b5b9) ``research/qwen2/convert_moe_weight.py``,
which have no way back. They take experts as they come, 160 and 64 to a layer; here their numbers say where they belong.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Option, Rule
from streamconv.recipes.mindspore.mindformers import as_many, linear

RECIPES = ()

_LAYER = "model.layers.{i}"
_ATTENTION, _OWN_ATTENTION = f"{_LAYER}.self_attn", f"{_LAYER}.attention"
_MLP, _OWN_MLP = f"{_LAYER}.mlp", f"{_LAYER}.feed_forward"
_ROUTER, _OWN_ROUTER = f"{_MLP}.gate", f"{_OWN_MLP}.routed_experts.router.dense"
_EXPERTS, _OWN_EXPERTS = f"{_MLP}.experts", f"{_OWN_MLP}.routed_experts.ffn"
_PARTS = (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
_EACH, _OWN_EACH = (f"{{{','.join(names)}}}.weight" for names in zip(*_PARTS, strict=True))

USE_GMM = {"use_gmm": Option("whether MindSpore's side has experts transposed, as its grouped multiplication takes them", default=False)}
EXPERT_COUNT = {"e": f"=(shape('{_ROUTER}.weight') or shape('{_OWN_ROUTER}.weight'))[0]"}

IS_DEEPSEEK_V2 = f"has('{_LAYER}.{{at:self_attn.kv_a_proj_with_mqa,attention.kv2l}}.weight')"
IS_QWEN2_MOE = f"has('{_LAYER}.{{at:mlp.shared_expert_gate,feed_forward.shared_experts_gate}}.weight')"


def _norms(**more: Any) -> tuple[Rule, ...]:
    return (
        Rule(f"{_LAYER}.{{input,post_attention}}_layernorm.weight", f"{_LAYER}.{{attention,ffn}}_norm.weight", **more),
        Rule("model.norm.weight", "model.norm_out.weight", **more),
    )


def _experts(shared: str, **more: Any) -> tuple[Rule, ...]:
    """Experts and router, whose rule takes ``more``; the experts that all tokens go to are called ``shared``."""
    stacked = (f"{_EXPERTS}.{{e}}.{_EACH}", f"{_OWN_EXPERTS}.{_OWN_EACH}")
    return (
        Rule("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight"),
        Rule(f"{_ROUTER}.weight", f"{_OWN_ROUTER}.weight", "e c -> e c", **more),
        Rule(*stacked, "e a b -> e a b", when="not use_gmm", sparse=True),
        Rule(*stacked, "e a b -> e b a", when="use_gmm", sparse=True),
        Rule(f"{_MLP}.{shared}.{_EACH}", f"{_OWN_MLP}.shared_experts.{_OWN_EACH}", sparse=True),
    )


_LOW_RANK = f"has('{_LAYER}.{{at:self_attn.q_a_proj,attention.q2l_proj}}.weight')"
_FIRM: dict[str, Any] = {"cast": "float32", "firm": True}

DEEPSEEK_V2 = (
    *_experts("shared_experts", sparse=True, **_FIRM),
    Rule(f"model.layers.{{d}}.mlp.{_EACH}", f"model.layers.{{d}}.feed_forward.{_OWN_EACH}", optional=True),
    Rule(f"{_ATTENTION}.{{kv_a_proj_with_mqa,kv_b_proj,o_proj}}.weight", f"{_OWN_ATTENTION}.{{kv2l,lkv2kv,wo}}.weight"),
    Rule(f"{_ATTENTION}.kv_a_layernorm.weight", f"{_OWN_ATTENTION}.lkv_norm.weight", **_FIRM),
    # Large models have queries of low rank, the small one does not.
    Rule(f"{_ATTENTION}.q_proj.weight", f"{_OWN_ATTENTION}.q_proj.weight", when=f"not {_LOW_RANK}"),
    Rule(f"{_ATTENTION}.{{q_a,q_b}}_proj.weight", f"{_OWN_ATTENTION}.{{q2l,l2q}}_proj.weight", when=_LOW_RANK),
    Rule(f"{_ATTENTION}.q_a_layernorm.weight", f"{_OWN_ATTENTION}.lq_norm.weight", when=_LOW_RANK, **_FIRM),
    *_norms(**_FIRM),
)
"""All but the head."""

QWEN2_MOE = (
    *_experts("shared_expert"),
    Rule(f"{_MLP}.shared_expert_gate.weight", f"{_OWN_MLP}.shared_experts_gate.weight"),
    *linear(f"{_ATTENTION}.{{part:q,k,v,o}}_proj", f"{_OWN_ATTENTION}.w{{part:q,k,v,o}}"),
    *_norms(),
)
"""All but the head."""


_ALL = f"(count('{_LAYER}.input_layernorm.weight') + count('{_LAYER}.attention_norm.weight'))"
_SPARSE = f"(count('{_ROUTER}.weight') + count('{_OWN_ROUTER}.weight'))"


def _require_all(part: str, own: str) -> dict[str, str]:
    """What must hold of the numbers of one part of the MLPs, ``own`` on MindSpore's side, where there are experts."""
    experts = as_many(
        _SPARSE,
        {
            f"{part} of the experts and mlp.gate are not in the same layers": (
                f"{_EXPERTS}.0.{part}.weight",
                f"{_OWN_EXPERTS}.{own}.weight",
            ),
            f"{part} of the shared experts and mlp.gate are not in the same layers": (
                f"{_MLP}.{{at:shared_expert,shared_experts}}.{part}.weight",
                f"{_OWN_MLP}.shared_experts.{own}.weight",
            ),
        },
    )
    others = as_many(
        f"{_ALL} - {_SPARSE}",
        {f"some layers have neither experts nor {part} of their own, or both": (f"{_MLP}.{part}.weight", f"{_OWN_MLP}.{own}.weight")},
    )
    return {f"not {_SPARSE} or {condition}": problem for condition, problem in {**experts, **others}.items()}


WHOLE: dict[str, str] = {}
for _part, _own in _PARTS:
    WHOLE |= _require_all(_part, _own)
"""What must hold of the numbers of tensors."""
