"""ViT, DeiT, CaiT, MAE, YOLOS, CLIP and EVA-02: Hugging Face or original layout <-> SwissArmyTransformer.

Facts: ``examples/{vit,deit,cait,mae,yolos,clip,eva2}/transform_param.py`` and the models in ``sat/model/official``. All but CLIP's start
from original names (timm's, or those of the papers' code); transformers' names are paired with those by its own conversion scripts.
No script goes back; these are the inverses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.recipe import Drop, Fact, Make, Model, Option, Rule, Side
from streamconv.recipes.sat.partition import COMPUTED, KIND, Config, pair

_NORMS = "{input,post_attention}_layernorm"
_DENSE = "dense_h_to_4h,dense_4h_to_h"
_FUSE = "h ..., h ..., h ... -> (h + h + h) ..."
_FIRST = "1 t c -> t c"  # the axis of the batch, which SAT's embeddings do not have


def _where(names: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules for sources with ``names``."""
    return tuple(replace(rule, when=f"names == '{names}'") for rule in rules)


def _block(left: str, right: str) -> tuple[Rule, ...]:
    """A layer with timm's names."""
    return (
        Rule(f"{left}.norm{{1,2}}.{KIND}", f"{right}.{_NORMS}.{KIND}"),
        Rule(f"{left}.attn.{{qkv,proj}}.{KIND}", f"{right}.attention.{{query_key_value,dense}}.{KIND}"),
        Rule(f"{left}.mlp.{{fc1,fc2}}.{KIND}", f"{right}.mlp.{{{_DENSE}}}.{KIND}"),
    )


def _layer(left: str, right: str) -> tuple[Rule, ...]:
    """A layer with transformers' names."""
    return (
        Rule(f"{left}.layernorm_{{before,after}}.{KIND}", f"{right}.{_NORMS}.{KIND}"),
        Rule(f"{left}.attention.attention.{{query,key,value}}.{KIND}", f"{right}.attention.query_key_value.{KIND}", _FUSE),
        Rule(f"{left}.attention.output.dense.{KIND}", f"{right}.attention.dense.{KIND}"),
        Rule(f"{left}.{{intermediate,output}}.dense.{KIND}", f"{right}.mlp.{{{_DENSE}}}.{KIND}"),
    )


def _original(right: str, left: str = "", words: Rule | None = None) -> tuple[Rule, ...]:
    """A model with original names, below ``right`` in SAT's; its words are the class token unless a rule says otherwise."""
    return (
        words or Rule(f"{left}cls_token", f"{right}transformer.word_embeddings.weight", _FIRST),
        Rule(f"{left}pos_embed", f"{right}transformer.position_embeddings.weight", _FIRST),
        Rule(f"{left}patch_embed.proj.{KIND}", f"{right}mixins.patch_embedding.proj.{KIND}"),
        Rule(f"{left}norm.{KIND}", f"{right}transformer.final_layernorm.{KIND}"),
        *_block(f"{left}blocks.{{i}}", f"{right}transformer.layers.{{i}}"),
    )


def _transformers(right: str, words: Rule | None = None) -> tuple[Rule, ...]:
    """The same with transformers' names."""
    return (
        words or Rule("vit.embeddings.cls_token", f"{right}transformer.word_embeddings.weight", _FIRST),
        Rule("vit.embeddings.position_embeddings", f"{right}transformer.position_embeddings.weight", _FIRST),
        Rule(f"vit.embeddings.patch_embeddings.projection.{KIND}", f"{right}mixins.patch_embedding.proj.{KIND}"),
        Rule(f"vit.layernorm.{KIND}", f"{right}transformer.final_layernorm.{KIND}"),
        *_layer("vit.encoder.layer.{i}", f"{right}transformer.layers.{{i}}"),
    )


def _names(original: str) -> dict[str, Option]:
    return {
        "names": Option(
            "whose names the other side's tensors have: transformers', or those of timm or the paper's code",
            f"{{config.source_names or ('original' if has('{original}') else 'transformers')}}",
            ("transformers", "original"),
        )
    }


_VIT: tuple[Fact, ...] = (
    *_where("original", *_original(""), Rule(f"head.{KIND}", f"mixins.cls.classifier.{KIND}")),
    *_where("transformers", *_transformers(""), Rule(f"classifier.{KIND}", f"mixins.cls.classifier.{KIND}")),
    Drop(f"vit.pooler.dense.{KIND}", "SAT's model has no pooler"),
)

# CaiT: its encoder's class token is not looked at, its decoder's self-attention and positions neither: SAT's model has them all the same.
_TOKEN, _DECODER = "blocks_token_only.{i}", "decoder.transformer.layers.{i}"
_CAIT: tuple[Fact, ...] = (
    Rule("cls_token", "decoder.transformer.word_embeddings.weight", _FIRST),
    Rule("pos_embed", "encoder.transformer.position_embeddings.weight", _FIRST),
    Rule(f"patch_embed.proj.{KIND}", f"encoder.mixins.patch_embedding.proj.{KIND}"),
    *_block("blocks.{i}", "encoder.transformer.layers.{i}"),
    Rule(f"blocks.{{i}}.attn.{{proj_l,proj_w}}.{KIND}", f"encoder.mixins.attn.{{proj_l,proj_w}}.{{i}}.{KIND}"),
    Rule("blocks.{i}.{gamma_1,gamma_2}", "encoder.mixins.enc_forward.{gamma_1,gamma_2}.{i}"),
    Rule(f"{_TOKEN}.norm1.{KIND}", f"{_DECODER}.input_layernorm.{KIND}"),
    Rule(f"{_TOKEN}.norm2.{KIND}", f"{_DECODER}.post_cross_attention_layernorm.{KIND}"),
    Rule(f"{_TOKEN}.attn.{{q,proj}}.{KIND}", f"{_DECODER}.cross_attention.{{query,dense}}.{KIND}"),
    Rule(f"{_TOKEN}.attn.{{k,v}}.{KIND}", f"{_DECODER}.cross_attention.key_value.{KIND}", "h ..., h ... -> (h + h) ..."),
    Rule(f"{_TOKEN}.mlp.{{fc1,fc2}}.{KIND}", f"{_DECODER}.mlp.{{{_DENSE}}}.{KIND}"),
    Rule(f"{_TOKEN}.{{gamma_1,gamma_2}}", "decoder.mixins.dec_forward.{gamma_1,gamma_2}.{i}"),
    Rule(f"norm.{KIND}", f"decoder.transformer.final_layernorm.{KIND}"),
    Rule(f"head.{KIND}", f"decoder.mixins.cls.classifier.{KIND}"),
)
_POSITIONS, _WORDS = "encoder.transformer.position_embeddings.weight", "decoder.transformer.word_embeddings.weight"


def _idle(name: str, size: str, rows: str | int = 0) -> Make:
    """A tensor that SAT's model has and does not use."""
    return Make(
        name,
        "the model does not use it",
        op={"op": "zeros", "size": size, "rows": rows, "like": f"'{_WORDS}'"},
        dims={"i": f"count('{_DECODER}.input_layernorm.weight')"},
    )


_WIDTH = f"shape('{_POSITIONS}')[1]"
_CAIT_IDLE: tuple[Fact, ...] = (
    Rule("{name*}", "{name*}", fallback=True),
    Make(
        "encoder.transformer.word_embeddings.weight",
        "the model does not use it",
        op={"op": "same", "tensor": f"'{_WORDS}'"},
    ),
    _idle("decoder.transformer.position_embeddings.weight", _WIDTH, f"shape('{_POSITIONS}')[0]"),
    _idle(f"{_DECODER}.attention.query_key_value.weight", _WIDTH, f"3 * {_WIDTH}"),
    _idle(f"{_DECODER}.attention.query_key_value.bias", f"3 * {_WIDTH}"),
    _idle(f"{_DECODER}.attention.dense.weight", _WIDTH, _WIDTH),
    *(
        _idle(f"{_DECODER}.{part}", _WIDTH)
        for part in ("attention.dense.bias", "post_attention_layernorm.weight", "post_attention_layernorm.bias")
    ),
)

_MASKED = "decoder.mixins.mask_forward"
_MAE: tuple[Fact, ...] = (
    *_where(
        "original",
        *_original("encoder."),
        Rule("mask_token", _WORDS, _FIRST),
        Rule("decoder_pos_embed", "decoder.transformer.position_embeddings.weight", _FIRST),
        *_block("decoder_blocks.{i}", _DECODER),
        Rule(f"decoder_norm.{KIND}", f"decoder.transformer.final_layernorm.{KIND}"),
        Rule(f"decoder_{{embed,pred}}.{KIND}", f"{_MASKED}.decoder_{{embed,pred}}.{KIND}"),
    ),
    *_where(
        "transformers",
        *_transformers("encoder."),
        Rule("decoder.mask_token", _WORDS, _FIRST),
        Rule("decoder.decoder_pos_embed", "decoder.transformer.position_embeddings.weight", _FIRST),
        *_layer("decoder.decoder_layers.{i}", _DECODER),
        Rule(f"decoder.decoder_norm.{KIND}", f"decoder.transformer.final_layernorm.{KIND}"),
        Rule(f"decoder.decoder_{{embed,pred}}.{KIND}", f"{_MASKED}.decoder_{{embed,pred}}.{KIND}"),
    ),
)

_WITH_DETECTION = "1 one c, 1 d c -> (one + d) c"
_HEADS = f"layers.{{l}}.{KIND}"
_DETECTION = "mixins.det_head.{class_embed,bbox_embed}"
_YOLOS: tuple[Fact, ...] = (
    *_where(
        "original",
        *_original(
            "", "backbone.", Rule("backbone.{cls,det}_token", "transformer.word_embeddings.weight", _WITH_DETECTION, dims={"one": 1})
        ),
        Rule(f"{{class_embed,bbox_embed}}.{_HEADS}", f"{_DETECTION}.{_HEADS}"),
    ),
    *_where(
        "transformers",
        *_transformers(
            "",
            Rule("vit.embeddings.{cls_token,detection_tokens}", "transformer.word_embeddings.weight", _WITH_DETECTION, dims={"one": 1}),
        ),
        Rule(f"{{class_labels_classifier,bbox_predictor}}.{_HEADS}", f"{_DETECTION}.{_HEADS}"),
    ),
)


def _clip(left: str, right: str) -> tuple[Rule, ...]:
    """The layers of one of CLIP's encoders."""
    left, right = f"{left}.encoder.layers.{{i}}", f"{right}.transformer.layers.{{i}}"
    return (
        Rule(f"{left}.layer_norm{{1,2}}.{KIND}", f"{right}.{_NORMS}.{KIND}"),
        Rule(f"{left}.self_attn.{{q,k,v}}_proj.{KIND}", f"{right}.attention.query_key_value.{KIND}", _FUSE),
        Rule(f"{left}.self_attn.out_proj.{KIND}", f"{right}.attention.dense.{KIND}"),
        Rule(f"{left}.mlp.{{fc1,fc2}}.{KIND}", f"{right}.mlp.{{{_DENSE}}}.{KIND}"),
    )


_CLIP: tuple[Fact, ...] = (
    *_clip("vision_model", "image_encoder"),
    *_clip("text_model", "text_encoder"),
    Rule("vision_model.embeddings.class_embedding", "image_encoder.transformer.word_embeddings.weight", "c -> 1 c"),
    Rule("text_model.embeddings.token_embedding.weight", "text_encoder.transformer.word_embeddings.weight"),
    Rule("{vision,text}_model.embeddings.position_embedding.weight", "{image,text}_encoder.transformer.position_embeddings.weight"),
    Rule("vision_model.embeddings.patch_embedding.weight", "image_encoder.mixins.patch_embedding.proj.weight"),
    Rule(f"vision_model.pre_layrnorm.{KIND}", f"image_encoder.mixins.image_enc.pre_layernorm.{KIND}"),
    Rule(f"vision_model.post_layernorm.{KIND}", f"image_encoder.transformer.final_layernorm.{KIND}"),
    Rule(f"text_model.final_layer_norm.{KIND}", f"text_encoder.transformer.final_layernorm.{KIND}"),
    Rule("visual_projection.weight", "image_encoder.mixins.image_enc.visual_projection.weight"),
    Rule("text_projection.weight", "text_encoder.mixins.text_enc.text_projection.weight"),
    Rule("logit_scale", "logit_scale"),
    Drop("{part:vision,text}_model.embeddings.position_ids", "counts from 0"),
)

# EVA-02's keys have no bias, SAT's do: zeros at first. The tables of the rotary embedding stand in every block again.
_EVA, _OWN = "blocks.{i}", "transformer.layers.{i}"
_EVA_BIAS: tuple[Fact, ...] = (
    Rule("{name*}", "{name*}", fallback=True),
    Make(
        f"{_EVA}.attn.k_bias",
        "keys have no bias there",
        op={"op": "zeros", "size": f"shape('{_EVA}.attn.q_bias')[0]", "like": "'blocks.0.attn.q_bias'"},
        dims={"i": f"count('{_EVA}.attn.q_bias')"},
    ),
    Drop(f"{_EVA}.attn.rope.freqs_{{part:cos,sin}}", COMPUTED),
)
_EVA2: tuple[Fact, ...] = (
    Rule("mask_token", "mixins.patch_embedding.mask_token"),
    Rule("cls_token", "transformer.word_embeddings.weight", _FIRST),
    Rule("pos_embed", "transformer.position_embeddings.weight", _FIRST),
    Rule(f"patch_embed.proj.{KIND}", f"mixins.patch_embedding.proj.{KIND}"),
    Rule(f"norm.{KIND}", f"transformer.final_layernorm.{KIND}"),
    Rule(f"lm_head.{KIND}", f"mixins.eva2-final.lm_head.{KIND}"),
    Rule("rope.freqs_{cos,sin}", "mixins.eva2-attn.rope.freqs_{cos,sin}"),
    Rule(f"{_EVA}.norm{{1,2}}.{KIND}", f"{_OWN}.{_NORMS}.{KIND}"),
    Rule(f"{_EVA}.attn.{{q,k,v}}_proj.weight", f"{_OWN}.attention.query_key_value.weight", _FUSE),
    Rule(f"{_EVA}.attn.{{q,k,v}}_bias", f"{_OWN}.attention.query_key_value.bias", _FUSE),
    Rule(f"{_EVA}.attn.proj.{KIND}", f"{_OWN}.attention.dense.{KIND}"),
    Rule(f"{_EVA}.mlp.{{w1,w3}}.{KIND}", f"{_OWN}.mlp.{{{_DENSE}}}.{KIND}"),
    Rule(f"{_EVA}.mlp.{{w2,ffn_ln}}.{KIND}", f"mixins.eva2-mlp.{{w2,ffn_ln}}.{{i}}.{KIND}"),
)

# Configs -----------------------------------------------------------------------------------------------------------

_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layer_norm_eps",
    "in_channels": "num_channels",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_FIXED = {"vocab_size": 1, "layernorm_order": "pre", "pre_len": 1, "post_len": 0, "in_channels": 3}
_VIT_CONFIG = Config("ViTModel", _KEYS, _FIXED, {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_act": "gelu"})
_MAE_CONFIG = Config(
    "MAE",
    {
        **_KEYS,
        "dec_num_layers": "decoder_num_hidden_layers",
        "dec_hidden_size": "decoder_hidden_size",
        "dec_num_attention_heads": "decoder_num_attention_heads",
        "dec_inner_hidden_size": "decoder_intermediate_size",
    },
    _FIXED,
    {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "hidden_act": "gelu"},
)
_YOLOS_CONFIG = Config(
    "YOLOS",
    {**_KEYS, "num_det_tokens": "num_detection_tokens"},
    _FIXED,
    {"architectures": ["YolosForObjectDetection"], "model_type": "yolos", "hidden_act": "gelu", "use_mid_position_embeddings": False},
)
_CAIT_CONFIG = Config("CaiT", _KEYS, {**_FIXED, "pre_len": 0}, {"model_type": "cait"})
_EVA_CONFIG = Config("EVA2Model", {**_KEYS, "predict_feature_dim": "predict_feature_dim"}, _FIXED, {"model_type": "eva02"})
_TEXT = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
}
_CLIP_CONFIG = Config(
    "CLIP",
    {
        **{key: f"vision_config.{other}" for key, other in _KEYS.items()},
        **{f"text_{key}": f"text_config.{other}" for key, other in _TEXT.items()},
        "projection_dim": "projection_dim",
        "logit_scale_init_value": "logit_scale_init_value",
    },
    {**_FIXED, "logit_scale_init_value": 2.6592},
    {"architectures": ["CLIPModel"], "model_type": "clip"},
)


def _of_shapes(config: Config, model: Model, sizes: Mapping[str, tuple[str, int]], **more: Any) -> dict[str, Any]:
    """model_config.json with what only shapes say: key -> a tensor and one of its axes; and more."""
    files = config.to_sat(model)
    if files and not model.sidecar:
        specs = {name.partition("/")[2]: spec for name, spec in model.targets.items()}
        lengths = {key: specs[name].shape[axis] for key, (name, axis) in sizes.items() if name in specs}
        files["model_config.json"] |= lengths | more
    return files


def vit_sat(model: Model) -> dict[str, Any]:
    """model_config.json of ViT and DeiT."""
    return _of_shapes(_VIT_CONFIG, model, {"num_classes": ("mixins.cls.classifier.weight", 0)}, source_names=model.options["names"])


def vit_hf(model: Model) -> dict[str, Any]:
    """config.json of ViT and DeiT, with a label for each class."""
    files, classes = _VIT_CONFIG.to_hf(model), model.config.get("num_classes")
    if files and classes:
        labels = {str(number): f"LABEL_{number}" for number in range(classes)}
        files["config.json"] |= {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    return files


def cait_sat(model: Model) -> dict[str, Any]:
    """model_config.json of CaiT."""
    layers = sum(name.endswith(".cross_attention.query.bias") and name.startswith("mp_rank_00") for name in model.targets)
    return _of_shapes(_CAIT_CONFIG, model, {"num_classes": ("decoder.mixins.cls.classifier.weight", 0)}, dec_num_layers=layers)


def mae_sat(model: Model) -> dict[str, Any]:
    """model_config.json of MAE."""
    return _of_shapes(_MAE_CONFIG, model, {}, source_names=model.options["names"])


def yolos_sat(model: Model) -> dict[str, Any]:
    """model_config.json of YOLOS, whose words are a class token and those of detections."""
    words = "transformer.word_embeddings.weight"
    sizes = {"num_det_classes": ("mixins.det_head.class_embed.layers.2.weight", 0), "vocab_size": (words, 0)}
    files = _of_shapes(_YOLOS_CONFIG, model, sizes, source_names=model.options["names"])
    if files and not model.sidecar:
        detections = files["model_config.json"]["vocab_size"] - 1
        files["model_config.json"] |= {"post_len": detections, "num_det_tokens": detections}
    return files


def eva2_sat(model: Model) -> dict[str, Any]:
    """model_config.json of EVA-02."""
    return _of_shapes(_EVA_CONFIG, model, {"predict_feature_dim": ("mixins.eva2-final.lm_head.weight", 0)})


_MODULE = Side(aliases=(("module.{rest*}", "{rest*}"),))
RECIPES = (
    *pair(
        "vit",
        "ViT for classification",
        _VIT,
        options=_names("pos_embed"),
        writes=(vit_sat, vit_hf),
        reference="examples/vit/transform_param.py",
    ),
    *pair(
        "deit",
        "DeiT without a token for distillation",
        _VIT,
        options=_names("pos_embed"),
        writes=(vit_sat, vit_hf),
        reference="examples/deit/transform_param.py",
    ),
    *pair(
        "cait", "CaiT", _CAIT, _CAIT_IDLE, hf=_MODULE, writes=(cait_sat, _CAIT_CONFIG.to_hf), reference="examples/cait/transform_param.py"
    ),
    *pair(
        "mae",
        "MAE",
        _MAE,
        options=_names("pos_embed"),
        hf=Side(aliases=(("decoder.decoder_encoder.layer.{rest*}", "decoder.decoder_layers.{rest*}"),)),
        writes=(mae_sat, _MAE_CONFIG.to_hf),
        reference="examples/mae/transform_param.py",
    ),
    *pair(
        "yolos",
        "YOLOS",
        _YOLOS,
        options=_names("backbone.pos_embed"),
        writes=(yolos_sat, _YOLOS_CONFIG.to_hf),
        reference="examples/yolos/transform_param.py",
    ),
    *pair("clip", "CLIP", _CLIP, writes=(_CLIP_CONFIG.to_sat, _CLIP_CONFIG.to_hf), reference="examples/clip/transform_param.py"),
    *pair(
        "eva2", "EVA-02, pretrained", _EVA_BIAS, _EVA2, writes=(eva2_sat, _EVA_CONFIG.to_hf), reference="examples/eva2/transform_param.py"
    ),
)
