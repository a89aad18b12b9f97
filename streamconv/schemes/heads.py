"""The linear modules that may share their weight with embeddings, where they are not called lm_head. Facts: transformers 5.24."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = "lm_head"
_KINDS = {
    "cls.predictions.decoder": (
        "bert", "big_bird", "deberta", "deberta-v2", "ernie", "fnet", "layoutlm", "lxmert", "megatron-bert", "mobilebert", "mra",
        "nomic_bert", "nystromformer", "roc_bert", "roformer", "squeezebert", "tapas", "visual_bert", "yoso",
    ),
    "lm_head.decoder": (
        "bert-generation", "camembert", "data2vec-text", "esm", "gte", "ibert", "jina_embeddings_v3", "longformer", "luke", "mpnet",
        "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    ),
    "predictions.decoder": ("albert",),
    "entity_predictions.decoder": ("luke",),
    "decoder": ("modernbert", "modernbert-decoder"),
    "proj_out": ("canary", "cohere_asr", "moonshine", "moonshine_streaming", "whisper"),
    "output_projection": ("biogpt", "trocr"),
    "pred_layer.proj": ("flaubert", "xlm"),
    "lm_head.out_proj": ("t5gemma", "t5gemma2"),
    "lm_loss": ("xlnet",),
    "generator_lm_head": ("electra",),
    "vocab_projector": ("distilbert",),
    "embed_out": ("gpt_neox", "gpt_neox_japanese"),
    "head": ("rwkv",),
}  # fmt: skip


def heads_of(config: Mapping[str, Any]) -> list[str]:
    """The modules of a model that give what its vocabulary has, which quantizing leaves alone, whether they are stored or tied."""
    kind = config.get("model_type")
    return [HEAD, *(head for head, kinds in _KINDS.items() if kind in kinds)]
