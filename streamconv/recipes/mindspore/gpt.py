"""GPT-2 in MindSpore Transformers, whose q, k and v are apart and, unlike its other linear layers, have outputs first.

Facts: see `mindformers`. Its scripts know no names with ``transformer.``, take 12 layers unless told otherwise and skip what they do not
find; these rules take all names and layers and miss what is missing.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.recipe import Drop, Recipe, Rule
from streamconv.recipes.mindspore.mindformers import HF, LAYER_COUNT, LAYERS, MS, REFERENCE, TRAINING, both_ways, only_layers

_LAYER, _OWN = "h.{i}", "backbone.blocks.{i}"
_DEPTH = LAYER_COUNT["i"]
_DENSE = f"{_OWN}.attention.dense{{1,2,3}}"

_GPT = Recipe(
    name="gpt-hf2ms",
    summary="GPT-2: Hugging Face to MindSpore, q, k, v split",
    rules=(
        Rule("{wte,wpe}.weight", "backbone.embedding.{word,position}_embedding.embedding_table"),
        Rule(f"{_LAYER}.ln_{{1,2}}.{{weight,bias}}", f"{_OWN}.layernorm{{1,2}}.{{gamma,beta}}"),
        Rule(f"{_LAYER}.attn.c_attn.weight", f"{_DENSE}.weight", "c (o + o + o) -> o c, o c, o c"),
        Rule(f"{_LAYER}.attn.c_attn.bias", f"{_DENSE}.bias", "(o + o + o) -> o, o, o"),
        Rule(
            f"{_LAYER}.{{attn.c_proj,mlp.c_fc,mlp.c_proj}}.{{weight,bias}}",
            f"{_OWN}.{{attention.projection,output.mapping,output.projection}}.{{weight,bias}}",
        ),
        # The causal mask and what stands for minus infinity, which older files hold.
        Rule(f"{_LAYER}.attn.{{mask:bias,masked_bias}}", f"{_OWN}.attention.{{mask:beta,masked_beta}}", optional=True),
        Rule("ln_f.{weight,bias}", "backbone.layernorm.{gamma,beta}"),
        Drop("lm_head.weight", "the head is the embedding, which MindSpore's model uses for both"),
        *only_layers(f"{_LAYER}.{{rest*}}", f"{_OWN}.{{rest*}}"),
        *TRAINING,
    ),
    dims={"i": f"min(layers, {_DEPTH}) if layers else {_DEPTH}"},
    options=LAYERS,
    left=replace(HF, aliases=(("transformer.{name*}", "{name*}"),)),
    right=MS,
    reference=REFERENCE.format("models/gpt2"),
)

RECIPES = both_ways(_GPT)
