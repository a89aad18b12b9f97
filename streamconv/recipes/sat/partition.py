"""SwissArmyTransformer: what all families have in common, and the re-partition of a folder over another number of ranks.

Facts: sat/mpu/layers.py, sat/model/transformer.py, sat/model/finetune/lora2.py and sat/training/model_io.py of SwissArmyTransformer 0.4.12
(THUDM/SwissArmyTransformer at 63dc23a). Its own split and merge of files are not implemented; these are those of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.recipe import PLAIN, Dim, Fact, Make, Model, Option, Recipe, Rule, Side, Writer, chain, sparse

REFERENCE = "THUDM/SwissArmyTransformer 63dc23a (0.4.12), "
_RANK = "mp_rank_{r:02}_model_states.pt"
_FIRST = "mp_rank_00_model_states.pt"

# Strided column parallel: each of the parts is divided, a rank has its share of every one. Of grouped queries the parts have different
# sizes: queries are as wide as the output projection's input, in whole heads of ``d``.
_OUT = "transformer.layers.{i}.attention.dense.weight"
_HEAD = "(hidden_size_per_attention_head or head_dim or kv_channels or (hidden_size or n_embd) // (num_attention_heads or n_head) or 1)"
_GROUPED = {"d": _HEAD, "q": f"(shape('{_OUT}')[1] / model_parallel or shape('{_FIRST}/{_OUT}')[1]) / {_HEAD}"}
_QKV = "{p*}.layers.{i}.attention.query_key_value.{kind:weight,bias}"


def _whole(heads: str) -> str:
    """Whether every rank has the same number of heads; true where nothing is divided, or nothing known."""
    return f"model_parallel == None or ({heads} or 0) // model_parallel * model_parallel == ({heads} or 0)"


def _vocab(name: str) -> str:
    """Whether an embedding is divided: SAT does that from 1000 words on. Ranks of fewer words each hold all of them or their share."""
    rows = f"shape('{_FIRST}/{name}')[0]"
    shared = f"({rows} if {rows} == vocab_size else {rows} * count('{_RANK}/{name}'))"
    return f"(shape('{name}')[0] or {shared} or 0) >= 1000"


def _partition(
    names: str, layout: str, *, dims: Mapping[str, Dim] | None = None, when: str | None = None, where: str | None = None
) -> Rule:
    return Rule(names, f"{_RANK}/{names}", layout, dims=dims or {}, when=when, where=where, optional=True, sparse=True)


_COLUMNS, _ROWS = "(r a) ... -> r a ...", "o (r a) -> r o a"
_EMBEDDINGS = tuple(f"{part}transformer.word_embeddings.weight" for part in ("", "encoder.", "decoder.", "text_encoder."))
_PARTITION = Recipe(
    name="sat-partition",
    summary="tensors of a whole model to those of each rank",
    rules=(
        _partition(_QKV, "(r q d + r k d + r k d) ... -> r (q d + k d + k d) ...", dims=_GROUPED, where="p == 'transformer'"),
        _partition(_QKV, "(r a + r a + r a) ... -> r (a + a + a) ...", where="p != 'transformer'"),
        _partition("mixins.rotary.vision_query_key_value_list.{i}.{kind:weight,bias}", "(r a + r a + r a) ... -> r (a + a + a) ..."),
        _partition("{p*}.layers.{i}.cross_attention.key_value.{kind:weight,bias}", "(r a + r a) ... -> r (a + a) ..."),
        _partition("{p*}.layers.{i}.cross_attention.query.{kind:weight,bias}", _COLUMNS),
        _partition("{p*}.layers.{i}.mlp.dense_h_to_4h{part:,_gate}{e?_}.{kind:weight,bias}", _COLUMNS),
        _partition("mixins.mlp.{part:gate_proj,vision_gate_proj,vision_dense_h_to_4h_list,w2}.{i}.{kind:weight,bias}", _COLUMNS),
        _partition("mixins.{mixin:lm,chatglm-final}.lm_head.weight", _COLUMNS),
        _partition("{p*}.layers.{i}.{part:attention,cross_attention}.dense.weight", _ROWS),
        _partition("{p*}.layers.{i}.mlp.dense_4h_to_h{e?_}.weight", _ROWS),
        _partition("mixins.{part:rotary.vision_dense_list,mlp.vision_dense_4h_to_h_list}.{i}.weight", _ROWS),
        *(_partition(name, "(r v) c -> r v c", when=_vocab(name)) for name in _EMBEDDINGS),
        Rule("{name*}", "mp_rank_{r=*:02}_model_states.pt/{name*}", fallback=True),
    ),
    dims={"r": f"None if has('{_FIRST}/{{name*}}') else model_parallel"},
    options={"model_parallel": Option("how many ranks to write", 1)},
    requires={
        "model_parallel == None or model_parallel > 0": "--set model_parallel={model_parallel}: expected 1 or more",
        _whole("(num_attention_heads or n_head)"): "--set model_parallel={model_parallel}: the model's heads are not divisible by that",
        _whole("(num_multi_query_heads or num_key_value_heads or multi_query_group_num)"): (
            "--set model_parallel={model_parallel}: the model's heads of keys and values are not divisible by that"
        ),
    },
)
SAT = Side(format="sat", ranks=(_RANK,), root="module", config="model_config.json")

_ADAPTED = "{p*}.{layer:query_key_value,key_value,dense,query}"
_COUNTS = {"query_key_value": 3, "key_value": 2, "dense": 1, "query": 1}


def _lora(layer: str, count: int) -> Rule:
    """The weight of a layer that is ``count`` matrices in one, each with two low-rank matrices A and B."""
    factors = [f"matrix_{matrix}.{k}" for matrix in "AB" for k in range(count)]
    return Rule(
        f"{{p*}}.{layer}.{{part:original.weight,{','.join(factors)}}}",
        f"{{p*}}.{layer}.weight",
        op={"op": "merge_lora", "merge": "merge_lora", "alpha": "lora_alpha"},
        optional=True,
    )


_LORA = Recipe(
    name="sat-merge-lora",
    summary="weights with their low-rank matrices merged into them",
    rules=(
        *(_lora(layer, count) for layer, count in _COUNTS.items()),
        Rule(f"{_ADAPTED}.original.bias", f"{_ADAPTED}.bias", optional=True),
        Rule("{name*}", "{name*}", fallback=True, optional=True),
    ),
    options={
        "merge_lora": Option("merge the low-rank matrices of a model tuned with SAT's LoraMixin into its weights", default=False),
        "lora_alpha": Option("alpha of the low-rank matrices, which are scaled by alpha / rank", 1),
    },
    requires={
        f"model_parallel_size == None or count('{_RANK}/{{name*}}') == model_parallel_size * count('{_FIRST}/{{name*}}')": (
            "model_config.json says {model_parallel_size} ranks, and there are not as many files of the same tensors: remove those that "
            "do not belong there, fetch the missing ones, or mend model_parallel_size"
        )
    },
    left=SAT,
)


TEXT_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "inner_hidden_size": "intermediate_size",
}
"""Keys of model_config.json that language models share -> those of config.json."""


@dataclass(frozen=True)
class Config:
    """What model_config.json and the other side's config.json have to do with each other.

    Attributes:
        model_class: of SAT's model.
        keys: key of model_config.json -> that of config.json, with dots.
        fixed: what model_config.json says of every such model.
        other: what config.json does.
    """

    model_class: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    def to_sat(self, model: Model) -> dict[str, Any]:
        """model_config.json, as SAT's save_checkpoint writes it; of a folder that has one, that with the number of ranks."""
        if model.sidecar or not model.config:
            return sat_files(model, model.sidecar)
        flat: dict[str, Any] = {"model_class": self.model_class, "tokenizer_type": model.options["tokenizer_type"], **self.fixed}
        for key, place in self.keys.items():
            value = find(model.config, place)
            if value is not None:
                flat[key] = value
        if "hidden_size" not in flat:
            return {}
        flat |= {key: [size, size] for key, size in flat.items() if key.endswith("image_size") and isinstance(size, int)}
        heads = flat.get("num_attention_heads")
        needless = {"tokenizer_type": None, "num_multi_query_heads": heads, "layernorm_epsilon": _EPSILON}
        if heads:
            needless["hidden_size_per_attention_head"] = flat["hidden_size"] // heads
        return sat_files(model, _nest({key: value for key, value in flat.items() if value != needless.get(key, _NEEDED)}))

    def to_hf(self, model: Model) -> dict[str, Any]:
        """config.json for model_config.json, unless there is one."""
        config = model.config
        if model.sidecar or not config:
            return {}
        implied = {"layernorm_epsilon": _EPSILON, "num_multi_query_heads": config.get("num_attention_heads")}
        implied |= {"inner_hidden_size": 4 * config["hidden_size"]} if "hidden_size" in config else {}
        values = {place: find(config, key) or implied.get(key, find(config, key)) for key, place in self.keys.items()}
        flat = {**self.other, **{place: value for place, value in values.items() if value is not None}}
        sides = {place: size for place, size in flat.items() if place.endswith("image_size") and isinstance(size, list)}
        flat |= {place: size[0] for place, size in sides.items() if len(set(size)) == 1}
        flat |= {key: value for key, value in model.options.items() if key == "tie_word_embeddings"}
        return {"config.json": {**_nest(flat), "torch_dtype": model.dtype}}


_EPSILON = 1e-5  # of norms, where model_config.json says nothing
_NEEDED = object()


def find(config: Mapping[str, Any], place: str) -> Any:
    """The value at a key with dots, or None."""
    value: Any = config
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of keys with dots as mappings in mappings."""
    nested: dict[str, Any] = {}
    for place, value in flat.items():
        *outer, last = place.split(".")
        table = nested
        for name in outer:
            table = table.setdefault(name, {})
        table[last] = value
    return nested


def sat_files(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """model_config.json with the number of ranks that are written, in the vision model's part too; nothing for an empty one."""
    if not config:
        return {}
    ranks = {"model_parallel_size": model.options["model_parallel"]}
    contents = {**config, **ranks}
    vision = config.get("eva_args")
    if isinstance(vision, Mapping):
        contents["eva_args"] = {**vision, **ranks}
    return {"model_config.json": contents}


def repartition_files(model: Model) -> dict[str, Any]:
    """model_config.json of the source, for another number of ranks."""
    return sat_files(model, model.config)


COMPUTED = "the model computes it"
KIND = "{kind:weight,bias}"


def inv_freq(name: str, size: str, base: int | str = 10000, like: str = "", when: str | None = None) -> Make:
    """The frequencies of a rotary embedding of ``size`` dimensions, which SAT's models want to load; of the dtype of ``like``."""
    op = {"op": "inv_freq", "dim": size, "base": base, **({"like": f"'{like}'"} if like else {})}
    return Make(name, COMPUTED, when=when, op=op)


def _merging_stages(right: Side) -> list[Recipe]:
    """The stages from ranks to a whole model."""
    return [_LORA, replace(_PARTITION.inverse("sat-merge"), options={}, right=right)]


def pair(
    name: str,
    title: str,
    *stages: tuple[Fact, ...],
    writes: tuple[Writer, Writer],
    reference: str,
    dims: Mapping[str, Dim] | None = None,
    options: Mapping[str, Option] | None = None,
    requires: Mapping[str, str] | None = None,
    hf: Side = PLAIN,
) -> tuple[Recipe, Recipe]:
    """``name-hf2sat`` and ``name-sat2hf`` from the facts between the Hugging Face side and a whole SAT model, in one or several stages.

    ``writes`` are what makes model_config.json, and config.json.
    """
    hf = replace(hf, writes=writes[1])
    all_options = {"tokenizer_type": Option("what model_config.json says of the tokenizer"), **(options or {})}
    parts = [Recipe(rules=sparse(*rules), dims=dims or {}) for rules in stages]
    parts[0] = replace(parts[0], options=all_options, requires=requires or {}, left=hf)
    back = chain(*parts).inverse("")
    there = replace(
        chain(*parts, replace(_PARTITION, right=replace(SAT, writes=writes[0]))),
        name=f"{name}-hf2sat",
        summary=f"{title}: Hugging Face layout to a SwissArmyTransformer folder",
        reference=REFERENCE + reference,
    )
    again = [replace(part, options=options or {}) if part.options else part for part in back.stages]
    return there, replace(
        chain(*_merging_stages(PLAIN), *again),
        name=f"{name}-sat2hf",
        summary=f"{title}: a SwissArmyTransformer folder, of any number of ranks, to Hugging Face layout",
        reference=there.reference,
    )


RECIPES = (
    replace(
        chain(*_merging_stages(SAT), replace(_PARTITION, right=replace(SAT, writes=repartition_files))),
        name="sat-repartition",
        summary="SwissArmyTransformer folders: any number of model-parallel ranks to any other",
        reference=REFERENCE + "sat/mpu/layers.py",
    ),
)
