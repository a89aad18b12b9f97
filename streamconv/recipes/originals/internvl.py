"""InternVL: Hugging Face layout <-> InternVL's own ("GitHub") layout.

Facts: ``internvl_chat/tools/internvl_hf2custom.py`` and ``internvl_custom2hf.py`` of OpenGVLab/InternVL at 2410d1d, and
``convert_internvl_weights_to_hf.py`` of transformers 4.57 for InternLM2 text. Where those lose tensors (q/k norms, incomplete
q/k/v, tied heads), these rules do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.recipe import Make, Model, Option, Recipe, Rule, Side, Tie, sparse

_VIT, _OWN = "vision_tower.encoder.layer.{i}", "vision_model.encoder.layers.{i}"
_LM, _LM2 = "language_model.model.layers.{i}", "language_model.model.layers.{i}"
_LLAMA, _INTERNLM2 = "text == 'llama'", "text == 'internlm2'"

_TEXT_CONFIG = "(text_config or llm_config or sidecar.text_config or sidecar.llm_config)"

# Hugging Face: the config's own tie_word_embeddings counts, the text model's where there is none (transformers 4 reads that one).
# InternVL's own: the text model's counts.
_HF = "(sidecar if sidecar.text_config else config if config.text_config else None)"
_HEAD = "(has('language_model.lm_head.weight') or has('language_model.output.weight'))"
_SAYS_TIED = (
    f"(({_HF}.text_config.tie_word_embeddings if {_HF}.tie_word_embeddings == None else {_HF}.tie_word_embeddings) if {_HF} else"
    " (tie_word_embeddings if llm_config.tie_word_embeddings == None else llm_config.tie_word_embeddings)) == True"
)
_SAYS_UNTIED = "config.tie_word_embeddings == False and (text_config or llm_config).tie_word_embeddings != True"

_VISION = (
    Rule("multi_modal_projector.{part:layer_norm,linear_1,linear_2}.{kind:weight,bias}", "mlp1.{part:0,1,3}.{kind:weight,bias}"),
    Rule("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    Rule("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding", optional=True),
    Rule(
        "vision_tower.embeddings.patch_embeddings.projection.{kind:weight,bias}",
        "vision_model.embeddings.patch_embedding.{kind:weight,bias}",
    ),
    # InternVL's own model has neither of these; its tools leave their names as they are.
    Rule("vision_tower.embeddings.mask_token", "vision_tower.embeddings.mask_token", optional=True),
    Rule("vision_tower.layernorm.{kind:weight,bias}", "vision_tower.layernorm.{kind:weight,bias}", optional=True),
    Rule(
        f"{_VIT}.attention.{{q,k,v}}_proj.{{kind:weight,bias}}",
        f"{_OWN}.attn.qkv.{{kind:weight,bias}}",
        "h ..., h ..., h ... -> (h + h + h) ...",
    ),
    Rule(f"{_VIT}.attention.{{q,k}}_norm.{{kind:weight,bias}}", f"{_OWN}.attn.{{q,k}}_norm.{{kind:weight,bias}}", optional=True),
    Rule(f"{_VIT}.attention.projection_layer.{{kind:weight,bias}}", f"{_OWN}.attn.proj.{{kind:weight,bias}}"),
    Rule(f"{_VIT}.layernorm_{{before,after}}.{{kind:weight,bias}}", f"{_OWN}.norm{{1,2}}.{{kind:weight,bias}}"),
    Rule(f"{_VIT}.lambda_{{1,2}}", f"{_OWN}.ls{{1,2}}"),
    Rule(f"{_VIT}.mlp.{{fc1,fc2}}.{{kind:weight,bias}}", f"{_OWN}.mlp.{{fc1,fc2}}.{{kind:weight,bias}}"),
)

_TEXT = (
    Rule("language_model.model.{rest*}", "language_model.model.{rest*}", when=_LLAMA),
    Rule("language_model.lm_head.weight", "language_model.lm_head.weight", when=_LLAMA, optional="tied"),
    Rule("language_model.lm_head.bias", "language_model.lm_head.bias", when=_LLAMA, optional=True),
    Tie(
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        when=f"{_LLAMA} and tied",
    ),
)

_INTERNLM2_TEXT = (
    Rule("language_model.model.embed_tokens.weight", "language_model.model.tok_embeddings.weight", when=_INTERNLM2),
    Rule("language_model.lm_head.weight", "language_model.output.weight", when=_INTERNLM2, optional="tied"),
    Tie(
        "language_model.model.embed_tokens.weight",
        "language_model.output.weight",
        "language_model.model.tok_embeddings.weight",
        when=f"{_INTERNLM2} and tied",
    ),
    Rule("language_model.model.norm.weight", "language_model.model.norm.weight", when=_INTERNLM2),
    Rule(
        f"{_LM}.self_attn.{{q,k,v}}_proj.{{kind:weight,bias}}",
        f"{_LM2}.attention.wqkv.{{kind:weight,bias}}",
        "(g q d) ..., (g d) ..., (g d) ... -> (g (q d + d + d)) ...",
        when=_INTERNLM2,
    ),
    Rule(f"{_LM}.self_attn.o_proj.{{kind:weight,bias}}", f"{_LM2}.attention.wo.{{kind:weight,bias}}", when=_INTERNLM2),
    Rule(f"{_LM}.mlp.{{gate_proj,down_proj,up_proj}}.weight", f"{_LM2}.feed_forward.{{w1,w2,w3}}.weight", when=_INTERNLM2),
    Rule(f"{_LM}.{{input_layernorm,post_attention_layernorm}}.weight", f"{_LM2}.{{attention_norm,ffn_norm}}.weight", when=_INTERNLM2),
    Make(f"{_LM2}.attention.rotary_emb.inv_freq", "the model computes it from its config", when=_INTERNLM2),
)

_IN_MEMORY = (
    ("model.language_model.{rest*}", "language_model.model.{rest*}"),
    ("lm_head.weight", "language_model.lm_head.weight"),
    ("model.vision_tower.{rest*}", "vision_tower.{rest*}"),
    ("model.multi_modal_projector.{rest*}", "multi_modal_projector.{rest*}"),
)

_UNUSED_TEXT_KEYS = {
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bias", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "moe_config", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torchscript", "torch_dtype", "transformers_version", "typical_p", "use_bfloat16",
}  # fmt: skip
_VISION_KEYS = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "num_channels": "num_channels", "patch_size": "patch_size", "image_size": "image_size",
    "hidden_act": "hidden_act", "layer_norm_eps": "layer_norm_eps", "norm_type": "norm_type", "initializer_range": "initializer_range",
    "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "attention_dropout": "attention_dropout",
}  # fmt: skip
_IMAGE_TOKEN = {"llama": 92546, "qwen2": 151667}


def hf_files(model: Model) -> dict[str, Any]:
    """config.json of the Hugging Face model for InternVL's own, by the table of transformers' script, unless there is one."""
    config, options = model.config, model.options
    text, vision = config.get("llm_config"), config.get("vision_config")
    if model.sidecar or not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        return {}
    internlm2 = options["text"] == "internlm2"
    own_text = {key: value for key, value in text.items() if key not in _UNUSED_TEXT_KEYS}
    own_text["model_type"] = "llama" if internlm2 else text.get("model_type", "qwen2")
    if internlm2:
        own_text["architectures"] = ["LlamaForCausalLM"]
    own_text |= {"use_cache": True, "tie_word_embeddings": bool(options["tied"])}
    own_vision = {new: vision[old] for old, new in _VISION_KEYS.items() if vision.get(old) is not None}
    own_vision |= {key: [own_vision[key]] * 2 for key in ("patch_size", "image_size") if isinstance(own_vision.get(key), int)}
    own_vision |= {"model_type": "internvl_vision", "use_absolute_position_embeddings": True}
    ratio = config.get("downsample_ratio", 0.5)
    size, patch = (own_vision.get(key, [default])[0] for key, default in (("image_size", 448), ("patch_size", 14)))
    dtype = config.get("dtype") or config.get("torch_dtype")
    own = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": ratio,
        "image_seq_length": round((size // patch) ** 2 * ratio**2) if config.get("force_image_size") else 256,
        "image_token_id": _IMAGE_TOKEN["llama" if own_text["model_type"] == "llama" else "qwen2"],
        "projector_hidden_act": "gelu",
        "text_config": own_text,
        "tie_word_embeddings": bool(options["tied"]),
        "vision_config": own_vision,
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        **({"dtype": dtype} if dtype else {}),
    }
    return {"config.json": own}


_HF2CUSTOM = Recipe(
    name="internvl-hf2custom",
    summary="InternVL: Hugging Face layout to InternVL's own, q, k, v of the vision tower fused",
    rules=sparse(*_VISION, *_TEXT, *_INTERNLM2_TEXT),
    dims={
        "g": f"{_TEXT_CONFIG}.num_key_value_heads",
        "d": f"{_TEXT_CONFIG}.head_dim or {_TEXT_CONFIG}.hidden_size // {_TEXT_CONFIG}.num_attention_heads",
    },
    options={
        "text": Option(
            "names of the text model in InternVL's own layout",
            default="{'internlm2' if has('language_model.model.tok_embeddings.weight')"
            " or 'InternLM2ForCausalLM' in (sidecar.llm_config.architectures or llm_config.architectures) else 'llama'}",
            choices=("llama", "internlm2"),
        ),
        "tied": Option(
            "whether the Hugging Face side stores the embedding for the head too",
            default=f"{{{_SAYS_TIED} if {_HEAD} else not ({_SAYS_UNTIED})}}",
            kind="bool",
        ),
    },
    reference="OpenGVLab/InternVL 2410d1d internvl_{hf2custom,custom2hf}.py; transformers 4.57 convert_internvl_weights_to_hf.py",
    left=Side(aliases=_IN_MEMORY, writes=hf_files),
    right=Side(aliases=(("language_model.model.lm_head.weight", "language_model.lm_head.weight"),)),
)

RECIPES = (
    _HF2CUSTOM,
    _HF2CUSTOM.inverse("internvl-custom2hf", "InternVL: InternVL's own layout to Hugging Face's, q, k, v of the vision tower split"),
)
