"""ChatGLM2, ChatGLM3 and GLM-4 (remote code) in MindSpore Transformers.

Facts: see `mindformers`; split q, k, v, split MLP and the rearranged rotary embedding r1.4.0-beta2 (b3fcd1b), which permutes rows on the
way back whether the option was on or not; these rules do when it is. That script reads the options from its YAML file.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.recipe import Option, Recipe, Rule, from_config
from streamconv.recipes.mindspore.mindformers import HF, LAYER_COUNT, MS, REFERENCE, TRAINING, both_ways, linear

_LAYER = "transformer.encoder.layers.{i}"
_QKV, _PARTS = f"{_LAYER}.self_attention.query_key_value", f"{_LAYER}.self_attention.{{wq,wk,wv}}"
_MLP, _HALVES = f"{_LAYER}.mlp.dense_h_to_4h", f"{_LAYER}.mlp.{{dense_left,dense_right}}"

_GROUPS = "(multi_query_group_num if multi_query_attention else num_attention_heads)"
_ROWS = "(q + k + k) ..."
_HEADS, _EVEN_FIRST = "(h e two + g e two + g e two) ...", ("(h two e)", "(g two e)", "(g e two)")


def _flag(help: str, what: str) -> Option:  # noqa: A002 - the field's name
    """A yes or no that a config says, the source's or else that of the target's folder."""
    return Option(help, default=f"{{config.{what} if config else sidecar.{what}}}", kind="bool")


def _reorder(left: str, right: str, layout: str, when: str) -> tuple[Rule, ...]:
    """A linear layer whose rows are reordered or belong to several layers."""
    return (
        Rule(f"{left}.weight", f"{right}.weight", layout, when=when),
        Rule(f"{left}.bias", f"{right}.bias", layout, when=when, optional=True),
    )


_GLM = Recipe(
    name="glm-n-hf2ms",
    summary="ChatGLM2, ChatGLM3, GLM-4: Hugging Face to MindSpore",
    rules=(
        Rule("transformer.embedding.word_embeddings.weight", "transformer.embedding.embedding_weight"),
        *(
            Rule(name, name, optional=optional)
            for name, optional in (
                (f"{_LAYER}.{{input,post_attention}}_layernorm.weight", False),
                (f"{_LAYER}.{{input,post_attention}}_layernorm.bias", True),
                ("transformer.encoder.final_layernorm.weight", False),
                ("transformer.encoder.final_layernorm.bias", True),
                ("transformer.output_layer.weight", False),
                ("transformer.output_layer.bias", True),
                # MindSpore's model computes it; the reference keeps it.
                ("transformer.rotary_pos_emb.inv_freq", True),
            )
        ),
        *linear(f"{_LAYER}.{{part:self_attention.dense,mlp.dense_4h_to_h}}", f"{_LAYER}.{{part:self_attention.dense,mlp.dense_4h_to_h}}"),
        *linear(_QKV, _QKV, when="qkv_concat and not use_rearrange_rope"),
        *_reorder(_QKV, _PARTS, f"{_ROWS} -> q ..., k ..., k ...", "not qkv_concat and not use_rearrange_rope"),
        *_reorder(_QKV, _QKV, f"{_HEADS} -> ({' + '.join(part[1:-1] for part in _EVEN_FIRST)}) ...", "qkv_concat and use_rearrange_rope"),
        *_reorder(_QKV, _PARTS, f"{_HEADS} -> {', '.join(f'{part} ...' for part in _EVEN_FIRST)}", "not qkv_concat and use_rearrange_rope"),
        *linear(_MLP, _MLP, when="mlp_concat"),
        *_reorder(_MLP, _HALVES, "(f + f) ... -> f ..., f ...", "not mlp_concat"),
        *TRAINING,
    ),
    dims={
        **LAYER_COUNT,
        "q": "=num_attention_heads * kv_channels",
        "k": f"={_GROUPS} * kv_channels",
        "h": "=num_attention_heads",
        "g": f"={_GROUPS}",
        "e": "=kv_channels // 2",
        "two": 2,
        "f": "=ffn_hidden_size",
    },
    options={
        "qkv_concat": _flag("whether MindSpore's model has q, k, v in one", "qkv_concat != False"),
        "mlp_concat": _flag("whether MindSpore's model has both halves of dense_h_to_4h in one", "mlp_concat != False"),
        "use_rearrange_rope": _flag("whether MindSpore's model has even rows of each q and k head first", "use_rearrange_rope == True"),
        **from_config(num_attention_heads="num_attention_heads num_heads", kv_channels="kv_channels", ffn_hidden_size="ffn_hidden_size"),
        "multi_query_attention": _flag("whether heads share k and v", "multi_query_attention == True"),
        **from_config(multi_query_group_num="multi_query_group_num"),
    },
    left=HF,
    right=replace(MS, aliases=(("transformer.embedding.embedding_table", "transformer.embedding.embedding_weight"),)),
    reference=REFERENCE.format("models/glm2"),
)

RECIPES = both_ways(_GLM)
