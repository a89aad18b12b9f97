"""ViP-LLaVA: the original checkpoint (a LLaVA with a Llama and a projector of five vision layers) <-> Hugging Face.

Facts: ``models/vipllava/convert_vipllava_weights_to_hf.py`` of transformers 4.47.1. Its ordered substring rules come to the names below.
Embedding and head grow by two tokens, to a multiple of 64 rows; the script overwrites rows from 32000 on whatever the vocabulary
(``--set first_new_row=32000``), and takes the embedding's statistics for the head too, as here.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Drop, Model, Option, Recipe, Rule, Side

_EMBEDDING, _HF_EMBEDDING = "model.embed_tokens.weight", "language_model.model.embed_tokens.weight"

_FROM, _TO = "model.vision_tower.vision_tower.vision_model", "vision_tower.vision_model"
_KIND = "{weight,bias}"
_LAYER = (
    "{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.o_proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj,"
    "input_layernorm,post_attention_layernorm}"
)
_BLOCK = "{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.out_proj,mlp.fc1,mlp.fc2,layer_norm1,layer_norm2}"
_EMBEDDINGS = "{class_embedding,patch_embedding.weight,position_embedding.weight}"
_TOWER = "{part:embeddings,encoder,pre_layrnorm,post_layernorm}.{rest*}"  # transformers 5 has no vision_model around it


_BIASED = (
    "{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj}",
    "self_attn.o_proj",
    "{mlp.gate_proj,mlp.up_proj,mlp.down_proj}",
    "{input_layernorm,post_attention_layernorm}",
)
"""Modules of the text model that have biases together, or none has: the script passes what it has no name for through."""


def _biases(modules: str) -> Rule:
    left = f"model.layers.{{i}}.{modules}.bias"
    return Rule(left, f"language_model.{left}", optional=True)


def _grown(left: str, right: str, stream: int) -> Rule:
    """New rows at the end, like those of the embedding; the way back cuts them off."""
    return Rule(
        left,
        right,
        op={"op": "grow", "rows": "resize_vocab", "first": "first_new_row", "seed": "seed", "stream": stream, "like": f"'{_EMBEDDING}'"},
        undo={"op": "rows", "stop": "vocab_size"},
    )


_TEXT_KEYS = {
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "use_cache",
}  # fmt: skip
_PROCESSOR = {
    "processor_class": "LlavaProcessor", "image_token": "<image>", "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
_IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True, "do_resize": True,
    "resample": 3, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def hf_files(model: Model) -> dict[str, Any]:
    """config.json, and, where there is a tokenizer, that with ``<image>`` and ``<pad>``, and the processor's files."""
    settings = model.sidecar or model.config
    if settings.get("model_type") == "vipllava":  # the target model's own folder has all that
        return {}
    files, (image, pad) = _tokenizer(model)
    vision = _vision(model, settings)
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    if files:
        processor = model.read("processor_config.json") or {**_PROCESSOR, "patch_size": vision["patch_size"]}
        images = {**_IMAGE_PROCESSOR, "size": {"shortest_edge": vision["image_size"]}, "crop_size": size}
        files |= {"processor_config.json": processor, "preprocessor_config.json": model.read("preprocessor_config.json") or images}
    else:
        model.notes.append("no tokenizer and no processor files: --sidecars-from a folder of the text model gives them")
    text = {key: value for key, value in {**settings, **(settings.get("text_config") or {})}.items() if key in _TEXT_KEYS}
    if "num_attention_heads" not in text:
        model.notes.append("config.json is not written: it takes the text model's, beside SRC or by --sidecars-from")
        return files
    rows, hidden = model.targets[_HF_EMBEDDING].shape
    layers = [
        name for name in model.targets if name.startswith("language_model.model.layers.") and name.endswith(".input_layernorm.weight")
    ]
    text |= {
        "model_type": "llama" if "llava" in settings.get("model_type", "llava") else settings["model_type"],
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "vocab_size": rows,
    }
    if text["model_type"] == "llama":
        text |= {key: True for key, module in (("attention_bias", "q_proj"), ("mlp_bias", "up_proj")) if _has_bias(model, module)}
    config = {
        "architectures": ["VipLlavaForConditionalGeneration"],
        "model_type": "vipllava",
        "ignore_index": -100,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_token_index": image,
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "projector_layernorm_eps": 1e-05,
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": model.dtype,
        "vision_config": vision,
        "vision_feature_layers": [-2, -5, -8, -11, 6],
    }
    tokens = {key: text[key] for key in ("bos_token_id", "eos_token_id") if key in text}
    generation = {**(model.read("generation_config.json") or {"_from_model_config": True, **tokens}), "pad_token_id": pad}
    return {**files, "config.json": config, "generation_config.json": generation}


def _has_bias(model: Model, module: str) -> bool:
    """Whether a projection of the text model has one."""
    return any(name.startswith("language_model.model.layers.") and name.endswith(f".{module}.bias") for name in model.targets)


def _vision(model: Model, config: Any) -> dict[str, Any]:
    """The config of the vision tower: what its tensors say, and CLIP's for what they do not."""
    root = "vision_tower.vision_model"
    shapes = {name: spec.shape for name, spec in model.targets.items() if name.startswith(root)}
    hidden, _, patch, _ = shapes[f"{root}.embeddings.patch_embedding.weight"]
    side = round((shapes[f"{root}.embeddings.position_embedding.weight"][0] - 1) ** 0.5)
    return {
        "model_type": "clip_vision_model",
        "num_attention_heads": max(1, hidden // 64),
        "projection_dim": 768,
        **(config.get("vision_config") or {}),
        "hidden_size": hidden,
        "image_size": side * patch,
        "intermediate_size": shapes[f"{root}.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": sum(name.endswith(".layer_norm1.weight") for name in shapes),
        "patch_size": patch,
    }


def _tokenizer(model: Model) -> tuple[dict[str, Any], tuple[int, int]]:
    """The tokenizer's files with ``<image>`` and ``<pad>`` added, and these tokens' numbers."""
    tokenizer, settings = model.read("tokenizer.json"), model.read("tokenizer_config.json")
    inner = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = dict(inner) if isinstance(inner, dict) else {piece[0]: number for number, piece in enumerate(inner)}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    ids |= {token["content"]: int(number) for number, token in settings.get("added_tokens_decoder", {}).items()}
    first = model.options["first_new_row"]
    numbers = {}
    for token in ("<image>", "<pad>"):
        numbers[token] = ids.setdefault(token, max([first - 1, *ids.values()]) + 1)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, Any] = {}
    if tokenizer:
        others = [token for token in tokenizer.get("added_tokens", []) if token["content"] not in numbers]
        files["tokenizer.json"] = {
            **tokenizer,
            "added_tokens": others + [{"id": number, "content": token, **flags} for token, number in numbers.items()],
        }
    if settings:
        decoder = {**settings.get("added_tokens_decoder", {}), **{str(n): {"content": token, **flags} for token, n in numbers.items()}}
        files["tokenizer_config.json"] = {
            **settings, "added_tokens_decoder": decoder, "pad_token": "<pad>", "processor_class": "LlavaProcessor",
            "extra_special_tokens": {"image_token": "<image>"},
        }  # fmt: skip
        files["special_tokens_map.json"] = {**model.read("special_tokens_map.json"), "pad_token": {"content": "<pad>", **flags}}
        del files["special_tokens_map.json"]["pad_token"]["special"]
    return files, (numbers["<image>"], numbers["<pad>"])


_VIPLLAVA = Recipe(
    name="vipllava-original2hf",
    summary="ViP-LLaVA: original checkpoint to Hugging Face, embedding and head with sampled rows for <image>, <pad> and padding",
    rules=(
        _grown(_EMBEDDING, _HF_EMBEDDING, 0),
        _grown("lm_head.weight", "language_model.lm_head.weight", 1),
        Rule(f"model.layers.{{i}}.{_LAYER}.weight", f"language_model.model.layers.{{i}}.{_LAYER}.weight"),
        *(_biases(modules) for modules in _BIASED),
        Rule("model.norm.weight", "language_model.model.norm.weight"),
        Rule(f"{_FROM}.embeddings.{_EMBEDDINGS}", f"{_TO}.embeddings.{_EMBEDDINGS}"),
        Rule(f"{_FROM}.{{pre_layrnorm,post_layernorm}}.{_KIND}", f"{_TO}.{{pre_layrnorm,post_layernorm}}.{_KIND}"),
        Rule(f"{_FROM}.encoder.layers.{{n}}.{_BLOCK}.{_KIND}", f"{_TO}.encoder.layers.{{n}}.{_BLOCK}.{_KIND}"),
        Rule(
            f"model.mm_projector.{{clip_layernorm,final_linear.0,final_linear.2}}.{_KIND}",
            f"multi_modal_projector.{{projector_layernorm,linear_1,linear_2}}.{_KIND}",
        ),
        Drop("{rest*}.inv_freq", "the model computes it from its config"),
        Drop(f"{_FROM}.embeddings.position_ids", "the numbers from 0 on"),
    ),
    options={
        "vocab_size": Option(
            "tokens of the original: rows of its embedding",
            default=f"{{shape('{_EMBEDDING}')[0] or sidecar.vocab_size or config.image_token_index or config.image_token_id}}",
            kind="int",
        ),
        "first_new_row": Option("the first row that is sampled, and the number of <image>", default="{vocab_size}", kind="int"),
        "resize_vocab": Option("rows of the target's embedding and head", default="{(vocab_size + 2 + 63) // 64 * 64}", kind="int"),
        "seed": Option("which random numbers new rows are made of", 0),
    },
    left=Side(
        format="torch",
        aliases=(("model.mm_projector.{n:0,2}.{kind:weight,bias}", "model.mm_projector.final_linear.{n:0,2}.{kind:weight,bias}"),),
    ),
    right=Side(
        aliases=(
            ("model.language_model.{rest*}", "language_model.model.{rest*}"),
            ("lm_head.weight", "language_model.lm_head.weight"),
            ("model.vision_tower.vision_model.{rest*}", "vision_tower.vision_model.{rest*}"),
            (f"model.vision_tower.{_TOWER}", f"vision_tower.vision_model.{_TOWER}"),
            (f"vision_tower.{_TOWER}", f"vision_tower.vision_model.{_TOWER}"),
            ("model.multi_modal_projector.{rest*}", "multi_modal_projector.{rest*}"),
        ),
        writes=hf_files,
    ),
    reference="transformers 4.47.1 convert_vipllava_weights_to_hf.py",
)

RECIPES = (
    _VIPLLAVA,
    _VIPLLAVA.inverse("vipllava-hf2original", "ViP-LLaVA: Hugging Face to the original checkpoint, without the added rows"),
)
