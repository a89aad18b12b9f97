"""Whisper in MindSpore Transformers, whose convolutions have one more axis.

Facts: see `mindformers`. What its scripts cannot do, bfloat16 and a way back without ``--dtype``, these rules can.
"""

from __future__ import annotations

from streamconv.recipe import Recipe, Rule
from streamconv.recipes.mindspore.mindformers import HF, MS, REFERENCE, TRAINING, both_ways


def _layers(side: str, number: str, attention: str, norms: str) -> tuple[Rule, ...]:
    """The encoder or the decoder; ``base`` is nothing in a model without a head."""
    stack = f"{{base:,model.}}{side}"
    layer = f"{stack}.layers.{{{number}}}"
    same = (f"{attention}.{{q,k,v,out}}_proj.weight", f"{attention}.{{q,v,out}}_proj.bias", "{fc1,fc2}.{weight,bias}")
    return (
        Rule(f"{stack}.embed_positions.weight", f"{stack}.embed_positions.embedding_weight"),
        *(Rule(f"{layer}.{name}", f"{layer}.{name}") for name in same),
        Rule(f"{layer}.{{{norms}}}_layer_norm.{{weight,bias}}", f"{layer}.{{{norms}}}_layer_norm.{{gamma,beta}}"),
        Rule(f"{stack}.layer_norm.{{weight,bias}}", f"{stack}.layer_norm.{{gamma,beta}}"),
    )


_CONV = "{base:,model.}encoder.{conv1,conv2}"

_WHISPER = Recipe(
    name="whisper-hf2ms",
    summary="Whisper: Hugging Face to MindSpore, kernels of the convolutions one high",
    rules=(
        Rule(f"{_CONV}.weight", f"{_CONV}.weight", "o c k -> o c 1 k"),
        Rule(f"{_CONV}.bias", f"{_CONV}.bias"),
        *_layers("encoder", "i", "self_attn", "self_attn,final"),
        Rule("{base:,model.}decoder.embed_tokens.weight", "{base:,model.}decoder.embed_tokens.embedding_weight"),
        *_layers("decoder", "j", "{self_attn,encoder_attn}", "self_attn,encoder_attn,final"),
        # As a rule it is the embedding and in no file.
        Rule("proj_out.weight", "proj_out.weight", optional=True),
        *TRAINING,
    ),
    dims={
        "i": "config.encoder_layers or sidecar.encoder_layers",
        "j": "config.decoder_layers or sidecar.decoder_layers",
    },
    left=HF,
    right=MS,
    reference=REFERENCE.format("models/whisper"),
)

RECIPES = both_ways(_WHISPER)
