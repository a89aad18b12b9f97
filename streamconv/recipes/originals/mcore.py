"""GPT models of Megatron Core (torch_dist) <-> Hugging Face: Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V3.

Facts: ``megatron/core/models/gpt`` and ``megatron/core/transformer`` of megatron-core 0.16.1. Queries, keys and values of a group of heads
lie together, gate and up one behind the other; layers that are all alike are one tensor with an axis of layers, others are apart; the norm
before a fused linear layer is a part of that. Newer versions save each layer, each expert and each of gate and up as a tensor
(``singleton_local_shards``). Megatron's models of weights laid out so give the logits of Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamconv.recipe import Make, Option, Recipe, Rule, Side, from_config

_HF, _APART, _STACKED = "model.layers.{i}", "decoder.layers.{i}", "decoder.layers"
_GROUPED = "(g q d) c, (g d) c, (g d) c -> (g (q d + d + d)) c"
_GROUPED_BIAS = "(g q d), (g d), (g d) -> (g (q d + d + d))"
_HALVES = "f c, f c -> (f + f) c"
_VECTOR, _MATRIX = "c -> c", "o c -> o c"
_MOE, _DENSE = "num_experts", "not num_experts"
_MLA, _PLAIN = "kv_lora_rank", "not kv_lora_rank"
_LATENT, _LATENT_APART = (f"{_MLA} and latent_norms == '{where}'" for where in ("fused", "apart"))
_JOINED, _SINGLE = "singles == 'joined'", "singles == 'apart'"
_MIXTRAL, _OTHERS = "model_type == 'mixtral'", "model_type != 'mixtral'"


def _stacked(layout: str) -> str:
    """A layout of a layer's tensors as one of all layers'."""
    left, right = layout.split(" -> ")
    return " -> ".join(", ".join(f"i {tensor}" for tensor in side.split(", ")) for side in (left, right))


def _layer(name: str, own: str, layout: str = _MATRIX, when: str = "", **more: Any) -> Iterator[Rule]:
    """A tensor of each layer: apart, and all layers' in one."""
    also = f" and ({when})" if when else ""
    yield Rule(f"{_HF}.{name}", f"{_APART}.{own}", layout, when=f"not stacked{also}", **more)
    yield Rule(f"{_HF}.{name}", f"{_STACKED}.{own}", _stacked(layout), when=f"stacked{also}", **more)


def _norms() -> Iterator[Rule]:
    """The norm before experts, or before a layer that is dense among such."""
    name, fused, apart = "post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
    dense = "norms == 'fused' or (norms == 'apart' and i < (first_dense or 0))"
    yield Rule(f"{_HF}.{name}", f"{_STACKED}.{fused}", "i c -> i c", when=f"stacked and {_MOE} and norms == 'fused'")
    yield Rule(f"{_HF}.{name}", f"{_STACKED}.{apart}", "i c -> i c", when=f"stacked and {_MOE} and norms != 'fused'")
    yield Rule(f"{_HF}.{name}", f"{_APART}.{fused}", when=f"not stacked and {_MOE}", where=dense, optional=True)
    yield Rule(f"{_HF}.{name}", f"{_APART}.{apart}", when=f"not stacked and {_MOE}", where=f"not ({dense})", optional=True)


def _gated(parent: str, own: str, when: str, **more: Any) -> Iterator[Rule]:
    """Gate and up of a dense or shared part of layers: one behind the other, or apart."""
    yield from _layer(f"{parent}.{{gate,up}}_proj.weight", f"{own}.linear_fc1.weight", _HALVES, f"{when} and {_JOINED}", **more)
    names = f"{_HF}.{parent}.{{gate,up}}_proj.weight", f"{_APART}.{own}.linear_fc1.weight_{{w,v}}"
    yield Rule(*names, when=f"not stacked and {when} and {_SINGLE}", **more)


def _rows(name: str, own: str, **more: Any) -> Rule:
    """A tensor with a row for each word, which Megatron has more of."""
    rows = f"pad_vocab or shape('{name}')[0]"
    return Rule(name, own, op={"op": "pad", "rows": rows}, undo={"op": "rows", "stop": f"vocab_size or shape('{own}')[0]"}, **more)


def _experts(parent: str, gate: str, up: str, down: str, when: str) -> Iterator[Rule]:
    experts = f"{parent}.experts.{{e}}"
    whole: dict[str, Any] = {"optional": True, "sparse": True}
    own = "mlp.experts.experts"
    joined, single = (f"{_MOE} and {when} and {where}" for where in (_JOINED, f"{_SINGLE} and not stacked"))
    yield from _layer(f"{experts}.{{{gate},{up}}}.weight", f"{own}.linear_fc1.weight", "e f c, e f c -> e (f + f) c", joined, **whole)
    yield from _layer(f"{experts}.{down}.weight", f"{own}.linear_fc2.weight", "e c f -> e c f", joined, **whole)
    yield Rule(f"{_HF}.{experts}.{{{gate},{up}}}.weight", f"{_APART}.{own}.{{e}}.linear_fc1.weight_{{w,v}}", when=single, **whole)
    yield Rule(f"{_HF}.{experts}.{down}.weight", f"{_APART}.{own}.{{e}}.linear_fc2.weight", when=single, **whole)
    yield from _layer(f"{parent}.gate.weight", "mlp.router.weight", "n c -> n c", when=f"{_MOE} and {when}", **whole)


RULES: tuple[Rule | Make, ...] = (
    _rows("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
    _rows("lm_head.weight", "output_layer.weight", optional=True),
    Rule("model.norm.weight", "decoder.final_layernorm.weight"),
    *_layer("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", _VECTOR, _PLAIN),
    *_layer("input_layernorm.weight", "input_layernorm.weight", _VECTOR, _MLA),
    *_layer("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", _VECTOR, _DENSE),
    *_norms(),
    *_layer("self_attn.{q,k,v}_proj.weight", "self_attention.linear_qkv.weight", _GROUPED, _PLAIN),
    *_layer("self_attn.{q,k,v}_proj.bias", "self_attention.linear_qkv.bias", _GROUPED_BIAS, _PLAIN, optional=True),
    *_layer("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
    *_layer("self_attn.{q,k}_norm.weight", "self_attention.{q,k}_layernorm.weight", _VECTOR, _PLAIN, optional=True),
    *_layer("self_attn.q_proj.weight", "self_attention.linear_q_proj.weight", when=f"{_MLA} and not q_lora_rank"),
    *_layer("self_attn.q_{a,b}_proj.weight", "self_attention.linear_q_{down,up}_proj.weight", when=f"{_MLA} and q_lora_rank"),
    *_layer(
        "self_attn.{kv_a_proj_with_mqa,kv_b_proj}.weight", "self_attention.{linear_kv_down_proj,linear_kv_up_proj}.weight", when=_MLA
    ),
    *_layer("self_attn.q_a_layernorm.weight", "self_attention.q_layernorm.weight", _VECTOR, f"q_lora_rank and {_LATENT_APART}"),
    *_layer("self_attn.q_a_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight", _VECTOR, f"q_lora_rank and {_LATENT}"),
    *_layer("self_attn.kv_a_layernorm.weight", "self_attention.kv_layernorm.weight", _VECTOR, _LATENT_APART),
    *_layer("self_attn.kv_a_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight", _VECTOR, _LATENT),
    *_gated("mlp", "mlp", _DENSE),
    *_layer("mlp.down_proj.weight", "mlp.linear_fc2.weight", when=_DENSE),
    *_gated("mlp", "mlp", _MOE, optional=True, sparse=True),
    *_layer("mlp.down_proj.weight", "mlp.linear_fc2.weight", when=_MOE, optional=True, sparse=True),
    *_gated("mlp.shared_experts", "mlp.shared_experts", _MOE, optional=True, sparse=True),
    *_layer("mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight", when=_MOE, optional=True, sparse=True),
    *_layer("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", "n -> n", f"{_MOE} and {_OTHERS}", optional=True, sparse=True),
    *_experts("block_sparse_moe", "w1", "w3", "w2", _MIXTRAL),
    *_experts("mlp", "gate_proj", "up_proj", "down_proj", _OTHERS),
    Make("mtp.{rest*}", "of layers that predict further tokens, which the model classes of transformers do not have"),
)  # fmt: skip

_MCORE = Recipe(
    name="mcore-hf2gpt",
    summary="Hugging Face to GPT models of Megatron Core (Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V3)",
    rules=RULES,
    dims={"i": "n_layers", "g": "=n_kv_heads", "d": "=head_dim", "e": "=num_experts"},
    options={
        **from_config(
            n_layers="num_hidden_layers",
            n_heads="num_attention_heads",
            n_kv_heads="num_key_value_heads num_attention_heads",
            num_experts="num_local_experts num_experts n_routed_experts",
            kv_lora_rank="kv_lora_rank",
            q_lora_rank="q_lora_rank",
            hidden_size="hidden_size",
            vocab_size="vocab_size",
            first_dense="first_k_dense_replace",
        ),
        "head_dim": Option(
            "head_dim of config.json, else its hidden_size by its heads",
            default="{config.head_dim or sidecar.head_dim or hidden_size // n_heads}",
            kind="int",
        ),
        "model_type": Option("model_type of config.json", default="{config.model_type or sidecar.model_type or ''}"),
        "singles": Option(
            "each layer, expert, gate and up: joined; apart, a tensor for each, as newer versions save",
            default="{'apart' if has('{before*}linear_fc1.weight_w') else 'joined'}",
            choices=("joined", "apart"),
        ),
        "stacked": Option(
            "layers are one tensor each; by default what is there, on the way to Megatron unless some are dense among experts",
            default="{not first_dense and singles == 'joined' and not has('decoder.layers.0.self_attention.linear_proj.weight')}",
            kind="bool",
        ),
        "norms": Option(
            "of experts' layers: fused, as Megatron's own layers store them where all are alike; apart, as those of Transformer Engine do, "
            "but for layers that are dense; everywhere: of these, too",
            default="{'everywhere' if has('decoder.layers.0.pre_mlp_layernorm.weight') else "
            "'apart' if has('{before*}pre_mlp_layernorm.weight') or first_dense else 'fused'}",
            choices=("fused", "apart", "everywhere"),
        ),
        "latent_norms": Option(
            "of latent attention: apart; fused, as Transformer Engine has them",
            default="{'fused' if has('{before*}linear_kv_up_proj.layer_norm_weight') else 'apart'}",
            choices=("apart", "fused"),
        ),
        "pad_vocab": Option("rows of the embedding and the head on Megatron's side, the new ones zero", kind="int"),
    },
    reference="megatron-core 0.16.1",
    left=Side(expects=("tokenizer_config.json",)),
    right=Side(format="torch_dist"),
)

RECIPES = (
    _MCORE,
    _MCORE.inverse("mcore-gpt2hf", "GPT models of Megatron Core (Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V3) to Hugging Face"),
)
