"""What the families of MindSpore Transformers (mindformers) have in common: both sides, training state, heads, linear layers, ``layers``.

Facts: mindformers r1.3.0 (f90b5b9), ``convert_weight.py`` and the families' ``convert_weight.py`` and ``convert_reversed.py``. Where those
draw missing tensors at random, write half of the names, or widen to float32 because a library does, these rules do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.recipe import Drop, Fact, Make, Model, Option, Recipe, Rule, Side, Tie, chain

RECIPES = ()
REFERENCE = "mindformers r1.3.0 (f90b5b9), convert_weight.py and convert_reversed.py of {}"

HF = Side()
MS = Side(format="mindspore")

_STATE = "adam_m,adam_v,moment1,moment2,vhat,moments,lamb_m,lamb_v,exp_avg,exp_avg_sq,exp_avg_sq_row,exp_avg_sq_col,pma_weight,accu_grads"
_COUNTERS = (
    "global_step,epoch_num,step_num,learning_rate,beta1_power,beta2_power,momentum,weight_decay,loss_scale,scale_sense,"
    "current_iterator_step,last_overflow_iterator_step,accu_step"
)
TRAINING = (
    Make(f"{{state:{_STATE}}}.{{rest*}}", "state of the optimizer"),
    Make(f"{{counter:{_COUNTERS}}}", "state of the training"),
)
"""What a MindSpore checkpoint of a training run holds beside the weights."""

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
LAYER_COUNT = {"i": " or ".join([*(f"config.{key}" for key in _DEPTHS), *(f"sidecar.{key}" for key in _DEPTHS)])}
"""How many layers there must be: of rules that are not sparse."""

TIED = {
    "tie_word_embeddings": Option(
        "whether the head is the embedding, which the Hugging Face side then stores once",
        default="{(config.tie_word_embeddings or sidecar.tie_word_embeddings) == True}",
        kind="bool",
    )
}


def head(
    embedding: str, own_embedding: str, *, twice: bool | None = True, names: tuple[str, str] = ("lm_head.weight", "lm_head.weight")
) -> tuple[Rule | Tie, ...]:
    """The head of a model.

    Args:
        embedding: name of the embedding on the Hugging Face side.
        own_embedding: its name on MindSpore's side.
        twice: where it is tied, whether MindSpore's side holds the embedding a second time; None: where the source does.
        names: of the head, on both sides.
    """
    (left, right), inner = names, embedding.split(".", maxsplit=1)[0]
    # A model without what its head is put on has none.
    rule = Rule(left, right, optional=f"tie_word_embeddings or not has('{inner}.{{rest*}}')")
    if twice is None:
        return (rule,)
    if twice:
        return (rule, Tie(embedding, right, own_embedding, when="tie_word_embeddings"))
    return (rule, Tie(own_embedding, left, embedding, when=f"tie_word_embeddings and has('{embedding}')").flip())


LORA = "lora_A.weight,lora_B.weight"
PET = "tk_delta_lora_a,tk_delta_lora_b"
MINDPET = "mindpet_delta_lora_a,mindpet_delta_lora_b"


def linear(left: str, right: str, lora: tuple[str, str] = (LORA, PET), when: str | None = None) -> tuple[Rule, ...]:
    """Linear layers: weights, which every layer has, biases and LoRA factors.

    Args:
        left: the modules, as names have them; their parts are a list ``{part:...}`` on both sides.
        right: the same on MindSpore's side.
        lora: what both sides call the two factors.
        when: as for a rule.
    """
    return (
        Rule(f"{left}.weight".replace("{part:", "{"), f"{right}.weight".replace("{part:", "{"), when=when),
        Rule(f"{left}.bias", f"{right}.bias", when=when, optional=True),
        Rule(f"{left}.{{factor:{lora[0]}}}", f"{right}.{{factor:{lora[1]}}}", when=when, optional=True, sparse=True),
    )


def where(condition: str, facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """These facts, only where ``condition`` holds: of one of the kinds of models that go by a recipe."""
    return tuple(replace(fact, when=f"({fact.when}) and {condition}" if fact.when else condition) for fact in facts)


def as_many(total: str, what: Mapping[str, tuple[str, ...]], *, or_none: bool = False) -> dict[str, str]:
    """For `Recipe.requires`: of each of these there are ``total``, by whichever of its names; what the matter is where not -> names."""
    totals = f"[{total}, 0]" if or_none else f"[{total}]"
    requires = {}
    for problem, names in what.items():
        count = " + ".join(f"count('{name}')" for name in names)
        requires[f"{count} in {totals}"] = f"{problem}: mend the source"
    return requires


LAYERS = {"layers": Option("how many layers to take, the rest is left out; all where it is not given", kind="int")}


def only_layers(left: str, right: str) -> tuple[Drop, Make]:
    """Leaves out the layers ``{i}`` from option ``layers`` on; ``left`` and ``right`` match all names of a layer on their side."""
    beyond, reason = "layers != None and i >= layers", "a layer beyond --set layers"
    return (Drop(left, reason, where=beyond), Make(right, reason, where=beyond))


def both_ways(forward: Recipe) -> tuple[Recipe, Recipe]:
    """``FAMILY-hf2ms``, whose summary is "MODELS: ...", and ``FAMILY-ms2hf``, which brings config.json along."""
    models = forward.summary.partition(":")[0]
    back = forward.inverse(forward.name.replace("hf2ms", "ms2hf"), f"{models}: MindSpore to Hugging Face")
    *before, last = back.stages
    return forward, chain(*before, replace(last, right=replace(last.right, writes=last.right.writes or hf_files)))


def hf_files(model: Model) -> dict[str, Any]:
    """The config.json that lies beside a MindSpore checkpoint, also where that is named as a file."""
    return {"config.json": dict(model.config)} if model.config and not model.sidecar else {}
