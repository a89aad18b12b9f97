"""Mistral: Mistral's own checkpoints <-> Hugging Face.

Facts: ``models/mistral/convert_mistral_weights_to_hf.py`` of transformers 4.57. Its path for tensors split over ``consolidated.N.pth``
raises as published, and could not take grouped heads; these rules do both as Llama's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamconv.recipe import Model, Option, Recipe, Side
from streamconv.recipes.originals.llama_meta import (
    DIMS,
    HEAD,
    PARTITION,
    RANKS,
    ROPE,
    RULES,
    SILU,
    WIDTH,
    common_config,
    heads,
    ranks,
    rope_theta,
)

CONTEXT = 32768  # tokens; what the script takes where params.json says nothing

CONSOLIDATED = ("consolidated.safetensors", "consolidated.safetensors.index.json", "consolidated{rest*}.safetensors")
"""The weight files, which lie beside those of Hugging Face's form where a repository has both."""

HEAD_DIM = Option(
    "rows of a head in the query, key and value matrices",
    default=f"{{config.head_dim or sidecar.head_dim or {WIDTH} // n_heads}}",
    kind="int",
)
POSITIONS = Option(
    "the longest context, for config.json",
    default=f"{{config.max_seq_len or config.max_position_embeddings or {CONTEXT}}}",
    kind="int",
)
UNSCALED = {
    **SILU,
    f"config.yarn == None and {ROPE} in [None, 'default']": "rope is scaled, which these rules do not bring into the other side's config",
}
TIED = Option(
    "whether the head is the embedding, which Hugging Face's side then stores once; the original repeats it",
    default=f"{{(config.tie_word_embeddings or config.tied_embeddings) == True and not {HEAD}}}",
    kind="bool",
)


def mistral_config(model: Model) -> dict[str, Any]:
    """What config.json takes from a params.json with Mistral's own keys."""
    params, window = model.config, model.config.get("sliding_window")
    return {
        **common_config(model, params["norm_eps"], params.get("rope_theta") or 10000.0),
        "head_dim": model.options["head_dim"],
        "max_position_embeddings": model.options["max_position_embeddings"],
        "sliding_window": None if window is None else int(window),  # some files have a text
    }


def hf_files(model: Model) -> dict[str, Any]:
    """config.json as transformers' script has it, unless there is one, and generation_config.json."""
    if model.sidecar or "norm_eps" not in model.config:
        return {}
    own = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **mistral_config(model),
        "intermediate_size": model.targets["model.layers.0.mlp.gate_proj.weight"].shape[0],
    }
    return {"config.json": own, "generation_config.json": tokens(own)}


def tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The generation_config.json that follows from a config."""
    return {"_from_model_config": True, **{key: config[key] for key in ("bos_token_id", "eos_token_id")}}


def original_params(model: Model, hidden: int) -> dict[str, Any]:
    """params.json with Mistral's own keys; ``hidden`` is the size of a feed-forward layer."""
    vocab, width = model.sources["model.embed_tokens.weight"].shape
    config, options = model.config, model.options
    own = {
        "dim": width,
        "n_layers": sum(name.endswith(".input_layernorm.weight") for name in model.sources),
        "head_dim": options["head_dim"],
        "hidden_dim": hidden,
        "n_heads": options["n_heads"],
        "n_kv_heads": options["n_kv_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": vocab,
        "rope_theta": rope_theta(config),
    }
    own |= {"max_seq_len": options["max_position_embeddings"]} if options["max_position_embeddings"] != CONTEXT else {}
    return own | ({} if config.get("sliding_window") is None else {"sliding_window": config["sliding_window"]})


def original_files(model: Model) -> dict[str, Any]:
    """params.json, unless there is one."""
    if model.sidecar or "rms_norm_eps" not in model.config:
        return {}
    return {"params.json": original_params(model, model.sources["model.layers.0.mlp.gate_proj.weight"].shape[0])}


_MISTRAL = Recipe(
    name="mistral-hf2original",
    summary="Mistral: Hugging Face to Mistral's consolidated.safetensors, or to consolidated.NN.pth for a number of ranks",
    rules=RULES,
    dims={**DIMS, "j": "=head_dim // 2"},
    options={
        **heads(),
        "head_dim": HEAD_DIM,
        **ranks("n_heads * head_dim", default="0", by_rows="False"),
        "max_position_embeddings": POSITIONS,
        "tied": TIED,
    },
    requires=UNSCALED,
    reference="transformers 4.57 models/mistral/convert_mistral_weights_to_hf.py",
    left=Side(writes=hf_files, expects=("tokenizer_config.json",)),
    then=replace(
        PARTITION,
        right=replace(
            RANKS,
            format="safetensors",
            files=CONSOLIDATED,
            stem="consolidated",
            writes=original_files,
        ),
    ),
)

RECIPES = (
    _MISTRAL,
    _MISTRAL.inverse(
        "mistral-original2hf", "Mistral: consolidated safetensors, or consolidated.NN.pth of any number of ranks, to Hugging Face"
    ),
)
