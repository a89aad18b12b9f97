"""TeleChat, TeleChat2 and TeleChat3 in MindSpore Transformers.

Facts: mindformers r1.5.0 (ece44cc) ``research/{telechat,telechat2}/convert_{weight,reversed}.py``, for experts and TeleChat3 master
(f52743c). Their way back writes names for tensors, forgets experts and prefixes, or gives TeleChat3 the names of TeleChat2; here it is the
inverse of the way there.
"""

from __future__ import annotations

from streamconv.recipe import Drop, Fact, Option, Recipe, Rule, from_config
from streamconv.recipes.mindspore.mindformers import HF, LAYER_COUNT, LORA, MS, PET, TRAINING, both_ways, linear

_OWN = "model.layers.{i}"
_FACTORS = (f"{PET},{LORA}", f"{PET},{LORA}")  # which the scripts do not know and leave as they are


def _around(embedding: str, norm: str, when: str | None = None) -> tuple[Rule, ...]:
    """Embedding and last norm."""
    return (
        Rule(embedding, "model.tok_embeddings.embedding_weight", when=when),
        Rule(norm, "model.norm_out.weight", when=when),
    )


def _layer(left: str, attention: tuple[str, str], own_attention: tuple[str, str], when: str | None = None) -> tuple[Fact, ...]:
    """A layer but for its MLP: norms, what goes into attention, and what comes out."""
    return (
        Rule(f"{left}.{{input,post_attention}}_layernorm.weight", f"{_OWN}.{{attention,ffn}}_norm.weight", when=when),
        *_linear(left, attention[0], own_attention[0], when),
        *_linear(left, attention[1], own_attention[1], when),
        Drop(f"{left}.{{part:self_attention,self_attn}}.rotary_emb.inv_freq", "the model computes it from its config", when=when),
    )


def _linear(left: str, part: str, own: str, when: str | None = None) -> tuple[Rule, ...]:
    return linear(f"{left}.{part}", f"{_OWN}.{own}", _FACTORS, when)


def _mlp(left: str, when: str | None = None) -> tuple[Rule, ...]:
    return (
        *_linear(left, "mlp.{part:gate,up}_proj", "feed_forward.w{part:1,3}", when),
        *_linear(left, "mlp.down_proj", "feed_forward.w2", when),
    )


_ATTENTION = ("self_attention.{part:query,key_value}", "self_attention.dense"), ("attention.w{part:q,k_v}", "attention.wo")
_HEAD = Rule("lm_head.weight", "lm_head.weight", optional="False not in [config.tie_word_embeddings, sidecar.tie_word_embeddings]")


def _telechat(prefix: str, when: str) -> tuple[Fact, ...]:
    layer = f"{prefix}h.{{i}}"
    return (
        *_around(f"{prefix}word_embeddings.weight", f"{prefix}ln_f.weight", when),
        *_layer(layer, *_ATTENTION, when),
        *_mlp(layer, when),
    )


_TELECHAT = Recipe(
    name="telechat-hf2ms",
    summary="TeleChat: Hugging Face to MindSpore",
    rules=(
        *_telechat("", "telechat_type == 'telechat_7b'"),
        *_telechat("transformer.", "telechat_type == 'telechat_12b'"),
        Rule("lm_head.weight", "lm_head.weight", when="telechat_type == 'telechat_12b'"),
        *TRAINING,
    ),
    dims=LAYER_COUNT,
    options={
        "telechat_type": Option(
            "whose names: the 12B model has a head of its own, and its names start with transformer",
            default="{'telechat_12b' if has('lm_head.weight') or has('transformer.{rest*}') else 'telechat_7b'}",
            choices=("telechat_7b", "telechat_12b"),
        )
    },
    left=HF,
    right=MS,
    reference="mindformers r1.5.0 (ece44cc), research/telechat/convert_{weight,reversed}.py and convert_weight_torch_to_ms.py",
)

_LAYER = "transformer.h.{i}"
_EXPERTS, _OWN_EXPERTS = f"{_LAYER}.mlp.local_experts", f"{_OWN}.feed_forward.ffn"
_ROUTER, _OWN_ROUTER = f"{_LAYER}.mlp.router", f"{_OWN}.feed_forward.router.dense"
_SPARSE = f"has('{_ROUTER}.weight') or has('{_OWN_ROUTER}.weight')"
_EXPERT_COUNT = {"e": "=num_experts"}
_PARTS, _OWN_PARTS = "{part:gate,up,down}_proj", "w{part:1,3,2}"

_ROUTER_AND_EXPERTS = "some layers have a router or experts, but not both: mend the source"


def _require_parts(norm: str, mlp: str, expert: str, *parts: str) -> dict[str, str]:
    """That each layer, which has a ``norm``, has each of these parts in its MLP or in an expert, and all layers biases or none."""
    requires = {}
    for part in parts:
        for kind, or_none in (("weight", ""), ("bias", ", 0")):
            count = f"count('{mlp}.{part}.{kind}') + count('{expert}.{part}.{kind}')"
            problem = f"some layers have no {kind} of {part}, of their own or of experts, and others do: mend the source"
            requires[f"{count} in [count('{norm}.weight'){or_none}]"] = problem
    return requires


_TELECHAT2 = Recipe(
    name="telechat2-hf2ms",
    summary="TeleChat2: Hugging Face to MindSpore, experts stacked",
    rules=(
        *_around("transformer.word_embeddings.weight", "transformer.ln_f.weight"),
        _HEAD,
        *_layer(_LAYER, *_ATTENTION),
        *_mlp(_LAYER, f"not ({_SPARSE})"),
        # Where there are experts, some layers may have none.
        Rule(
            f"{_LAYER}.mlp.{_PARTS}.{{kind:weight,bias}}",
            f"{_OWN}.feed_forward.{_OWN_PARTS}.{{kind:weight,bias}}",
            when=_SPARSE,
            optional=True,
            sparse=True,
        ),
        Rule(f"{_ROUTER}.{{kind:weight,bias}}", f"{_OWN_ROUTER}.{{kind:weight,bias}}", when=_SPARSE, sparse=True),
        Rule(
            f"{_EXPERTS}.{{e}}.{_PARTS}.weight",
            f"{_OWN_EXPERTS}.{_OWN_PARTS}.weight",
            "e o c -> e o c",
            _EXPERT_COUNT,
            when=_SPARSE,
            sparse=True,
        ),
        Rule(
            f"{_EXPERTS}.{{e}}.{_PARTS}.bias",
            f"{_OWN_EXPERTS}.{_OWN_PARTS}.bias",
            "e o -> 1 e 1 o",
            _EXPERT_COUNT,
            when=_SPARSE,
            optional=True,
            sparse=True,
        ),
        *TRAINING,
    ),
    dims=LAYER_COUNT,
    options={
        "num_experts": Option(
            "how many experts a layer has",
            default=f"{{config.num_experts or sidecar.num_experts or (shape('{_ROUTER}.weight') or shape('{_OWN_ROUTER}.weight'))[0]}}",
            kind="int",
        )
    },
    requires={
        **_require_parts(f"{_LAYER}.input_layernorm", f"{_LAYER}.mlp", f"{_EXPERTS}.0", "gate_proj", "up_proj", "down_proj"),
        **_require_parts(f"{_OWN}.attention_norm", f"{_OWN}.feed_forward", _OWN_EXPERTS, "w1", "w3", "w2"),
        f"count('{_ROUTER}.weight') == count('{_EXPERTS}.0.up_proj.weight')": _ROUTER_AND_EXPERTS,
        f"count('{_OWN_ROUTER}.weight') == count('{_OWN_EXPERTS}.w3.weight')": _ROUTER_AND_EXPERTS,
    },
    left=HF,
    right=MS,
    reference="mindformers r1.5.0 (ece44cc), with experts master (f52743c), research/telechat2/convert_{weight,reversed}.py",
)

_FUSED, _OUT = (f"{_OWN}.attention.{part}.weight" for part in ("w_qkv", "wo"))

_FUSE = Recipe(
    name="telechat2-ms-fuse",
    summary="TeleChat2 in MindSpore: q, k, v in one tensor, gate and up in one tensor",
    rules=(
        Rule(f"{_OWN}.attention.{{wq,wk_v}}.weight", _FUSED, "(H d) c, (K (d + d)) c -> (H d + K d + K d) c"),
        Rule(
            f"{_OWN}.feed_forward.{{w1,w3}}.weight",
            f"{_OWN}.feed_forward.w_gate_hidden.weight",
            "f c, f c -> (f + f) c",
            optional=True,
        ),
        Rule("{rest*}", "{rest*}", fallback=True),
    ),
    dims={**LAYER_COUNT, "H": "=n_head", "K": "=num_key_value_heads"},
    options=from_config(n_head="n_head num_attention_heads", num_key_value_heads="num_key_value_heads n_head num_attention_heads"),
    requires={
        # Another number may divide the rows too.
        f"not has('{_FUSED}') or shape('{_FUSED}')[0] * n_head == shape('{_OUT}')[1] * (n_head + 2 * num_key_value_heads)": (
            "the rows of w_qkv are not those of n_head={n_head} and num_key_value_heads={num_key_value_heads}: set the model's own"
        ),
    },
    left=MS,
    right=MS,
    reference="mindformers r1.5.0 (ece44cc), research/telechat2/convert_weight.py --qkv_concat",
)

_MAPPING = "model.embedding_hidden_mapping_{in,out}.weight"

_TELECHAT3 = Recipe(
    name="telechat3-hf2ms",
    summary="TeleChat3: Hugging Face to MindSpore",
    rules=(
        *_around("model.embed_tokens.weight", "model.norm.weight"),
        _HEAD,
        Rule(_MAPPING, _MAPPING, optional=True),
        *_layer(_OWN, ("self_attn.{part:q,k,v}_proj", "self_attn.o_proj"), ("attention.w{part:q,k,v}", "attention.wo")),
        *_mlp(_OWN),
        *TRAINING,
    ),
    dims=LAYER_COUNT,
    left=HF,
    right=MS,
    reference="mindformers master (f52743c), research/telechat3/convert_{weight,reversed}.py",
)

RECIPES = (
    *both_ways(_TELECHAT),
    *both_ways(_TELECHAT2),
    *both_ways(_TELECHAT3),
    _FUSE,
    _FUSE.inverse("telechat2-ms-unfuse", "TeleChat2 in MindSpore: q, k, v and gate, up taken apart"),
)
