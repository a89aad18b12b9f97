"""GGUF of llama.cpp -> Hugging Face, for architectures whose tensors are those of Hugging Face under other names.

Facts: ``get_tensor_name_map`` of gguf 0.19.0 for names; llama.cpp's ``convert_hf_to_gguf.py``, which permutes rows of q and k for ``llama``
alone; transformers' ``integrations/ggml.py`` for config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.recipe import Make, Model, Option, Recipe, Rule, Side, from_config

_HF, _OWN = "model.layers.{i}", "blk.{i}"
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_PERMUTED = "architecture == 'llama'"
_INTERLEAVED = "(h two j) c -> (h j two) c"

RULES = (
    Rule("model.embed_tokens.weight", "token_embd.weight"),
    Rule("model.norm.weight", "output_norm.weight"),
    Rule("lm_head.weight", "output.weight", optional=True),
    Rule(f"{_HF}.{{input,post_attention}}_layernorm.weight", f"{_OWN}.{{attn,ffn}}_norm.weight"),
    Rule(f"{_HF}.self_attn.{{q,k}}_proj.weight", f"{_OWN}.attn_{{q,k}}.weight", _INTERLEAVED, when=_PERMUTED),
    Rule(f"{_HF}.self_attn.{{q,k}}_proj.weight", f"{_OWN}.attn_{{q,k}}.weight", when=f"not {_PERMUTED}"),
    Rule(f"{_HF}.self_attn.{{v,o}}_proj.weight", f"{_OWN}.attn_{{v,output}}.weight"),
    Rule(f"{_HF}.self_attn.{{q,k,v}}_proj.bias", f"{_OWN}.attn_{{q,k,v}}.bias", optional=True, when=f"not {_PERMUTED}"),
    Rule(f"{_HF}.self_attn.{{q,k}}_norm.weight", f"{_OWN}.attn_{{q,k}}_norm.weight", optional=True),
    Rule(f"{_HF}.mlp.{{gate,up,down}}_proj.weight", f"{_OWN}.ffn_{{gate,up,down}}.weight"),
    Make("rope_freqs.weight", "the model computes it from its config"),
)


def _files(model: Model) -> dict[str, Any]:
    """config.json from what the file says of its model."""
    own = model.config.get("gguf")
    architecture = model.options["architecture"]
    if model.sidecar or not isinstance(own, Mapping) or architecture not in _CLASSES:
        return {}
    attention, rope = (own[key] if isinstance(own.get(key), Mapping) else {} for key in ("attention", "rope"))
    vocab, width = model.targets["model.embed_tokens.weight"].shape
    heads = model.options["n_heads"]
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "attention_bias": any(name.endswith("q_proj.bias") for name in model.targets),
        "bos_token_id": own.get("bos_token_id"),
        "dtype": model.dtype,
        "eos_token_id": own.get("eos_token_id"),
        "head_dim": attention.get("key_length") or width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": model.targets["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "max_position_embeddings": own.get("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": model.options["n_layers"],
        "num_key_value_heads": model.options["n_kv_heads"],
        "rms_norm_eps": attention.get("layer_norm_rms_epsilon"),
        "rope_theta": rope.get("freq_base") or 10000.0,
        "tie_word_embeddings": "lm_head.weight" not in model.targets,
        "vocab_size": vocab,
    }
    return {"config.json": {key: value for key, value in config.items() if value is not None}}


_GGUF = Recipe(
    name="gguf-hf2gguf",
    summary="Hugging Face to the names and layouts of GGUF",
    rules=RULES,
    dims={"i": "n_layers", "two": 2, "h": {"q": "=n_heads", "k": "=n_kv_heads"}},
    options={
        **from_config(
            n_layers="gguf.block_count num_hidden_layers",
            n_heads="gguf.attention.head_count num_attention_heads",
            n_kv_heads="gguf.attention.head_count_kv num_key_value_heads",
        ),
        "architecture": Option("llama, qwen2 or qwen3; by default what the file says", default="{config.gguf.architecture or ''}"),
    },
    requires={
        f"architecture in {[*_CLASSES]}": f"tensors of {{architecture}} are not known here, of {', '.join(_CLASSES)} are",
        "not has('rope_freqs.weight') or sidecar": "the file scales rope by rope_freqs.weight, which config.json has to say: give "
        "--sidecars-from a folder of the model that has one",
        "config.gguf.rope.scaling == None or sidecar": "the file scales rope, which config.json has to say: give --sidecars-from a folder "
        "of the model that has one",
    },
    reference="gguf 0.19.0 tensor_mapping.py",
    left=Side(writes=_files, expects=("tokenizer_config.json",)),
)

RECIPES = (_GGUF.inverse("gguf-gguf2hf", "GGUF of llama.cpp (Llama, Qwen2, Qwen3) to Hugging Face; with --dequantize"),)
