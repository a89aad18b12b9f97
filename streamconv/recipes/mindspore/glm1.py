"""ChatGLM-6B (glm) and CodeGeeX2, which has ChatGLM2's layout, in MindSpore Transformers.

Facts: mindformers r1.3.0 (f90b5b9) ``models/{glm,codegeex2}/convert_{weight,reversed}.py``.
"""

from __future__ import annotations

from streamconv.recipe import Option, Recipe, Rule
from streamconv.recipes.mindspore.mindformers import HF, LAYER_COUNT, LORA, MS, PET, REFERENCE, TRAINING, both_ways, linear

_LAYER, _LAYER2 = "transformer.layers.{i}", "transformer.encoder.layers.{i}"
_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_NORM, _OWN_NORM = "{weight,bias}", "{gamma,beta}"
_INPUT_NORM = (f"{_LAYER}.input_layernorm.{_NORM}", f"{_LAYER}.input_layernorm.{_OWN_NORM}")
_FACTORS = (f"{PET},{LORA}", f"{PET},{LORA}")


def _same(name: str, when: str | None = None, *, optional: bool = False, sparse: bool = False) -> Rule:
    return Rule(name, name, when=when, optional=optional, sparse=sparse)


def _same_linear(layer: str, attention: str, lora: tuple[str, str] = (LORA, PET)) -> list[Rule]:
    """The linear layers of a layer, which keep their names."""
    rules: list[Rule] = []
    for part in (f"{attention}.query_key_value", f"{attention}.dense", *_MLP):
        rules += linear(f"{layer}.{part}", f"{layer}.{part}", lora)
    return rules


_NAMES = Recipe(
    rules=(
        Rule("transformer.word_embeddings.weight", "transformer.word_embeddings.embedding_table"),
        Rule(*_INPUT_NORM, when="half", cast="float16", firm=True),
        Rule(*_INPUT_NORM, when="not half"),
        Rule(f"{_LAYER}.post_attention_layernorm.{_NORM}", f"{_LAYER}.post_attention_layernorm.{_OWN_NORM}"),
        *_same_linear(_LAYER, "attention"),
        Rule(f"transformer.final_layernorm.{_NORM}", f"transformer.final_layernorm.{_OWN_NORM}"),
        _same("lm_head.weight"),
        _same(f"{_LAYER}.attention.rotary_emb.inv_freq", optional=True, sparse=True),
        _same("transformer.prefix_encoder.{rest*}", optional=True),
        *TRAINING,
    ),
    dims=LAYER_COUNT,
    right=MS,
)

_GLM = Recipe(
    name="glm-hf2ms",
    summary="ChatGLM-6B: Hugging Face to MindSpore",
    rules=(Rule("{rest*}", "{rest*}", when="half", cast="float16"), _same("{rest*}", when="not half")),
    options={
        "half": Option(
            "true: as mindformers does it, all values become float16 before what --dtype asks for, and input_layernorm stays "
            "so; false: stored dtypes stay, and --dtype holds for all",
            default=True,
        )
    },
    left=HF,
    reference=REFERENCE.format("models/glm"),
    then=_NAMES,
)

_CODEGEEX2 = Recipe(
    name="codegeex2-hf2ms",
    summary="CodeGeeX2: Hugging Face to MindSpore",
    rules=(
        Rule("transformer.embedding.word_embeddings.weight", "transformer.embedding.embedding_table"),
        _same(f"{_LAYER2}.{{input,post_attention}}_layernorm.weight"),
        *_same_linear(_LAYER2, "self_attention", _FACTORS),
        _same("transformer.encoder.final_layernorm.weight"),
        _same("transformer.output_layer.weight"),
        _same("transformer.rotary_pos_emb.inv_freq", optional=True),
        *TRAINING,
    ),
    dims=LAYER_COUNT,
    left=HF,
    right=MS,
    reference=REFERENCE.format("models/codegeex2"),
)

RECIPES = (*both_ways(_GLM), *both_ways(_CODEGEEX2))
