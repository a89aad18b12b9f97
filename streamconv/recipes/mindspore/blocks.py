"""Families whose MindSpore side is made of mindformers' own transformer blocks: Bloom, WizardCoder (StarCoder), ViT and MAE.

Facts: mindformers r1.3.0 (f90b5b9) ``models/{bloom,vit,mae}/convert_{weight,reversed}.py``, r1.4.0-beta2 (b3fcd1b)
``research/wizardcoder/convert_{weight,reversed}.py``. Where those crash on their own names (Bloom's prefix) or cut every WizardCoder where
the 15B model's queries end, these rules do not.
"""

from __future__ import annotations

from streamconv.recipe import Drop, Option, Recipe, Rule, Side, Tie, from_config
from streamconv.recipes.mindspore.mindformers import HF, LAYER_COUNT, LAYERS, MS, REFERENCE, TRAINING, both_ways, only_layers

_BOTH, _OWN_NORM = "{weight,bias}", "{gamma,beta}"
_THIRDS = "(o + o + o) ... -> o ..., o ..., o ..."


def _block(left: str, right: str, norms: str, linears: str, qkv: str, layout: str, when: str | None = None) -> tuple[Rule, ...]:
    """A block: its two norms, its linear layers but q, k, v (projection, mapping, projection back), which are transposed, and q, k, v."""
    linears, own = f"{left}.{{{linears}}}", f"{right}.{{attention.projection,output.mapping,output.projection}}"
    return (
        Rule(f"{left}.{{{norms}}}.{_BOTH}", f"{right}.layernorm{{1,2}}.{_OWN_NORM}", when=when),
        Rule(f"{left}.{qkv}.{_BOTH}", f"{right}.attention.dense{{1,2,3}}.{_BOTH}", layout, when=when),
        Rule(f"{linears}.weight", f"{own}.weight", "o c -> c o", when=when),
        Rule(f"{linears}.bias", f"{own}.bias", when=when),
    )


def _bloom(prefix: str, when: str) -> tuple[Rule, ...]:
    """Bloom with or without a prefix; with it the names are those of mindformers' language model, without it of the bare network."""
    own_embedding = f"{prefix}embedding"
    return (
        Rule(f"{prefix}word_embeddings.weight", f"{own_embedding}.word_embedding.embedding_table", when=when),
        Rule(f"{prefix}word_embeddings_layernorm.{_BOTH}", f"{own_embedding}.norm.{_OWN_NORM}", when=when),
        Rule(f"{prefix}ln_f.{_BOTH}", f"{prefix}ln_f.{_OWN_NORM}", when=when),
        *_block(
            f"{prefix}h.{{i}}",
            f"{prefix}blocks.{{i}}",
            "input_layernorm,post_attention_layernorm",
            "self_attention.dense,mlp.dense_h_to_4h,mlp.dense_4h_to_h",
            "self_attention.query_key_value",
            "(H (d + d + d)) ... -> (H d) ..., (H d) ..., (H d) ...",
            when,
        ),
    )


_BLOOM_TABLE = "(shape('{at:,transformer.}word_embeddings.weight') or shape('{at:,transformer.}embedding.word_embedding.embedding_table'))"

_BLOOM = Recipe(
    name="bloom-hf2ms",
    summary="Bloom: Hugging Face to MindSpore, q, k, v split",
    rules=(
        *_bloom("", "not has('transformer.{rest*}')"),
        *_bloom("transformer.", "has('transformer.{rest*}')"),
        Rule("lm_head.{kind:weight,bias}", "head.{kind:weight,bias}", optional=True),
        *TRAINING,
    ),
    dims={**LAYER_COUNT, "H": "n_head"},
    options=from_config(n_head="n_head num_attention_heads", hidden_size="hidden_size n_embed"),
    requires={
        f"hidden_size == None or {_BLOOM_TABLE}[1] == hidden_size": "the embedding does not have hidden_size={hidden_size} columns: "
        "set the model's own, or mend its config"
    },
    left=HF,
    right=MS,
    reference=REFERENCE.format("models/bloom"),
)

_WTE, _OWN_WTE = "transformer.wte.weight", "backbone.embedding.word_embedding.embedding_table"
_FUSED_ROWS = "shape('transformer.h.{i}.attn.c_attn.weight')[0]"

_WIZARDCODER = Recipe(
    name="wizardcoder-hf2ms",
    summary="WizardCoder, StarCoder (GPT-BigCode with multi-query attention): Hugging Face to MindSpore, q, k, v split",
    rules=(
        *only_layers("transformer.h.{i}.{rest*}", "backbone.blocks.{i}.{rest*}"),
        *_block(
            "transformer.h.{i}",
            "backbone.blocks.{i}",
            "ln_1,ln_2",
            "attn.c_proj,mlp.c_fc,mlp.c_proj",
            "attn.c_attn",
            "(q + d + d) ... -> q ..., d ..., d ...",
        ),
        Drop("transformer.h.{i}.attn.{buffer:bias,masked_bias}", "the causal mask, which the model makes itself"),
        Rule(f"transformer.ln_f.{_BOTH}", f"backbone.layernorm.{_OWN_NORM}"),
        Rule("transformer.{wte,wpe}.weight", "backbone.embedding.{word,position}_embedding.embedding_table"),
        Rule("lm_head.weight", "head.head_weight", optional="tie_word_embeddings"),
        Tie(_WTE, "head.head_weight", _OWN_WTE, when="tie_word_embeddings"),
        *TRAINING,
    ),
    dims={"q": "n_embd", "i": f"({LAYER_COUNT['i']}) if layers == None else min(layers, ({LAYER_COUNT['i']}))"},
    options={
        **LAYERS,
        "n_embd": Option(
            "n_embd or hidden_size of config.json, else as many as the embedding's columns",
            default=f"{{config.n_embd or config.hidden_size or sidecar.n_embd or sidecar.hidden_size or shape('{_WTE}')[1]}}",
            kind="int",
        ),
        **from_config(n_head="n_head num_attention_heads"),
        "tie_word_embeddings": Option(
            "whether the head is the embedding, which the Hugging Face side then stores once; on the way back only if set, as the "
            "reference writes both",
            default=f"{{has('{_WTE}') and False not in [config.tie_word_embeddings, sidecar.tie_word_embeddings]}}",
            kind="bool",
        ),
    },
    requires={
        f"not {_FUSED_ROWS} or ({_FUSED_ROWS} == n_embd + 2 * (n_embd // n_head) if n_head else {_FUSED_ROWS} != 3 * n_embd)": (
            "attn.c_attn does not have the rows of multi-query attention, n_embd + 2 * n_embd / n_head (n_embd={n_embd}, n_head={n_head}): "
            "models with multi_query false are not converted; else mend the config, or set both"
        )
    },
    left=HF,
    right=MS,
    reference="mindformers r1.4.0-beta2 (b3fcd1b), research/wizardcoder/convert_{weight,reversed}.py",
)


_DECODER = "has('{at:,vit.}{part:decoder_,mask_}{rest*}')"


def _vit_block(at: str, when: str | None = None) -> tuple[Rule, ...]:
    return _block(at, f"vit.{at}", "norm1,norm2", "attn.proj,mlp.fc1,mlp.fc2", "attn.qkv", _THIRDS, when)


def _vit(family: str, norm: str, other_norm: str, summary: str) -> Recipe:
    """ViT or MAE, whose last norms are called ``norm`` on MindSpore's side; ``other_norm`` is what the other calls them."""
    last, other_last = (f"vit.{{at:,decoder_}}{name}.{_OWN_NORM}" for name in (norm, other_norm))
    return Recipe(
        name=f"{family}-hf2ms",
        summary=f"{summary}: PyTorch (facebookresearch/mae) to MindSpore, q, k, v split",
        rules=(
            Rule("cls_token", "vit.cls_tokens"),
            Rule("pos_embed", "vit.pos_embed"),
            Rule(f"patch_embed.proj.{_BOTH}", f"vit.patch_embed.proj.{_BOTH}"),
            Rule("mask_token", "vit.mask_tokens", when=_DECODER),
            Rule("decoder_pos_embed", "vit.decoder_pos_embed", when=_DECODER),
            Rule(f"decoder_{{embed,pred}}.{_BOTH}", f"vit.decoder_{{embed,pred}}.{_BOTH}", when=_DECODER),
            *_vit_block("blocks.{i}"),
            *_vit_block("decoder_blocks.{j}", _DECODER),
            Rule(f"{{at:,decoder_}}norm.{_BOTH}", last, optional=True),
            Rule(f"fc_norm.{_BOTH}", f"vit.fc_norm.{_OWN_NORM}", optional=True),
            Rule(f"head.{_BOTH}", f"head.{_BOTH}", optional=True),
            Rule("head.{rest*}", "head.{rest*}", optional=True, fallback=True),
            *TRAINING,
        ),
        requires={
            "has('{at:,vit.}{name:norm,layernorm,fc_norm}.{kind:weight,gamma}')": "no last norm (norm or fc_norm): mend the source",
            f"not {_DECODER} or has('{{at:,vit.}}decoder_{{name:norm,layernorm}}.{{kind:weight,gamma}}')": (
                "a decoder without its last norm (decoder_norm): mend the source"
            ),
        },
        left=Side(root="model"),
        right=Side(format="mindspore", aliases=((other_last, last),)),
        reference=REFERENCE.format(f"models/{family}"),
    )


_VIT, _MAE = _vit("vit", "layernorm", "norm", "ViT"), _vit("mae", "norm", "layernorm", "MAE")

RECIPES = (
    *both_ways(_BLOOM),
    *both_ways(_WIZARDCODER),
    _VIT,
    _VIT.inverse("vit-ms2hf", "ViT: MindSpore to PyTorch"),
    _MAE,
    _MAE.inverse("mae-ms2hf", "MAE: MindSpore to PyTorch"),
)
