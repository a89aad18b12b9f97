"""Deformable DETR: the original PyTorch checkpoint <-> Hugging Face.

Facts: ``models/deformable_detr/convert_deformable_detr_to_pytorch.py`` of transformers 4.57 (a59124e). Its ordered substring rules are
written out name by name; it knows a width of 256 and six decoder layers, these rules any. Names within the backbone are kept.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Model, Option, Recipe, Rule, Side

_KIND = "{weight,bias}"
_ENCODER, _HF_ENCODER = "transformer.encoder.layers.{i}", "model.encoder.layers.{i}"
_DECODER, _HF_DECODER = "transformer.decoder.layers.{k}", "model.decoder.layers.{k}"
_SAMPLING = "{sampling_offsets,attention_weights,value_proj,output_proj}"
_STAGES = "{enc_output,enc_output_norm,pos_trans,pos_trans_norm}"
_BOXES = f"bbox_embed.{{head}}.layers.{{n}}.{_KIND}"
_CLASSES = f"class_embed.{{head}}.{_KIND}"


_RULES = (
    Rule("backbone.0.body.{rest*}", "model.backbone.conv_encoder.model.{rest*}"),
    Rule("transformer.level_embed", "model.level_embed"),
    Rule(f"{_ENCODER}.self_attn.{_SAMPLING}.{_KIND}", f"{_HF_ENCODER}.self_attn.{_SAMPLING}.{_KIND}"),
    Rule(f"{_ENCODER}.norm{{1,2}}.{_KIND}", f"{_HF_ENCODER}.{{self_attn_layer_norm,final_layer_norm}}.{_KIND}"),
    Rule(f"{_ENCODER}.linear{{1,2}}.{_KIND}", f"{_HF_ENCODER}.fc{{1,2}}.{_KIND}"),
    Rule(f"{_DECODER}.cross_attn.{_SAMPLING}.{_KIND}", f"{_HF_DECODER}.encoder_attn.{_SAMPLING}.{_KIND}"),
    Rule(
        f"{_DECODER}.norm{{1,2,3}}.{_KIND}",
        f"{_HF_DECODER}.{{encoder_attn_layer_norm,self_attn_layer_norm,final_layer_norm}}.{_KIND}",
    ),
    Rule(f"{_DECODER}.linear{{1,2}}.{_KIND}", f"{_HF_DECODER}.fc{{1,2}}.{_KIND}"),
    Rule(
        f"{_DECODER}.self_attn.in_proj_{_KIND}",
        f"{_HF_DECODER}.self_attn.{{q,k,v}}_proj.{_KIND}",
        "(h + h + h) ... -> h ..., h ..., h ...",
    ),
    Rule(f"{_DECODER}.self_attn.out_proj.{_KIND}", f"{_HF_DECODER}.self_attn.out_proj.{_KIND}"),
    Rule(f"transformer.reference_points.{_KIND}", f"model.reference_points.{_KIND}", optional=True, sparse=True),
    Rule("query_embed.weight", "model.query_position_embeddings.weight", optional=True),
    Rule(f"input_proj.{{level}}.{{n}}.{_KIND}", f"model.input_proj.{{level}}.{{n}}.{_KIND}", sparse=True),
    # The heads; with refinement the decoder has them too, and transformers saves only those: to both codes they are one.
    Rule(_CLASSES, _CLASSES, optional=True, sparse=True),
    Rule(_BOXES, _BOXES, optional=True, sparse=True),
    Rule(f"transformer.decoder.{_CLASSES}", f"model.decoder.{_CLASSES}", optional=True, sparse=True),
    Rule(f"transformer.decoder.{_BOXES}", f"model.decoder.{_BOXES}", optional=True, sparse=True),
    Rule(f"transformer.{_STAGES}.{_KIND}", f"model.{_STAGES}.{_KIND}", optional=True, sparse=True),
)


def _require_head(name: str, rest: str = "") -> dict[str, str]:
    """That there is a head, at one of the places where it may be."""
    places = [f"has('{root}{name}.{{head}}.{rest}weight')" for root in ("", "transformer.decoder.", "model.decoder.")]
    return {" or ".join(places): f"there is no {name}, without which the model finds nothing: mend the source"}


_HAS_HEADS = {**_require_head("class_embed"), **_require_head("bbox_embed", "layers.{n}.")}

_BACKBONES: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
_PREPROCESSOR = {
    "image_processor_type": "DeformableDetrImageProcessor", "format": "coco_detection", "do_resize": True,
    "size": {"shortest_edge": 800, "longest_edge": 1333}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_pad": True,
}  # fmt: skip


def hf_files(model: Model) -> dict[str, Any]:
    """config.json with the sizes that tensors give, and preprocessor_config.json of COCO; those of the target's folder come first."""
    shapes = {name: spec.shape for name, spec in model.targets.items()}
    processor = {} if model.read("preprocessor_config.json") else {"preprocessor_config.json": _PREPROCESSOR}
    if model.sidecar:
        return processor

    def count(text: str) -> int:
        """How many numbers stand at ``{}`` in names that begin so."""
        before, after = text.split("{}")
        return len({name.removeprefix(before).split(".")[0] for name in shapes if name.startswith(before) and after in name})

    heads, levels = model.options["encoder_attention_heads"], shapes["model.level_embed"][0]
    hidden = shapes["model.level_embed"][1]
    points = {
        part: shapes[f"model.{part}.layers.0.{attention}.attention_weights.bias"][0] // (heads * levels)
        for part, attention in (("encoder", "self_attn"), ("decoder", "encoder_attn"))
    }
    stages = tuple(count(f"model.backbone.conv_encoder.model.layer{n}.{{}}.conv1") for n in (1, 2, 3, 4))
    backbone = _BACKBONES.get(stages)
    labels = next(shape for name, shape in shapes.items() if name.endswith("class_embed.0.weight"))[0]
    two_stage = "model.enc_output.weight" in shapes
    queries = shapes.get("model.query_position_embeddings.weight")
    config = {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        **({"backbone": backbone} if backbone else {}),
        "dilation": model.options["dilation"],
        "d_model": hidden,
        "num_feature_levels": levels,
        "num_queries": queries[0] if queries else 300,
        "with_box_refine": any(name.startswith("model.decoder.bbox_embed.") for name in shapes),
        "two_stage": two_stage,
        "id2label": {str(k): f"LABEL_{k}" for k in range(labels)},
        "label2id": {f"LABEL_{k}": k for k in range(labels)},
        "dtype": model.dtype,
    }
    for part, count_of in points.items():
        config |= {
            f"{part}_layers": count(f"model.{part}.layers.{{}}.fc1.weight"),
            f"{part}_ffn_dim": shapes[f"model.{part}.layers.0.fc1.weight"][0],
            f"{part}_attention_heads": heads,
            f"{part}_n_points": count_of,
        }
    model.notes.append(f"config.json says LABEL_0 to LABEL_{labels - 1}: the checkpoint does not name its classes; edit id2label")
    if not backbone:
        model.notes.append(f"config.json names no backbone: stages of {stages} blocks are none of {', '.join(_BACKBONES.values())}; add it")
    return {"config.json": config, **processor}


_DETR = Recipe(
    name="deformable-detr-original2hf",
    summary="Deformable DETR: original PyTorch checkpoint to Hugging Face, in_proj of the decoder split into q, k, v",
    rules=_RULES,
    requires=_HAS_HEADS,
    options={
        "encoder_attention_heads": Option(
            "attention heads, which tensors do not tell: the published models have 8",
            default="{config.encoder_attention_heads or 8}",
            kind="int",
        ),
        "dilation": Option("whether the backbone's last stage is dilated (DC5), which tensors do not tell", default=False),
    },
    left=Side(format="torch", root="model", stem="checkpoint.pth"),
    right=Side(writes=hf_files),
    reference="transformers 4.57 (a59124e) convert_deformable_detr_to_pytorch.py",
)

RECIPES = (
    _DETR,
    _DETR.inverse("deformable-detr-hf2original", "Deformable DETR: Hugging Face to the original PyTorch checkpoint, q, k, v fused"),
)
