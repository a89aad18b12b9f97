"""ChatGLM, GPT-2, BERT and RoBERTa: Hugging Face layout <-> SwissArmyTransformer.

Facts: ``examples/{chatglm,chatglm2,chatglm3,gpt2,bert,roberta}/transform_param.py`` and the models in ``sat/model/official``. No script
goes back; these are the inverses.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Drop, Make, Model, Option, Rule, Side, Tie, from_config
from streamconv.recipes.sat.partition import COMPUTED, KIND, TEXT_KEYS, Config, inv_freq, pair

_SAT = "transformer.layers.{i}"
_NORMS = "{input,post_attention}_layernorm"
_DENSE = "dense_h_to_4h,dense_4h_to_h"
_HEADS = from_config(hidden_size="hidden_size", num_attention_heads="num_attention_heads")

# ChatGLM -----------------------------------------------------------------------------------------------------------

# The script copies query_key_value as it is, head by head: SAT's model of that time read it so. Since July 2023 (cf2cb8a) the model
# splits it into all queries, all keys and all values, and the script was not touched.
_CHATGLM = (
    Rule("transformer.word_embeddings.weight", "transformer.word_embeddings.weight"),
    Rule(f"transformer.final_layernorm.{KIND}", f"transformer.final_layernorm.{KIND}"),
    Rule("lm_head.weight", "mixins.chatglm-final.lm_head.weight"),
    Rule(f"{_SAT}.{_NORMS}.{KIND}", f"{_SAT}.{_NORMS}.{KIND}"),
    Rule(
        f"{_SAT}.attention.query_key_value.{KIND}",
        f"{_SAT}.attention.query_key_value.{KIND}",
        "(h (d + d + d)) ... -> (h d + h d + h d) ...",
        dims={"h": "num_attention_heads"},
        when="qkv == 'blocks'",
    ),
    Rule(f"{_SAT}.attention.query_key_value.{KIND}", f"{_SAT}.attention.query_key_value.{KIND}", when="qkv == 'heads'"),
    Rule(f"{_SAT}.attention.dense.{KIND}", f"{_SAT}.attention.dense.{KIND}"),
    Rule(f"{_SAT}.mlp.{{{_DENSE}}}.{KIND}", f"{_SAT}.mlp.{{{_DENSE}}}.{KIND}"),
    Drop(f"{_SAT}.attention.rotary_emb.inv_freq", COMPUTED),
    inv_freq("mixins.chatglm-attn.rotary_emb.inv_freq", "hidden_size / num_attention_heads / 2"),
)
_QKV = {
    "qkv": Option(
        "how SAT's model reads queries, keys and values: blocks, since July 2023, or head by head, as before and as its script writes them",
        "blocks",
        ("blocks", "heads"),
    )
}
_GLM_KEYS = {"num_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads"}
_GLM = Config(
    "ChatGLMModel",
    {
        **_GLM_KEYS,
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_sequence_length",
        "inner_hidden_size": "inner_hidden_size",
        "layernorm_epsilon": "layernorm_epsilon",
        "bos_token_id": "bos_token_id",
        "mask_token_id": "mask_token_id",
        "gmask_token_id": "gmask_token_id",
        "pad_token_id": "pad_token_id",
    },
    {"layernorm_order": "post"},
    {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "position_encoding_2d": True},
)

_GLM2 = "transformer.encoder.layers.{i}"
_HALVES = "(a + a) c -> a c, a c"


def _chatglm2(halves: str, base: int | str = 10000) -> tuple[Rule | Drop | Make, ...]:
    """ChatGLM2 and 3; the rows of the wide layer are those of two, ``halves``."""
    return (
        Rule("transformer.embedding.word_embeddings.weight", "transformer.word_embeddings.weight"),
        Rule("transformer.encoder.final_layernorm.weight", "transformer.final_layernorm.weight"),
        Rule("transformer.output_layer.weight", "mixins.chatglm-final.lm_head.weight"),
        Rule(f"{_GLM2}.{_NORMS}.weight", f"{_SAT}.{_NORMS}.weight"),
        Rule(f"{_GLM2}.self_attention.query_key_value.{KIND}", f"{_SAT}.attention.query_key_value.{KIND}"),
        Rule(f"{_GLM2}.self_attention.dense.weight", f"{_SAT}.attention.dense.weight"),
        Rule(f"{_GLM2}.mlp.dense_h_to_4h.weight", f"{_SAT}.mlp.{{{halves}}}.weight", _HALVES, when="not is_gated_mlp"),
        Rule(
            f"{_GLM2}.mlp.dense_h_to_4h.weight",
            f"{_SAT}.mlp.{{dense_h_to_4h_gate,dense_h_to_4h}}.weight",
            _HALVES,
            when="is_gated_mlp",
        ),
        Rule(f"{_GLM2}.mlp.dense_4h_to_h.weight", f"{_SAT}.mlp.dense_4h_to_h.weight"),
        Drop("transformer.rotary_pos_emb.inv_freq", COMPUTED),
        inv_freq(
            "mixins.attn.rotary_pos_emb.inv_freq",
            "hidden_size / num_attention_heads / 2",
            base,
            like="transformer.embedding.word_embeddings.weight",
        ),
    )


# The second half is a mixin of its own, unless the model has gated layers.
_MIXIN = (
    Rule(f"{_SAT}.mlp.w2.weight", "mixins.mlp.w2.{i}.weight", optional=True),
    Rule("{name*}", "{name*}", fallback=True),
)
_GATED = {
    "is_gated_mlp": Option(
        "whether SAT's model has gated layers instead of a mixin for half of them", default="{config.is_gated_mlp == True}", kind="bool"
    )
}
_GLM2_KEYS = {
    **_GLM_KEYS,
    "vocab_size": "padded_vocab_size",
    "max_sequence_length": "seq_length",
    "inner_hidden_size": "ffn_hidden_size",
    "num_multi_query_heads": "multi_query_group_num",
    "layernorm_epsilon": "layernorm_epsilon",
}
_GLM2_FIXED = {"layernorm_order": "pre", "use_bias": False, "use_qkv_bias": True}
_GLM2_OTHER = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}
_CHATGLM2 = Config("ChatGLM2Model", _GLM2_KEYS, _GLM2_FIXED, _GLM2_OTHER)
_CHATGLM3 = Config("ChatGLM3Model", {**_GLM2_KEYS, "base_scale": "rope_ratio"}, {**_GLM2_FIXED, "base_scale": 1.0}, _GLM2_OTHER)


def chatglm2_sat(model: Model) -> dict[str, Any]:
    """model_config.json, which says so where layers are gated."""
    files = _CHATGLM2.to_sat(model)
    if files and model.options["is_gated_mlp"]:
        files["model_config.json"]["is_gated_mlp"] = True
    return files


# GPT-2 -------------------------------------------------------------------------------------------------------------

_GPT2 = "transformer.h.{i}"
TIED = {
    "tie_word_embeddings": Option(
        "whether the Hugging Face side stores the embedding for the head too",
        default="{(sidecar if config.tie_word_embeddings == None else config).tie_word_embeddings != False}",
        kind="bool",
    )
}


def _head(left: str, right: str, embedding: str) -> tuple[Rule | Tie, ...]:
    """The head, which SAT always stores."""
    return (
        Rule(left, right, optional="tie_word_embeddings"),
        Tie(embedding, right, "transformer.word_embeddings.weight", when="tie_word_embeddings"),
    )


_GPT2_RULES = (
    Rule("transformer.wte.weight", "transformer.word_embeddings.weight"),
    Rule("transformer.wpe.weight", "transformer.position_embeddings.weight"),
    Rule(f"transformer.ln_f.{KIND}", f"transformer.final_layernorm.{KIND}"),
    Rule(f"{_GPT2}.{{ln_1,ln_2}}.{KIND}", f"{_SAT}.{_NORMS}.{KIND}"),
    Rule(f"{_GPT2}.attn.{{part:c_attn,c_proj}}.weight", f"{_SAT}.attention.{{part:query_key_value,dense}}.weight", "i o -> o i"),
    Rule(f"{_GPT2}.attn.{{c_attn,c_proj}}.bias", f"{_SAT}.attention.{{query_key_value,dense}}.bias"),
    Rule(f"{_GPT2}.mlp.{{part:c_fc,c_proj}}.weight", f"{_SAT}.mlp.{{part:{_DENSE}}}.weight", "i o -> o i"),
    Rule(f"{_GPT2}.mlp.{{c_fc,c_proj}}.bias", f"{_SAT}.mlp.{{{_DENSE}}}.bias"),
    Drop(f"{_GPT2}.attn.{{buffer:bias,masked_bias}}", "a mask, which the model makes"),
    *_head("lm_head.weight", "mixins.gpt2-final.lm_head.weight", "transformer.wte.weight"),
)
_BARE = (
    ("{part:wte,wpe}.weight", "transformer.{part:wte,wpe}.weight"),
    (f"ln_f.{KIND}", f"transformer.ln_f.{KIND}"),
    ("h.{i}.{rest*}", "transformer.h.{i}.{rest*}"),
)
_GPT2_CONFIG = Config(
    "GPT2Model",
    {
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_sequence_length": "n_positions",
        "inner_hidden_size": "n_inner",
        "layernorm_epsilon": "layer_norm_epsilon",
    },
    {"layernorm_order": "pre"},
    {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"},
)

# BERT, RoBERTa -----------------------------------------------------------------------------------------------------


def _encoder(root: str) -> tuple[Rule | Drop, ...]:
    """The layers of BERT. SAT's norms are those before a layer's parts, so the last of a layer belongs to the next one."""
    layer = f"{root}.encoder.layer.{{i}}"
    return (
        Rule(f"{root}.embeddings.{{word,position}}_embeddings.weight", "transformer.{word,position}_embeddings.weight"),
        Rule(
            f"{layer}.attention.self.{{query,key,value}}.{KIND}",
            f"{_SAT}.attention.query_key_value.{KIND}",
            "h ..., h ..., h ... -> (h + h + h) ...",
        ),
        Rule(f"{layer}.attention.output.dense.{KIND}", f"{_SAT}.attention.dense.{KIND}"),
        Rule(f"{layer}.{{intermediate,output}}.dense.{KIND}", f"{_SAT}.mlp.{{{_DENSE}}}.{KIND}"),
        Rule(f"{root}.embeddings.LayerNorm.{KIND}", f"transformer.layers.0.input_layernorm.{KIND}"),
        Rule(f"{layer}.attention.output.LayerNorm.{KIND}", f"{_SAT}.post_attention_layernorm.{KIND}"),
        Rule(f"{layer}.output.LayerNorm.{KIND}", f"transformer.layers.{{i+1}}.input_layernorm.{KIND}", fallback=True, optional=True),
        Rule(f"{root}.encoder.layer.{{i=num_hidden_layers-1}}.output.LayerNorm.{KIND}", f"transformer.final_layernorm.{KIND}"),
        Drop(f"{root}.embeddings.position_ids", "counts from 0"),
        Drop(f"{root}.pooler.dense.{KIND}", "SAT's model has no pooler"),
    )


_FINAL = "mixins.bert-final.lm_head"
_BERT = (
    *_encoder("bert"),
    Rule("bert.embeddings.token_type_embeddings.weight", "mixins.bert-type.type_embeddings.weight"),
    Rule(f"cls.predictions.transform.dense.{KIND}", f"{_FINAL}.dense.{KIND}"),
    Rule(f"cls.predictions.transform.LayerNorm.{KIND}", f"{_FINAL}.layer_norm.{KIND}"),
    Rule("cls.predictions.bias", f"{_FINAL}.decoder.bias"),
    Drop("cls.predictions.decoder.bias", "repeats cls.predictions.bias"),
    Drop(f"cls.seq_relationship.{KIND}", "SAT's model does not predict the next sentence"),
    *_head("cls.predictions.decoder.weight", f"{_FINAL}.decoder.weight", "bert.embeddings.word_embeddings.weight"),
)
_ROBERTA = (
    *_encoder("roberta"),
    Rule(f"lm_head.dense.{KIND}", f"{_FINAL}.dense.{KIND}"),
    Rule(f"lm_head.layer_norm.{KIND}", f"{_FINAL}.layer_norm.{KIND}"),
    Rule("lm_head.bias", f"{_FINAL}.decoder.bias"),
    Drop("lm_head.decoder.bias", "repeats lm_head.bias"),
    *_head("lm_head.decoder.weight", f"{_FINAL}.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
)
# SAT's RoBERTa has no token types: the published ones have one, of zeros.
_NO_TYPES = Drop(
    "roberta.embeddings.token_type_embeddings.weight",
    "the embedding of the one token type is zero in what RoBERTa publishes",
    op={"op": "zeros", "rows": 1, "size": "hidden_size", "like": "'transformer.word_embeddings.weight'"},
)
_BERT_KEYS = {
    **TEXT_KEYS,
    "layernorm_epsilon": "layer_norm_eps",
}
_POST = {"layernorm_order": "post"}
_BERT_CONFIG = Config(
    "BertModel",
    {**_BERT_KEYS, "num_types": "type_vocab_size"},
    _POST,
    {"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_act": "gelu"},
)
_ROBERTA_CONFIG = Config(
    "RobertaModel",
    _BERT_KEYS,
    {**_POST, "num_types": 0},
    {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "hidden_act": "gelu",
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
)
_LAYERS = {**from_config(num_hidden_layers="num_hidden_layers num_layers", hidden_size="hidden_size"), **TIED}
_OLD_NORMS = (("{p*}.LayerNorm.{kind:gamma,beta}", f"{{p*}}.LayerNorm.{KIND}"),)

RECIPES = (
    *pair(
        "chatglm",
        "ChatGLM",
        _CHATGLM,
        options={**_HEADS, **_QKV},
        writes=(_GLM.to_sat, _GLM.to_hf),
        reference="examples/chatglm/transform_param.py, sat/model/official/chatglm_model.py",
    ),
    *pair(
        "chatglm2",
        "ChatGLM2",
        _chatglm2("dense_h_to_4h,w2"),
        _MIXIN,
        options={**_HEADS, **_GATED},
        writes=(chatglm2_sat, _CHATGLM2.to_hf),
        reference="examples/chatglm2/transform_param.py, transform_param_newmlp.py",
    ),
    *pair(
        "chatglm3",
        "ChatGLM3",
        _chatglm2("w2,dense_h_to_4h", "10000 * (config.rope_ratio or 1)"),
        _MIXIN,
        options=_HEADS,
        writes=(_CHATGLM3.to_sat, _CHATGLM3.to_hf),
        reference="examples/chatglm3/transform_param.py",
    ),
    *pair(
        "gpt2",
        "GPT-2",
        _GPT2_RULES,
        options=TIED,
        hf=Side(aliases=_BARE),
        writes=(_GPT2_CONFIG.to_sat, _GPT2_CONFIG.to_hf),
        reference="examples/gpt2/transform_param.py",
    ),
    *pair(
        "bert",
        "BERT with its head for masked words",
        _BERT,
        options=_LAYERS,
        hf=Side(aliases=_OLD_NORMS),
        writes=(_BERT_CONFIG.to_sat, _BERT_CONFIG.to_hf),
        reference="examples/bert/transform_param.py",
    ),
    *pair(
        "roberta",
        "RoBERTa with its head for masked words",
        (*_ROBERTA, _NO_TYPES),
        options=_LAYERS,
        hf=Side(aliases=_OLD_NORMS),
        writes=(_ROBERTA_CONFIG.to_sat, _ROBERTA_CONFIG.to_hf),
        reference="examples/roberta/transform_param.py",
    ),
)
