"""Small random models of every type that transformers has a mapping for, made from each type's default config."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# What a config's sizes are cut down to, where they are larger; all that must divide one another do.
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 99, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "max_position_embeddings": 64, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "pad_token_id": 0,
    "depth": 2, "embed_dim": 32, "num_heads": 4, "out_hidden_size": 32, "image_size": 28, "patch_size": 14, "d_model": 32,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48, "num_layers": 2, "mlp_dim": 48,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 32, "dim": 32, "n_layers": 2, "n_heads": 4,
    "hidden_dim": 48,
}  # fmt: skip
AUTO = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "OBJECT_DETECTION")
LARGEST = 60_000_000  # parameters
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_vl_moe": {"text_config.hidden_size": 512, "text_config.moe_intermediate_size": [24, 16], "vision_config.hidden_size": 32},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2": {"vision_config.text_hidden_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "text_config.additional_vocab_size": 5},
}
"""What a type needs beside: field of its config, with dots -> value."""
CLASSES = {
    "shieldgemma2": "ShieldGemma2ForImageClassification",
}


class NotBuilt(Exception):
    """A type whose class cannot be built this way, and why."""


def types(transformers: Any) -> dict[str, bool]:
    """Every model type with a mapping -> whether the mapping has a tensor operation."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = _build_checkpoint_conversion_mapping()
    return {kind: any(isinstance(entry, WeightConverter) for entry in found[kind]) for kind in found if kind in transformers.CONFIG_MAPPING}


def nested(config: Any) -> Iterator[Any]:
    """A config and those within it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from nested(value)


def shrink(config: Any) -> Any:
    """Cuts a config's sizes down, and its lists to as many layers as are left."""
    for part in nested(config):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > 2:
            for name, value in list(vars(part).items()):
                if isinstance(value, list) and len(value) == layers:
                    setattr(part, name, value[:2] if len(set(map(str, value[:4]))) < 2 else [value[0], value[-1]])
        for name, size in SIZES.items():
            try:
                now = getattr(part, name, None)
                if isinstance(now, int) and not isinstance(now, bool) and now > size:
                    setattr(part, name, size)
            except Exception:  # noqa: BLE001 - a property that cannot be set, or follows from others
                continue
        if hasattr(part, "stage_names") and isinstance(layers, int):
            part.stage_names = ["stem", *(f"stage{k + 1}" for k in range(part.num_hidden_layers))]
            part._out_features, part._out_indices = part.stage_names[-1:], [len(part.stage_names) - 1]
    return config


def build(transformers: Any, kind: str) -> Any:
    """A small model of that type with random weights.

    Raises:
        NotBuilt: there is no class, or it does not take the config.
    """
    from transformers.models.auto import modeling_auto

    names = [CLASSES.get(kind)]
    names += [getattr(modeling_auto, f"MODEL_FOR_{use}_MAPPING_NAMES").get(kind) for use in AUTO]
    names.append(modeling_auto.MODEL_MAPPING_NAMES.get(kind))
    name = next((name for name in names if name), None)
    if name is None:
        raise NotBuilt("no class of its own")
    try:
        with warnings.catch_warnings(action="ignore"):
            config = shrink(transformers.CONFIG_MAPPING[kind]())
            for path, value in OVERRIDES.get(kind, {}).items():
                *parents, last = path.split(".")
                part = config
                for parent in parents:
                    part = getattr(part, parent)
                setattr(part, last, value)
            found = getattr(transformers, name if isinstance(name, str) else name[0])
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in found(config).parameters())
            torch.manual_seed(0)
            model = found(config).eval() if count <= LARGEST else None
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}") from error
    if model is None:
        raise NotBuilt(f"{count:,} parameters")
    return model


def every_class(transformers: Any, kind: str) -> Iterator[Any]:
    """A small model, with ties, of every class that the library has for that type and that takes the type's default config, cut down."""
    from transformers.models.auto import modeling_auto

    mappings = (
        getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    )
    found = [names if isinstance(names, tuple) else (names,) for mapping in mappings if (names := mapping.get(kind))]
    for name in dict.fromkeys(name for names in found for name in names):
        try:
            with warnings.catch_warnings(action="ignore"):
                config = shrink(transformers.CONFIG_MAPPING[kind]())
                config.tie_word_embeddings = True
                model = getattr(transformers, name)(config)
        except Exception:  # noqa: BLE001 - a config that such a class does not take
            continue
        yield model
