"""CogVLM and CogAgent: Hugging Face layout <-> SwissArmyTransformer, whose model classes are those of THUDM/CogVLM.

Facts: ``utils/models/cogvlm_model.py`` and ``mixin.py`` of THUDM/CogVLM at f7283b2, and the published ``modeling_cogvlm.py`` and
``visual.py`` of the Hugging Face side, for CogAgent ``modeling_cogagent.py`` and ``cross_visual.py``, which is ``eva_clip_L_hf.py`` of the
SAT side. No script is known for either direction; names were paired by what the two models compute. Of CogVLM2 no SAT model is
published, so there is no recipe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamconv.recipe import Drop, Model, Rule, from_config
from streamconv.recipes.sat.partition import COMPUTED, KIND, TEXT_KEYS, Config, inv_freq, pair

_HF, _SAT = "model.layers.{i}", "transformer.layers.{i}"
_EVA, _VIT = "model.vision", "mixins.eva.vit_model"
_LAYER, _OWN = f"{_EVA}.transformer.layers.{{m}}", f"{_VIT}.transformer.layers.{{m}}"
_EMBEDDED = (
    Rule("model.embed_tokens.weight", "transformer.word_embeddings.weight"),
    Rule("model.norm.weight", "transformer.final_layernorm.weight"),
    Rule("lm_head.weight", "mixins.lm.lm_head.weight"),
    Rule(f"{_HF}.{{input,post_attention}}_layernorm.weight", f"{_SAT}.{{input,post_attention}}_layernorm.weight"),
)
_EXPERTS = (
    Rule(
        f"{_HF}.self_attn.language_expert_{{query_key_value,dense}}.weight",
        f"{_SAT}.attention.{{query_key_value,dense}}.weight",
    ),
    Rule(
        f"{_HF}.self_attn.vision_expert_{{query_key_value,dense}}.weight",
        "mixins.rotary.vision_{query_key_value,dense}_list.{i}.weight",
    ),
    Rule(f"{_HF}.mlp.language_mlp.{{up,down}}_proj.weight", f"{_SAT}.mlp.{{dense_h_to_4h,dense_4h_to_h}}.weight"),
    Rule(f"{_HF}.mlp.language_mlp.gate_proj.weight", "mixins.mlp.gate_proj.{i}.weight"),
    Rule(f"{_HF}.mlp.vision_mlp.{{up,down}}_proj.weight", "mixins.mlp.vision_{dense_h_to_4h,dense_4h_to_h}_list.{i}.weight"),
    Rule(f"{_HF}.mlp.vision_mlp.gate_proj.weight", "mixins.mlp.vision_gate_proj.{i}.weight"),
    Drop(f"{_HF}.self_attn.rotary_emb.inv_freq", COMPUTED),
    inv_freq("mixins.rotary.rotary_emb.inv_freq", "hidden_size / num_attention_heads", like="model.embed_tokens.weight"),
)
_TOWER = (
    Rule(f"{_EVA}.{{boi,eoi}}", "mixins.eva.{boi,eoi}"),
    Rule(f"{_EVA}.patch_embedding.proj.{KIND}", f"{_VIT}.mixins.patch_embedding.proj.{KIND}"),
    Rule(f"{_EVA}.patch_embedding.cls_embedding", f"{_VIT}.transformer.word_embeddings.weight"),
    Rule(f"{_EVA}.patch_embedding.position_embedding.weight", f"{_VIT}.transformer.position_embeddings.weight"),
    Rule(f"{_LAYER}.{{input,post_attention}}_layernorm.{KIND}", f"{_OWN}.{{input,post_attention}}_layernorm.{KIND}"),
    Rule(f"{_LAYER}.attention.{{query_key_value,dense}}.{KIND}", f"{_OWN}.attention.{{query_key_value,dense}}.{KIND}"),
    Rule(f"{_LAYER}.mlp.{{fc1,fc2}}.{KIND}", f"{_OWN}.mlp.{{dense_h_to_4h,dense_4h_to_h}}.{KIND}"),
    Rule(
        f"{_EVA}.linear_proj.{{part:linear_proj,dense_h_to_4h,gate_proj,dense_4h_to_h}}.weight",
        "mixins.eva.linear_proj.{part:linear_proj,dense_h_to_4h,gate_proj,dense_4h_to_h}.weight",
    ),
    Rule(f"{_EVA}.linear_proj.norm1.{KIND}", f"mixins.eva.linear_proj.norm1.{KIND}"),
)

_SIZES = from_config(hidden_size="hidden_size", num_attention_heads="num_attention_heads")
_FEW_LAYERS = {
    "(num_hidden_layers or num_layers or 0) <= 32": "SAT's model has vision experts in its first 32 layers only, this one has more layers",
}
_LANGUAGE = {
    **TEXT_KEYS,
    "layernorm_epsilon": "rms_norm_eps",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_EVA_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "max_sequence_length": "num_positions",
    "inner_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layer_norm_eps",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_EVA_FIXED = {
    "vocab_size": 1, "layernorm_order": "post", "use_final_layernorm": False, "row_parallel_linear_final_bias": False, "pre_len": 1,
    "post_len": 0,
}  # fmt: skip
_COGVLM = Config(
    "CogVLMModel",
    {**_LANGUAGE, **{f"eva_args.{key}": f"vision_config.{other}" for key, other in _EVA_KEYS.items()}},
    {"layernorm_order": "pre", "use_bias": False, **{f"eva_args.{key}": value for key, value in _EVA_FIXED.items()}},
    {
        "architectures": ["CogVLMForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "vision_config.hidden_act": "gelu",
        "vision_config.dropout_prob": 0.0,
    },
)


def _image_length(files: dict[str, Any], model: Model) -> dict[str, Any]:
    """model_config.json with how many positions of the text an image takes."""
    if files and not model.sidecar:
        files["model_config.json"]["image_length"] = model.config["vision_config"]["num_positions"] - 1
    return files


def cogvlm_sat(model: Model) -> dict[str, Any]:
    """model_config.json of CogVLM."""
    return _image_length(_COGVLM.to_sat(model), model)


# CogAgent: CogVLM with positions of its own for the image's features, and a second tower for large images, to which every layer attends.
_CROSS = (
    Rule("model.vision.pos_embed", "mixins.eva.pos_embed"),
    Rule("model.cross_vision.{rest*}", "mixins.encoder.{rest*}"),
    Rule(f"{_HF}.cross_attn.{{query,key_value,dense}}.weight", f"{_SAT}.cross_attention.{{query,key_value,dense}}.weight"),
    Rule(f"{_HF}.post_cross_attention_layernorm.weight", f"{_SAT}.post_cross_attention_layernorm.weight"),
)
_COGAGENT = replace(
    _COGVLM,
    model_class="CogAgentModel",
    keys={**_COGVLM.keys, "cross_attn_hidden_size": "cross_hidden_size", "cross_image_pix": "cross_image_size"},
    fixed={**_COGVLM.fixed, "is_decoder": True},
    other={**_COGVLM.other, "architectures": ["CogAgentForCausalLM"]},
)


def cogagent_sat(model: Model) -> dict[str, Any]:
    """model_config.json, which says how wide a head of the cross-attention is."""
    files = _image_length(_COGAGENT.to_sat(model), model)
    if files and not model.sidecar:
        width, heads = model.config["cross_compute_hidden_size"], model.config["num_attention_heads"]
        files["model_config.json"]["cross_hidden_size_per_attention_head"] = width // heads
    return files


def cogagent_hf(model: Model) -> dict[str, Any]:
    """config.json, which says how wide the cross-attention is."""
    files = _COGAGENT.to_hf(model)
    if files:
        width = model.config.get("cross_hidden_size_per_attention_head") or 0
        files["config.json"]["cross_compute_hidden_size"] = width * model.config["num_attention_heads"] or model.config["hidden_size"]
    return files


_REFERENCE = "THUDM/CogVLM f7283b2 utils/models, and modeling_{}.py and visual.py published with the checkpoints"
RECIPES = (
    *pair(
        "cogvlm",
        "CogVLM",
        (*_EMBEDDED, *_EXPERTS, *_TOWER),
        options=_SIZES,
        requires=_FEW_LAYERS,
        writes=(cogvlm_sat, _COGVLM.to_hf),
        reference=_REFERENCE.format("cogvlm"),
    ),
    *pair(
        "cogagent",
        "CogAgent",
        (*_EMBEDDED, *_EXPERTS, *_TOWER, *_CROSS),
        options=_SIZES,
        requires=_FEW_LAYERS,
        writes=(cogagent_sat, cogagent_hf),
        reference=_REFERENCE.format("cogagent"),
    ),
)
