"""CogVLM2 in MindSpore Transformers: the video model, and the image model with its vision experts.

Facts: see `mindformers`, whose script goes one way, and cuts q, k, v where those of the 8B model end; these rules go by the config.
"""

from __future__ import annotations

from streamconv.recipe import Option, Recipe, Rule, from_config
from streamconv.recipes.mindspore.mindformers import HF, LAYER_COUNT, MS, REFERENCE, TRAINING, both_ways

_LAYER = "model.layers.{i}"
_VIT, _OWN_VIT = "model.vision.transformer.layers.{l}", "vision_encoder.blocks.{l}"
_ROPE = "model.layers.{i=*}.self_attn.rotary_emb.inv_freq"
_VIDEO, _FULL = "modal == 'video'", "sft == 'full'"

_VISION = (
    Rule("model.vision.patch_embedding.cls_embedding", "vision_encoder.cls_token", "n c -> 1 n c"),
    Rule("model.vision.patch_embedding.position_embedding.weight", "vision_encoder.pos_embed", "n c -> 1 n c"),
    Rule("model.vision.patch_embedding.proj.{weight,bias}", "vision_encoder.patch_embed.proj.{weight,bias}"),
    Rule(
        f"{_VIT}.attention.{{query_key_value,dense}}.{{kind:weight,bias}}",
        f"{_OWN_VIT}.attn.{{qkv,proj}}.{{kind:weight,bias}}",
    ),
    Rule(f"{_VIT}.mlp.{{fc1,fc2}}.{{kind:weight,bias}}", f"{_OWN_VIT}.mlp.{{fc1,fc2}}.{{kind:weight,bias}}"),
    Rule(f"{_VIT}.{{input,post_attention}}_layernorm.{{weight,bias}}", f"{_OWN_VIT}.norm{{1,2}}.{{gamma,beta}}"),
    Rule("model.vision.linear_proj.norm1.{weight,bias}", "mlp_adapter.linear_proj.norm1.{gamma,beta}"),
    Rule(
        "model.vision.linear_proj.{linear_proj,gate_proj,dense_h_to_4h,dense_4h_to_h}.{kind:weight,bias}",
        "mlp_adapter.linear_proj.{linear_proj,gate_proj,dense_h_to_4h,dense_4h_to_h}.{kind:weight,bias}",
    ),
    Rule("model.vision.{conv.weight,conv.bias,boi,eoi}", "mlp_adapter.{conv.weight,conv.bias,boi,eoi}"),
)


def _video(prefix: str, when: str) -> tuple[Rule, ...]:
    """The language model of the video model."""
    own = f"{prefix}{_LAYER}"
    return (
        Rule("model.embed_tokens.weight", f"{prefix}model.tok_embeddings.embedding_weight", when=when),
        Rule("{model.norm,lm_head}.weight", f"{prefix}{{model.norm_out,lm_head}}.weight", when=when),
        Rule(
            f"{_LAYER}.self_attn.language_expert_query_key_value.weight",
            f"{own}.attention.{{wq,wk,wv}}.weight",
            "(q + k + k) c -> q c, k c, k c",
            when=when,
        ),
        Rule(f"{_LAYER}.self_attn.language_expert_dense.weight", f"{own}.attention.wo.weight", when=when),
        Rule(f"{_LAYER}.mlp.language_mlp.{{gate,up,down}}_proj.weight", f"{own}.feed_forward.w{{1,3,2}}.weight", when=when),
        Rule(f"{_LAYER}.{{input,post_attention}}_layernorm.weight", f"{own}.{{attention,ffn}}_norm.weight", when=when),
    )


def _image(prefix: str, when: str) -> tuple[Rule, ...]:
    """The language model of the image model, most of which keeps its names; ``part`` are its experts."""
    same_names = (
        "lm_head.weight",
        f"{_LAYER}.self_attn.{{part:language,vision}}_expert_{{query_key_value,dense}}.weight",
        f"{_LAYER}.{{input,post_attention}}_layernorm.weight",
    )
    bias = f"{_LAYER}.self_attn.{{part:language,vision}}_expert_{{layer:query_key_value,dense}}.bias"
    return (
        Rule("model.embed_tokens.weight", f"{prefix}model.tok_embeddings.embedding_weight", when=when),
        Rule("model.norm.weight", f"{prefix}model.norm_out.weight", when=when),
        *(Rule(name, f"{prefix}{name}", when=when) for name in same_names),
        Rule(bias, f"{prefix}{bias}", when=when, optional=True),
        Rule(
            f"{_LAYER}.mlp.{{part:language,vision}}_mlp.{{gate_proj,up_proj,down_proj}}.weight",
            f"{prefix}{_LAYER}.mlp.{{part:language,vision}}_mlp.{{w1,w3,w2}}.weight",
            when=when,
        ),
    )


_LORA_PREFIX = "llm_model.pet_model.lora_model."

_COGVLM2 = Recipe(
    name="cogvlm2-hf2ms",
    summary="CogVLM2: Hugging Face to MindSpore, one rotary buffer for all layers",
    rules=(
        *_VISION,
        *_video("llm_model.", f"{_VIDEO} and {_FULL}"),
        *_video(_LORA_PREFIX, f"{_VIDEO} and not {_FULL}"),
        *_image("llm_model.", f"not {_VIDEO}"),
        *(
            Rule(_ROPE, f"{prefix}model.freqs_mgr.freqs", when=when, optional=True)
            for prefix, when in (("llm_model.", _FULL), (_LORA_PREFIX, f"not {_FULL}"))
        ),
        *TRAINING,
    ),
    dims={
        "i": f"{LAYER_COUNT['i']} or count('llm_model.{{prefix*}}layers.{{i}}.attention_norm.weight')"
        " or count('llm_model.model.layers.{i}.input_layernorm.weight')",
        "l": "config.vision_config.num_hidden_layers or sidecar.vision_config.num_hidden_layers",
        "q": "=num_attention_heads * head_dim",
        "k": "=num_multi_query_heads * head_dim",
    },
    options={
        "modal": Option("which model: its names differ", default="video", choices=("video", "image")),
        "sft": Option("what MindSpore's model is made for: with lora its names have a prefix", default="full", choices=("full", "lora")),
        **from_config(
            num_attention_heads="num_attention_heads",
            num_multi_query_heads="num_multi_query_heads num_key_value_heads",
            hidden_size="hidden_size",
        ),
        "head_dim": Option(
            "head_dim of config.json, else hidden_size for each head",
            default="{config.head_dim or sidecar.head_dim or hidden_size // num_attention_heads}",
            kind="int",
        ),
    },
    left=HF,
    right=MS,
    reference=REFERENCE.format("models/cogvlm2"),
)

RECIPES = both_ways(_COGVLM2)
