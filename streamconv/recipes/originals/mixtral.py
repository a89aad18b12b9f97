"""Mixtral: Mistral's own checkpoints <-> Hugging Face.

Facts: ``models/mixtral/convert_mixtral_weights_to_hf.py`` of transformers 4.57, which reads eight files ``consolidated.NN.pt`` with whole
tensors spread over them, no matter how; and ``moe.py`` of mistral-inference (26a52a1) for checkpoints with matrices for each expert. Any
number of files is read.
"""

from __future__ import annotations

from typing import Any

from streamconv.recipe import Model, Option, Recipe, Rule, Side, from_config
from streamconv.recipes.originals.llama_meta import ATTENTION, DIMS, common_config, heads, rope_theta
from streamconv.recipes.originals.mistral import CONSOLIDATED, CONTEXT, HEAD_DIM, TIED, UNSCALED, mistral_config, original_params, tokens

_HF, _OWN = "model.layers.{i}.block_sparse_moe", "layers.{i}"
_STACKED, _SEPARATE = "experts == 'stacked'", "experts == 'separate'"

_EXPERTS = (
    Rule(f"{_HF}.experts.{{e}}.{{w1,w3}}.weight", f"{_OWN}.block_sparse_moe.{{w1,w3}}", "e f c -> (e f) c", when=_STACKED),
    Rule(f"{_HF}.experts.{{e}}.w2.weight", f"{_OWN}.block_sparse_moe.w2", "e c f -> (e f) c", when=_STACKED),
    Rule(f"{_HF}.gate.weight", f"{_OWN}.block_sparse_moe.gate.weight", "e c -> e c", when=_STACKED),
    Rule(f"{_HF}.experts.{{e}}.{{w1,w2,w3}}.weight", f"{_OWN}.feed_forward.experts.{{e}}.{{w1,w2,w3}}.weight", when=_SEPARATE),
    Rule(f"{_HF}.gate.weight", f"{_OWN}.feed_forward.gate.weight", "e c -> e c", when=_SEPARATE),
)


def hf_files(model: Model) -> dict[str, Any]:
    """config.json as transformers' script has it, unless there is one, and generation_config.json."""
    params, options = model.config, model.options
    if model.sidecar or not {"norm_eps", "rms_norm_eps"} & set(params):
        return {}
    if "norm_eps" in params:
        own = mistral_config(model)
    else:
        window = params.get("sliding_window")
        own = common_config(model, params["rms_norm_eps"], params.get("rope_theta") or 10000.0)
        own["sliding_window"] = None if window is None else int(window)
    own |= {
        "architectures": ["MixtralForCausalLM"],
        "head_dim": options["head_dim"],
        "intermediate_size": model.targets["model.layers.0.block_sparse_moe.experts.0.w1.weight"].shape[0],
        "max_position_embeddings": options["max_position_embeddings"],
        "model_type": "mixtral",
        "num_experts_per_tok": params.get("num_experts_per_tok") or (params.get("moe") or {}).get("num_experts_per_tok") or 2,
        "num_local_experts": options["num_local_experts"],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    return {"config.json": own, "generation_config.json": tokens(own)}


_SAME = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "num_experts_per_tok", "rms_norm_eps", "vocab_size",
)  # fmt: skip


def original_files(model: Model) -> dict[str, Any]:
    """params.json, with config.json's own keys or, where each expert has its matrices, with Mistral's; unless there is one."""
    config, options = model.config, model.options
    if model.sidecar or "rms_norm_eps" not in config:
        return {}
    if options["experts"] == "separate":
        hidden = model.sources["model.layers.0.block_sparse_moe.experts.0.w1.weight"].shape[0]
        experts = {"num_experts": options["num_local_experts"], "num_experts_per_tok": config.get("num_experts_per_tok", 2)}
        return {"params.json": {**original_params(model, hidden), "moe": experts}}
    own = {key: config[key] for key in _SAME if key in config} | {"rope_theta": rope_theta(config, 1e6)}
    return {"params.json": own | ({} if config.get("sliding_window") is None else {"sliding_window": config["sliding_window"]})}


_MIXTRAL = Recipe(
    name="mixtral-hf2original",
    summary="Mixtral: Hugging Face to the eight consolidated.NN.pt that transformers' script reads",
    rules=(*ATTENTION, *_EXPERTS),
    dims={**DIMS, "j": "=head_dim // 2", "e": "=num_local_experts"},
    options={
        **heads(),
        **from_config(num_local_experts="num_local_experts moe.num_experts"),
        "head_dim": HEAD_DIM,
        "experts": Option(
            "whether the original has the experts' matrices one below the other, or one for each",
            default=f"{{'separate' if has('{_OWN}.feed_forward.gate.weight') else 'stacked'}}",
            choices=("stacked", "separate"),
        ),
        "max_position_embeddings": Option("the longest context, for config.json", default=CONTEXT),
        "tied": TIED,
    },
    requires=UNSCALED,
    reference="transformers 4.57 models/mixtral/convert_mixtral_weights_to_hf.py",
    left=Side(writes=hf_files, expects=("tokenizer_config.json",)),
    right=Side(
        format="torch",
        files=("consolidated.{n:02}.pt", "consolidated.{n:02}.pth", *CONSOLIDATED),
        stem="consolidated.{n:02}.pt",
        shards=8,
        config="params.json",
        expects=("tokenizer.model",),
        writes=original_files,
    ),
)

RECIPES = (
    _MIXTRAL,
    _MIXTRAL.inverse("mixtral-original2hf", "Mixtral: whole tensors in consolidated files, of any number, to Hugging Face"),
)
