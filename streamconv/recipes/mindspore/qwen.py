"""MindSpore Transformers' Qwen and Qwen-VL.

Facts: see `mindformers`. The way back joins weights of q, k and v as it does biases, which mindformers' script forgets; Qwen-VL, which has
no way back there, keeps bfloat16, which goes through float16 there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from streamconv.recipe import Drop, Fact, Option, Recipe, Rule, from_config
from streamconv.recipes.mindspore.llama import EMBEDDING, OWN_EMBEDDING, QWEN2
from streamconv.recipes.mindspore.mindformers import (
    HF,
    LAYER_COUNT,
    LORA,
    MINDPET,
    MS,
    REFERENCE,
    TIED,
    TRAINING,
    both_ways,
    head,
    linear,
    where,
)
from streamconv.recipes.mindspore.moe import EXPERT_COUNT, IS_QWEN2_MOE, QWEN2_MOE, USE_GMM, WHOLE

_LAYER, _KIND, _NORM = "transformer.h.{i}", "{kind:weight,bias}", "{kind:gamma,beta}"
_THIRDS = "(p + p + p) ... -> p ..., p ..., p ..."
_WTE, _OWN_WTE = "transformer.wte.weight", "transformer.wte.embedding_weight"


def _language(at: str = "", when: str | None = None) -> tuple[Fact, ...]:
    """All but embedding and head, whose names on MindSpore's side begin with ``at``; q, k, v are split ``when`` that holds."""
    own = f"{at}transformer.layers.{{i}}"
    return (
        Rule(f"{_LAYER}.ln_{{1,2}}.weight", f"{own}.{{attention,ffn}}_norm.weight"),
        Rule(f"{_LAYER}.attn.c_attn.{_KIND}", f"{own}.attention.w{{q,k,v}}.{_KIND}", _THIRDS, when=when),
        Rule(
            f"{_LAYER}.attention.w{{q,k,v}}.{{factor:{LORA}}}",
            f"{own}.attention.w{{q,k,v}}.{{factor:{MINDPET}}}",
            optional=True,
            sparse=True,
        ),
        *linear(
            f"{_LAYER}.{{part:attn.c_proj,mlp.w1,mlp.w2,mlp.c_proj}}",
            f"{own}.{{part:attention.wo,feed_forward.w1,feed_forward.w3,feed_forward.w2}}",
            (LORA, MINDPET),
        ),
        Rule("transformer.ln_f.weight", f"{at}transformer.ln_f.weight"),
        *(
            Drop(name, "the model computes it from its config")
            for name in (f"{_LAYER}.attn.{{masked_bias,rotary_emb.inv_freq}}", "transformer.rotary_emb.inv_freq")
        ),
    )


_IS_FIRST = "has('transformer.{at:h,layers}.{i}.{rest*}')"

_QWEN = Recipe(
    name="qwen-hf2ms",
    summary="Qwen, Qwen1.5, Qwen2, Qwen2-MoE: Hugging Face to MindSpore, Qwen's q, k, v split, experts stacked",
    rules=(
        *where(_IS_FIRST, (Rule(_WTE, _OWN_WTE), *_language(), *head(_WTE, _OWN_WTE))),
        *where(f"not {_IS_FIRST} and not {IS_QWEN2_MOE}", QWEN2),
        *where(IS_QWEN2_MOE, (*QWEN2_MOE, *head(EMBEDDING, OWN_EMBEDDING, twice=None))),
        *TRAINING,
    ),
    dims={**LAYER_COUNT, **EXPERT_COUNT},
    options={**TIED, **USE_GMM},
    requires=WHOLE,
    left=HF,
    right=MS,
    reference=REFERENCE.format("research/qwen, research/qwen1_5, research/qwen2") + ", convert_moe_weight.py",
)

_LLM = "llm_model."
_SEEN, _ENCODER = "transformer.visual", "vision_encoder"
_BLOCK, _OWN_BLOCK = f"{_SEEN}.transformer.resblocks.{{j}}", f"{_ENCODER}.transformer.resblocks.{{j}}"
_PLAIN = "{positional_embedding,proj,conv1.weight,attn_pool.pos_embed,attn_pool.query}"
_LAYER_NORMS = "{ln_pre,ln_post,attn_pool.ln_q,attn_pool.ln_kv}"


def _projection(left: str, right: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{left}.out_proj.weight", f"{right}.projection.weight", "o c -> c o"),
        Rule(f"{left}.out_proj.bias", f"{right}.projection.bias"),
    )


_VISION = (
    Rule(f"{_SEEN}.{_PLAIN}", f"{_ENCODER}.{_PLAIN}"),
    Rule(f"{_SEEN}.{_LAYER_NORMS}.{_KIND}", f"{_ENCODER}.{_LAYER_NORMS}.{_NORM}"),
    Rule(f"{_BLOCK}.ln_{{1,2}}.{_KIND}", f"{_OWN_BLOCK}.ln_{{1,2}}.{_NORM}"),
    Rule(
        f"{_BLOCK}.attn.in_proj.{_KIND}",
        f"{_OWN_BLOCK}.attn.dense{{1,2,3}}.{_KIND}",
        "(h (d + d + d)) ... -> (h d) ..., (h d) ..., (h d) ...",
    ),
    *_projection(f"{_BLOCK}.attn", f"{_OWN_BLOCK}.attn"),
    Rule(f"{_BLOCK}.mlp.{{c_fc,c_proj}}.{_KIND}", f"{_OWN_BLOCK}.mlp.{{c_fc,c_proj}}.{_KIND}"),
    Rule(f"{_SEEN}.attn_pool.kv_proj.weight", f"{_ENCODER}.attn_pool.kv_proj.weight", optional=True),
    Rule(
        f"{_SEEN}.attn_pool.attn.in_proj_{{weight,bias}}",
        f"{_ENCODER}.attn_pool.attn.dense{{1,2,3}}.{{weight,bias}}",
        _THIRDS,
    ),
    *_projection(f"{_SEEN}.attn_pool.attn", f"{_ENCODER}.attn_pool.attn"),
)


def _pad(rule: Rule) -> tuple[Rule, Rule]:
    """A rule for a matrix, which gets zero rows where ``enable_emb_opt`` says so."""
    when = f"({rule.when}) and " if rule.when else ""
    rows = f"(shape('{rule.left}')[0] + 512 * emb_strategy - 1) // (512 * emb_strategy) * 512 * emb_strategy"
    return (
        replace(rule, when=f"{when}not enable_emb_opt"),
        replace(rule, when=f"{when}enable_emb_opt", op={"op": "pad", "rows": rows}, undo={"op": "rows", "stop": "vocab_size"}),
    )


def _pad_all(facts: Iterable[Fact]) -> Iterator[Fact]:
    """Facts of which the rules are for matrices; see `_pad`."""
    for fact in facts:
        if isinstance(fact, Rule):
            yield from _pad(fact)
        else:
            yield fact


_HEAD = head(_WTE, f"{_LLM}{_OWN_WTE}", twice=False, names=("lm_head.weight", f"{_LLM}lm_head.weight"))

_QWENVL = Recipe(
    name="qwenvl-hf2ms",
    summary="Qwen-VL: Hugging Face to MindSpore, q, k, v split",
    rules=(
        *_pad(Rule(_WTE, f"{_LLM}{_OWN_WTE}")),
        *_language(_LLM, "not use_qkv_concat"),
        Rule(f"{_LAYER}.attn.c_attn.{_KIND}", f"{_LLM}transformer.layers.{{i}}.attention.w.{_KIND}", when="use_qkv_concat"),
        *_VISION,
        *TRAINING,
        *_pad_all(_HEAD),
    ),
    dims={**LAYER_COUNT, "j": "config.visual.layers or sidecar.visual.layers", "h": "vit_num_head"},
    options={
        **TIED,
        "vit_num_head": Option(
            "heads of the vision tower: visual.heads of config.json, else 16",
            default="{config.visual.heads or sidecar.visual.heads or 16}",
            kind="int",
        ),
        "use_qkv_concat": Option(
            "whether MindSpore's side keeps q, k, v of the language model in one tensor",
            default=f"{{has('{_LLM}transformer.layers.{{i}}.attention.w.weight')}}",
            kind="bool",
        ),
        "enable_emb_opt": Option("whether MindSpore's side has embedding and head padded by zero rows", default=False),
        "emb_strategy": Option("with enable_emb_opt: up to a multiple of 512 times this", kind="int"),
        **from_config(vocab_size="vocab_size"),
    },
    requires={
        f"not enable_emb_opt or (vocab_size if has('{_LLM}{{rest*}}') else emb_strategy)": "enable_emb_opt takes emb_strategy=N"
        " (rows go up to a multiple of 512 N), and on the way back vocab_size=N (rows to keep): --set it",
    },
    left=HF,
    right=MS,
    reference=REFERENCE.format("research/qwenvl"),
)

RECIPES = (*both_ways(_QWEN), *both_ways(_QWENVL))
