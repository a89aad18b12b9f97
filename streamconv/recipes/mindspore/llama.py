"""MindSpore Transformers' families with Llama's names, and their fused q, k, v and gate, up.

Facts: see `mindformers`; for qwen2_5 and the grouped layout r1.4.0-beta2 (b3fcd1b), for qwen2_5's LoRA names the branch dev (fd4deeb).
Both sides rotate halves, so that nothing is permuted.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from streamconv.recipe import Drop, Fact, Option, Recipe, Rule, from_config
from streamconv.recipes.mindspore.mindformers import (
    HF,
    LAYER_COUNT,
    LORA,
    MINDPET,
    MS,
    PET,
    REFERENCE,
    TIED,
    TRAINING,
    both_ways,
    head,
    linear,
    where,
)
from streamconv.recipes.mindspore.moe import DEEPSEEK_V2, EXPERT_COUNT, IS_DEEPSEEK_V2, USE_GMM, WHOLE

# A model without a head has its names without "model.".
_BASE = "{base:,model.}"
_LAYER = f"{_BASE}layers.{{i}}"
_EMBEDDING = "tok_embeddings.embedding_weight"
_BUFFER = f"{_LAYER}.{{part:self_attn,attention}}.rotary_emb.inv_freq"
_NO_BUFFER = Drop(_BUFFER, "the model computes it from its config")

_ANY = ",".join((LORA, PET, MINDPET))
_UNKNOWN = (_ANY, _ANY)  # LoRA factors of families whose scripts do not rename them

_THIRDS = "(p + p + p) ... -> p ..., p ..., p ..."
_HEADS = {
    **from_config(num_attention_heads="num_attention_heads", hidden_size="hidden_size", head_dim="head_dim"),
    "num_key_value_heads": Option(
        "num_key_value_heads of config.json, else as many as there are of queries",
        default="{config.num_key_value_heads or sidecar.num_key_value_heads or num_attention_heads}",
        kind="int",
    ),
}
_HEAD_DIM = "(head_dim or hidden_size // num_attention_heads)"
_GROUPS = {"k": "=num_key_value_heads", "g": "=num_attention_heads // num_key_value_heads", "d": f"={_HEAD_DIM}"}
_NEEDS_HEADS = "how many rows are q, k and v? --set num_attention_heads=N (and num_key_value_heads=N), or put config.json beside the source"
_GROUPED = "(k g d) ..., (k d) ..., (k d) ... -> (k (g d + d + d)) ..."


# Llama's names ------------------------------------------------------------------------------------------------------


def _llama(lora: tuple[str, str] = _UNKNOWN) -> tuple[Fact, ...]:
    """All but attention's inputs, heads, buffers and the state of training."""
    return (
        Rule(f"{_BASE}embed_tokens.weight", f"{_BASE}{_EMBEDDING}"),
        *linear(f"{_LAYER}.self_attn.o_proj", f"{_LAYER}.attention.wo", lora),
        *linear(f"{_LAYER}.mlp.{{part:gate,down,up}}_proj", f"{_LAYER}.feed_forward.w{{part:1,2,3}}", lora),
        Rule(f"{_LAYER}.{{input,post_attention}}_layernorm.weight", f"{_LAYER}.{{attention,ffn}}_norm.weight"),
        Rule(f"{_BASE}norm.weight", f"{_BASE}norm_out.weight"),
    )


def _attention(lora: tuple[str, str] = _UNKNOWN) -> tuple[Rule, ...]:
    return linear(f"{_LAYER}.self_attn.{{part:q,k,v}}_proj", f"{_LAYER}.attention.w{{part:q,k,v}}", lora)


EMBEDDING, OWN_EMBEDDING = "model.embed_tokens.weight", f"model.{_EMBEDDING}"
_HEAD = head(EMBEDDING, OWN_EMBEDDING)


_LLAMA = Recipe(
    name="llama-hf2ms",
    summary="Llama, CodeLlama: Hugging Face to MindSpore",
    rules=(*_llama((LORA, PET)), *_attention((LORA, PET)), *_HEAD, _NO_BUFFER, *TRAINING),
    dims=LAYER_COUNT,
    options=TIED,
    left=HF,
    right=MS,
    reference=REFERENCE.format("models/llama"),
)
_YI = replace(
    _LLAMA,
    name="yi-hf2ms",
    summary="Yi: Hugging Face to MindSpore",
    rules=(*_llama(), *_attention(), *_HEAD, _NO_BUFFER, *TRAINING),
    reference=REFERENCE.format("research/yi"),
)
_DEEPSEEK = replace(
    _YI,
    name="deepseek-hf2ms",
    summary="DeepSeek Coder (Llama's architecture), DeepSeek-V2: Hugging Face to MindSpore, experts stacked",
    rules=(
        *where(f"not {IS_DEEPSEEK_V2}", (*_llama(), *_attention(), *_HEAD)),
        *where(IS_DEEPSEEK_V2, (*DEEPSEEK_V2, Rule("lm_head.weight", "lm_head.weight"))),
        _NO_BUFFER,
        *TRAINING,
    ),
    dims={**LAYER_COUNT, **EXPERT_COUNT},
    options={**TIED, **USE_GMM},
    requires=WHOLE,
    reference=REFERENCE.format("research/deepseek") + "; r1.5.0 (ece44cc), research/deepseek2/convert_weight.py",
)
_INTERNLM = replace(
    _LLAMA,
    name="internlm-hf2ms",
    summary="InternLM: Hugging Face to MindSpore",
    rules=(*_llama(), *_attention(), *_HEAD, Rule(_BUFFER, _BUFFER, optional=True, sparse=True), *TRAINING),
    reference=REFERENCE.format("research/internlm"),
)

_W_PACK = f"{_LAYER}.self_attn.W_pack"
_BAICHUAN2 = replace(
    _LLAMA,
    name="baichuan2-hf2ms",
    summary="Baichuan 2: Hugging Face to MindSpore, q, k, v split",
    rules=(
        *_llama((LORA, MINDPET)),
        Rule(f"{_LAYER}.self_attn.W_pack.{{kind:weight,bias}}", f"{_LAYER}.attention.w{{q,k,v}}.{{kind:weight,bias}}", _THIRDS),
        *(
            Rule(
                f"{_LAYER}.self_attn.W_pack.{left}",
                f"{_LAYER}.attention.w{{q,k,v}}.{right}",
                _THIRDS,
                when="lora == 'stacked'",
                optional=True,
                sparse=True,
            )
            for left, right in zip(LORA.split(","), MINDPET.split(","), strict=True)
        ),
        *_HEAD,
        _NO_BUFFER,
        *TRAINING,
    ),
    options={
        **TIED,
        "lora": Option(
            "stacked: LoRA factors of W_pack are those of q, k and v one above the other, as mindformers' script makes them; as a pair"
            " these are not what the three pairs are, so that no LoRA library can use them",
            default="{'stacked' if has('model.layers.{i}.attention.wq.mindpet_delta_lora_{part:a,b}') else 'refused'}",
            choices=("stacked", "refused"),
        ),
    },
    reference=REFERENCE.format("research/baichuan2"),
)


# InternLM2, Mixtral -------------------------------------------------------------------------------------------------

_INTERNLM2 = Recipe(
    name="internlm2-hf2ms",
    summary="InternLM2: Hugging Face to MindSpore",
    rules=(
        Rule(f"{_BASE}tok_embeddings.weight", f"{_BASE}{_EMBEDDING}"),
        *linear(f"{_LAYER}.attention.wqkv", f"{_LAYER}.attention.w", _UNKNOWN, when="qkv_concat"),
        Rule(
            f"{_LAYER}.attention.wqkv.{{kind:weight,bias}}",
            f"{_LAYER}.attention.w{{q,k,v}}.{{kind:weight,bias}}",
            "(k (g d + d + d)) ... -> (k g d) ..., (k d) ..., (k d) ...",
            when="not qkv_concat",
        ),
        *linear(f"{_LAYER}.attention.wo", f"{_LAYER}.attention.wo", _UNKNOWN),
        *linear(f"{_LAYER}.feed_forward.w{{part:1,2,3}}", f"{_LAYER}.feed_forward.w{{part:1,2,3}}", _UNKNOWN),
        Rule(f"{_LAYER}.{{attention,ffn}}_norm.weight", f"{_LAYER}.{{attention,ffn}}_norm.weight"),
        Rule(f"{_BASE}norm.weight", f"{_BASE}norm_out.weight"),
        *head("model.tok_embeddings.weight", f"model.{_EMBEDDING}", twice=False, names=("output.weight", "lm_head.weight")),
        _NO_BUFFER,
        *TRAINING,
    ),
    dims={**LAYER_COUNT, **_GROUPS},
    options={
        **TIED,
        "qkv_concat": Option(
            "whether MindSpore's side keeps q, k, v in one tensor",
            default="{not has('{base:,model.}layers.{i}.attention.wq.weight')}",
            kind="bool",
        ),
        **_HEADS,
    },
    requires={"qkv_concat or num_attention_heads": _NEEDS_HEADS},
    left=HF,
    right=MS,
    reference=REFERENCE.format("research/internlm2") + "; convert_reversed.py of r1.4.0-beta2 (b3fcd1b)",
)

_MOE, _OWN_MOE = "model.layers.{i}.block_sparse_moe", "model.layers.{i}.feed_forward"
_EXPERTS = (f"{_MOE}.experts.{{e}}.{{w1,w2,w3}}.weight", f"{_OWN_MOE}.ffn.{{w1,w2,w3}}.weight")

_MIXTRAL = Recipe(
    name="mixtral-hf2ms",
    summary="Mixtral: Hugging Face to MindSpore, experts stacked",
    rules=(
        Rule("model.embed_tokens.weight", f"model.{_EMBEDDING}"),
        *linear("model.layers.{i}.self_attn.{part:q,k,v,o}_proj", "model.layers.{i}.attention.w{part:q,k,v,o}", _UNKNOWN),
        Rule(f"{_MOE}.gate.weight", f"{_OWN_MOE}.router.dense.weight"),
        Rule(*_EXPERTS, "e a b -> e a b", when="not use_gmm"),
        Rule(*_EXPERTS, "e a b -> e b a", when="use_gmm"),
        Rule("model.layers.{i}.{input,post_attention}_layernorm.weight", "model.layers.{i}.{attention,ffn}_norm.weight"),
        Rule("model.norm.weight", "model.norm_out.weight"),
        *head(EMBEDDING, OWN_EMBEDDING, twice=None),
        _NO_BUFFER,
        *TRAINING,
    ),
    dims={**LAYER_COUNT, "e": f"=num_local_experts or (shape('{_MOE}.gate.weight') or shape('{_OWN_MOE}.router.dense.weight'))[0]"},
    options={
        **TIED,
        **from_config(num_local_experts="num_local_experts"),
        **USE_GMM,
    },
    left=HF,
    right=MS,
    reference=REFERENCE.format("research/mixtral"),
)


# Fused q, k, v and gate, up -----------------------------------------------------------------------------------------

_QKV = f"{_LAYER}.attention.w_qkv"
_ROWS = f"shape('{_QKV}.weight')[0] // (num_attention_heads + 2 * num_key_value_heads)"
_FUSED_DIMS = {
    **_GROUPS,
    "a": f"=num_attention_heads * ({_HEAD_DIM} or {_ROWS})",
    "b": f"=num_key_value_heads * ({_HEAD_DIM} or {_ROWS})",
}


def _fuse(when: str) -> tuple[Rule, ...]:
    """The parts that become one tensor where ``when`` holds."""
    parts = f"{_LAYER}.attention.w{{q,k,v}}"
    gate_up = (f"{_LAYER}.feed_forward.w{{1,3}}.weight", f"{_LAYER}.feed_forward.w_gate_hidden.weight")
    with_groups, without = f"{when} and layout == 'grouped'", f"{when} and layout == 'plain'"
    no_groups = "a ..., b ..., b ... -> (a + b + b) ..."
    return (
        Rule(f"{parts}.weight", f"{_QKV}.weight", no_groups, when=without),
        Rule(f"{parts}.weight", f"{_QKV}.weight", _GROUPED, when=with_groups),
        Rule(f"{parts}.bias", f"{_QKV}.bias", no_groups, when=f"{when} and not group_bias", optional=True),
        Rule(f"{parts}.bias", f"{_QKV}.bias", _GROUPED, when=f"{when} and group_bias", optional=True),
        Rule(*gate_up, "f ..., f ... -> (f + f) ...", when=without),
        Rule(*gate_up, "f ..., f ... -> (f (1 + 1)) ...", when=with_groups),
    )


def _fuse_options(layout: str, group_bias: str) -> dict[str, Option]:
    return {
        **_HEADS,
        "layout": Option(
            "plain: q, k, v one after the other, gate and up too; "
            "grouped: q, k, v of each key and value head together, rows of gate and up in turns",
            default=layout,
            choices=("plain", "grouped"),
        ),
        "group_bias": Option("whether biases have the grouped layout too", default=f"{{{group_bias}}}", kind="bool"),
    }


_LLAMA_FUSE = Recipe(
    name="llama-ms-fuse",
    summary="Llama in MindSpore: q, k, v in one tensor, gate and up in one tensor",
    rules=(
        *_fuse("True"),
        Rule(f"{_BASE}{{{_EMBEDDING},norm_out.weight}}", f"{_BASE}{{{_EMBEDDING},norm_out.weight}}", sparse=True),
        Rule("lm_head.weight", "lm_head.weight", optional=True),
        *linear(f"{_LAYER}.attention.wo", f"{_LAYER}.attention.wo", _UNKNOWN),
        *linear(f"{_LAYER}.feed_forward.w2", f"{_LAYER}.feed_forward.w2", _UNKNOWN),
        Rule(f"{_LAYER}.{{attention,ffn}}_norm.weight", f"{_LAYER}.{{attention,ffn}}_norm.weight"),
        *TRAINING,
        *(fact.flip() for fact in TRAINING),
    ),
    dims={**LAYER_COUNT, **_FUSED_DIMS},
    options=_fuse_options("plain", "False"),  # mindformers' own script does not group llama's biases
    requires={f"num_attention_heads or layout == 'plain' and not has('{_QKV}.weight')": _NEEDS_HEADS},
    left=MS,
    right=MS,
    reference=REFERENCE.format("models/llama") + "; the same of r1.4.0-beta2 (b3fcd1b) for the grouped layout",
)
_QWEN2_5_FUSE = replace(
    _LLAMA_FUSE,
    name="qwen2_5-ms-fuse",
    summary="Qwen2.5 in MindSpore: q, k, v in one tensor, gate and up in one tensor",
    options=_fuse_options("grouped", "layout == 'grouped'"),
    reference="mindformers r1.4.0-beta2 (b3fcd1b), research/qwen2_5/convert_weight.py",
)

QWEN2 = (*_llama((LORA, "lora_a,lora_b")), *_attention((LORA, "lora_a,lora_b")), *_HEAD, _NO_BUFFER)
"""Qwen1.5, Qwen2, Qwen2.5."""

_QWEN2_5 = replace(
    _LLAMA,
    name="qwen2_5-hf2ms",
    summary="Qwen1.5, Qwen2, Qwen2.5: Hugging Face to MindSpore",
    rules=(*QWEN2, *TRAINING),
    options={
        **TIED,
        "qkv_concat": Option(
            "whether MindSpore's side has q, k, v in one tensor, gate and up too", default=f"{{has('{_QKV}.weight')}}", kind="bool"
        ),
    },
    requires={
        "not (qkv_concat and has('{rest*}.lora_{part:A.weight,B.weight,a,b}'))": "LoRA factors of q, k, v have no place in fused tensors: "
        "--set qkv_concat=false",
    },
    then=replace(
        _QWEN2_5_FUSE,
        name="",
        rules=(*_fuse("qkv_concat"), Rule("{rest*}", "{rest*}", optional=True, fallback=True)),
        dims=_FUSED_DIMS,
        requires={f"not qkv_concat or {condition}": problem for condition, problem in _LLAMA_FUSE.requires.items()},
    ),
    reference="mindformers r1.4.0-beta2 (b3fcd1b) and dev (fd4deeb), research/qwen2_5/convert_weight.py",
)

_FAMILIES = (_LLAMA, _YI, _DEEPSEEK, _INTERNLM, _BAICHUAN2, _INTERNLM2, _MIXTRAL, _QWEN2_5)


def _unfuse(fuse: Recipe) -> Recipe:
    """The way back of a recipe that fuses tensors."""
    return fuse.inverse(fuse.name.replace("-fuse", "-unfuse"), fuse.summary.replace("in one tensor", "taken apart"))


RECIPES = (
    *chain.from_iterable(map(both_ways, _FAMILIES)),
    _LLAMA_FUSE,
    _unfuse(_LLAMA_FUSE),
    _QWEN2_5_FUSE,
    _unfuse(_QWEN2_5_FUSE),
)
