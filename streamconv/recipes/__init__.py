"""The recipes that come along, and those that other packages and recipe files add.

A module here is declarations only: a tuple ``RECIPES``. Another package adds recipes by the entry-point group
``streamconv.recipes``, each entry a `Recipe` or a tuple of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from streamconv.recipe.registry import Registry

__all__ = ["REGISTRY", "find_writer", "get", "is_named", "list_names", "load", "match", "registry", "select"]

REGISTRY = Registry(
    __name__,
    {
        "mindspore.blocks": "bloom-hf2ms bloom-ms2hf wizardcoder-hf2ms wizardcoder-ms2hf vit-hf2ms vit-ms2hf mae-hf2ms mae-ms2hf",
        "mindspore.cogvlm2": "cogvlm2-hf2ms cogvlm2-ms2hf",
        "mindspore.deepseek3": "deepseek3-hf2ms deepseek3-ms2hf",
        "mindspore.glm": "glm-n-hf2ms glm-n-ms2hf",
        "mindspore.glm1": "glm-hf2ms glm-ms2hf codegeex2-hf2ms codegeex2-ms2hf",
        "mindspore.gpt": "gpt-hf2ms gpt-ms2hf",
        "mindspore.llama": (
            "llama-hf2ms llama-ms2hf yi-hf2ms yi-ms2hf deepseek-hf2ms deepseek-ms2hf internlm-hf2ms internlm-ms2hf baichuan2-hf2ms "
            "baichuan2-ms2hf internlm2-hf2ms internlm2-ms2hf mixtral-hf2ms mixtral-ms2hf qwen2_5-hf2ms qwen2_5-ms2hf llama-ms-fuse "
            "llama-ms-unfuse qwen2_5-ms-fuse qwen2_5-ms-unfuse"
        ),
        "mindspore.qwen": "qwen-hf2ms qwen-ms2hf qwenvl-hf2ms qwenvl-ms2hf",
        "mindspore.swin": "swin-hf2ms swin-ms2hf",
        "mindspore.telechat": (
            "telechat-hf2ms telechat-ms2hf telechat2-hf2ms telechat2-ms2hf telechat3-hf2ms telechat3-ms2hf telechat2-ms-fuse "
            "telechat2-ms-unfuse"
        ),
        "mindspore.whisper": "whisper-hf2ms whisper-ms2hf",
        "originals.deepseek": "deepseek3-hf2mp deepseek3-mp2hf",
        "originals.deformable_detr": "deformable-detr-original2hf deformable-detr-hf2original",
        "originals.gemma": "gemma-original2hf gemma-hf2original",
        "originals.gguf": "gguf-gguf2hf",
        "originals.internvl": "internvl-hf2custom internvl-custom2hf",
        "originals.llama_meta": "llama-hf2meta llama-meta2hf",
        "originals.mcore": "mcore-hf2gpt mcore-gpt2hf",
        "originals.mistral": "mistral-hf2original mistral-original2hf",
        "originals.mixtral": "mixtral-hf2original mixtral-original2hf",
        "originals.torchtitan": "llama-hf2titan llama-titan2hf",
        "originals.vipllava": "vipllava-original2hf vipllava-hf2original",
        "sat.cogvlm": "cogvlm-hf2sat cogvlm-sat2hf cogagent-hf2sat cogagent-sat2hf",
        "sat.language": (
            "chatglm-hf2sat chatglm-sat2hf chatglm2-hf2sat chatglm2-sat2hf chatglm3-hf2sat chatglm3-sat2hf gpt2-hf2sat gpt2-sat2hf "
            "bert-hf2sat bert-sat2hf roberta-hf2sat roberta-sat2hf"
        ),
        "sat.llama": "llama-hf2sat llama-sat2hf mixtral-8x7b-hf2sat mixtral-8x7b-sat2hf",
        "sat.partition": "sat-repartition",
        "sat.vision": (
            "vit-hf2sat vit-sat2hf deit-hf2sat deit-sat2hf cait-hf2sat cait-sat2hf mae-hf2sat mae-sat2hf yolos-hf2sat yolos-sat2hf "
            "clip-hf2sat clip-sat2hf eva2-hf2sat eva2-sat2hf"
        ),
        "transformers_bridge": "transformers-hub2native transformers-native2hub tp-split tp-merge",
    },
)
get = REGISTRY.get
load = REGISTRY.load
list_names = REGISTRY.names
find_writer = REGISTRY.find_writer
registry = REGISTRY.all
select = REGISTRY.select


def match(src: str | os.PathLike[str]) -> list[str]:
    """The names of the recipes that fit a checkpoint, the likeliest first."""
    matching = import_module("streamconv.advice.matching")  # opens checkpoints and so stands above this: when it is asked for only
    names: list[str] = matching.match_recipes(src)
    return names


def is_named(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a name's family is the model type of a config.json, or what that begins with: ``internvl`` of ``internvl_chat``."""
    kind = str(config.get("model_type") or "").replace("_", "-")
    family = name.rpartition("-")[0]
    return bool(family) and (kind == family or kind.startswith(f"{family}-"))
