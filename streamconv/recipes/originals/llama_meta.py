"""Llama: Meta's own checkpoints <-> Hugging Face, and what Mistral's and Mixtral's originals have in common with them.

Facts: ``models/llama/convert_llama_weights_to_hf.py`` of transformers 4.57, and Meta's fairscale layers for the partition over ranks.
Where the script has to be told, these rules look: ranks are counted, the embedding's axis and the feed-forward size come from shapes,
key and value heads that ranks repeat (fewer heads than ranks) are taken once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.recipe import Drop, Make, Model, Option, Recipe, Rule, Side, Tie, from_config

_HF, _OWN = "model.layers.{i}", "layers.{i}"
_RANK = "consolidated.{r:02}.pth"
_EVERY_RANK = "consolidated.{r=*:02}.pth"

WIDTH = f"(shape('model.norm.weight') or shape('norm.weight') or shape('{_RANK}/norm.weight'))[0]"
HEAD = f"(has('lm_head.weight') or has('output.weight') or has('{_RANK}/output.weight'))"

# Whoever says that the head is tied gets what the script does, and it is not compared with the embedding.
_ASKED = "has('norm.weight') and ('tied' in given or 'llama_version' in given)"

ATTENTION = (
    Rule("model.embed_tokens.weight", "tok_embeddings.weight"),
    # Half of a head's rows, then the other half, against pairs of rows: how the two sides lay out what is rotated together.
    Rule(f"{_HF}.self_attn.{{q,k}}_proj.weight", f"{_OWN}.attention.{{wq,wk}}.weight", "(h two j) c -> (h j two) c"),
    Rule(f"{_HF}.self_attn.{{v,o}}_proj.weight", f"{_OWN}.attention.{{wv,wo}}.weight"),
    Rule(f"{_HF}.{{input,post_attention}}_layernorm.weight", f"{_OWN}.{{attention_norm,ffn_norm}}.weight"),
    Rule("model.norm.weight", "norm.weight"),
    Rule("lm_head.weight", "output.weight", when="not tied"),
    Tie("model.embed_tokens.weight", "output.weight", "tok_embeddings.weight", when=f"tied and not ({_ASKED})"),
    Make("output.weight", "Hugging Face's side has the embedding for it", when=f"tied and {_ASKED}"),
    Drop(f"{_HF}.self_attn.rotary_emb.inv_freq", "the model computes it from its config"),
    Make("rope.freqs", "the model computes it from its config"),
    Make(f"{_OWN}.attention.inner_attention.rope.freqs", "the model computes it from its config"),
)
"""All but the feed-forward layers; option ``tied`` says whether Hugging Face's side has no head of its own."""

RULES = (
    *ATTENTION,
    Rule(f"{_HF}.mlp.{{gate,down,up}}_proj.weight", f"{_OWN}.feed_forward.{{w1,w2,w3}}.weight"),
)

DIMS: dict[str, Any] = {"i": "n_layers", "two": 2, "h": {"q": "=n_heads", "k": "=n_kv_heads"}}

ROPE = "(config.rope_scaling.rope_type or config.rope_scaling.type or config.rope_parameters.rope_type)"
SILU = {"config.hidden_act in [None, 'silu']": "the original's code has no activation but silu, config.json says {config[hidden_act]}"}

_RANKED = "model_parallel > 0"


def _partition(name: str, layout: str | None, rank: str = _RANK, **more: Any) -> Rule:
    """What the files of ranks, called by the pattern ``rank``, hold of a tensor."""
    return Rule(name, f"{rank}/{name}", layout, sparse=True, **{"when": _RANKED, **more})


def heads(prefix: str = "") -> dict[str, Option]:
    """The numbers of layers and heads, from params.json, below ``prefix`` too, or from config.json."""

    def keys(own: str, hf: str) -> str:
        return " ".join([own, *([f"{prefix}.{own}"] if prefix else []), hf])

    options = from_config(
        n_layers=keys("n_layers", "num_hidden_layers"),
        n_heads=keys("n_heads", "num_attention_heads"),
        n_kv_heads=keys("n_kv_heads", "num_key_value_heads"),
    )
    keys_of_kv = str(options["n_kv_heads"].default)[1:-1]
    return {
        **options,
        "n_heads": replace(options["n_heads"], required=True),
        "n_kv_heads": replace(options["n_kv_heads"], default=f"{{{keys_of_kv} or n_heads}}"),
    }


def ranks(rows: str, default: str, by_rows: str) -> dict[str, Option]:
    """How tensors are shared among ranks.

    Args:
        rows: how many the query matrix has in all.
        default: how many ranks there are to make.
        by_rows: whether they then share the embedding's rows.
    """
    mine = f"{_RANK}/tok_embeddings.weight"
    count = f"{rows} // shape('{_RANK}/layers.{{i}}.attention.wq.weight')[0] or count('{mine}')"
    return {
        "model_parallel": Option(
            "how many ranks there are; by default as many as in SRC", default=f"{{{count} or ({default})}}", kind="int"
        ),
        "embedding": Option(
            "what ranks share of the embedding; by default as its shape in SRC says",
            default=f"{{'rows' if ({WIDTH} == shape('{mine}')[1] if has('{mine}') else {by_rows}) else 'columns'}}",
            choices=("rows", "columns"),
        ),
    }


def _params(key: str) -> str:
    return f"(config.{key} or config.model.{key})"


_SCALED = f"{ROPE} == 'llama3'"
_FACTOR = "(config.rope_scaling.factor or config.rope_parameters.factor)"
_LARGE = f"({_params('vocab_size')} or 0) >= 128000"
# Llama 1's 65B is the one of its models with this epsilon, and has no grouped heads, unlike Llama 2's 70B.
_SECOND = (
    f"({_params('n_kv_heads')} or {_params('norm_eps')} == 1e-05 and {_params('n_layers')} != 80"
    " or (config.max_position_embeddings or 0) > 2048)"
)


CONTEXT = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072, "3.2": 131072, "Guard-3": 131072}


def common_config(model: Model, eps: object, theta: float) -> dict[str, Any]:
    """What the config.json of Llama, Mistral and Mixtral have in common; sizes are those of the tensors, (V, D) the embedding's."""
    vocab, width = model.targets["model.embed_tokens.weight"].shape
    options = model.options
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": model.dtype,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "num_attention_heads": options["n_heads"],
        "num_hidden_layers": sum(name.endswith(".input_layernorm.weight") for name in model.targets),
        "num_key_value_heads": options["n_kv_heads"],
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": options["tied"],
        "use_cache": True,
        "vocab_size": vocab,
    }


def hf_files(model: Model) -> dict[str, Any]:
    """config.json and generation_config.json as transformers' script has them, unless there is a config.json."""
    nested = model.config.get("model")
    params = nested if isinstance(nested, Mapping) else model.config
    if model.sidecar or "norm_eps" not in params:
        return {}
    version, theta = model.options["llama_version"], params.get("rope_theta") or 10000.0
    own: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common_config(model, params["norm_eps"], theta),
        "attention_bias": False,
        "intermediate_size": model.targets["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "max_position_embeddings": 16384 if theta > 10000 and version in ("1", "2") else CONTEXT[version],  # Code Llama's
        "mlp_bias": False,
        "rope_scaling": None,
    }
    own["head_dim"] = own["hidden_size"] // own["num_attention_heads"]
    if version in ("3.1", "3.2", "Guard-3"):
        own["rope_scaling"] = {
            "factor": 32.0 if version == "3.2" else 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    if version not in ("1", "2"):
        own["bos_token_id"] = 128000
        own["eos_token_id"] = [128001, 128008, 128009] if model.options["instruct"] else 128001
    tokens = {key: own[key] for key in ("bos_token_id", "eos_token_id")}
    return {"config.json": own, "generation_config.json": {**tokens, "do_sample": True, "temperature": 0.6, "top_p": 0.9}}


def rope_theta(config: Mapping[str, Any], default: float = 10000.0) -> float:
    """The base of the rotary embedding as any version of transformers writes it."""
    theta: float = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or default
    return theta


def meta_files(model: Model) -> dict[str, Any]:
    """params.json for Meta's code, with no key that a version of it does not know, unless there is one."""
    config, options = model.config, model.options
    if model.sidecar or "rms_norm_eps" not in config:
        return {}
    vocab, width = model.sources["model.embed_tokens.weight"].shape
    hidden = model.sources["model.layers.0.mlp.gate_proj.weight"].shape[0]
    layers = sum(name.endswith(".input_layernorm.weight") for name in model.sources)
    own: dict[str, Any] = {"dim": width, "n_layers": layers, "n_heads": options["n_heads"]}
    if options["n_kv_heads"] != options["n_heads"]:
        own["n_kv_heads"] = options["n_kv_heads"]
    own |= {"vocab_size": vocab, **_feed_forward(width, hidden), "norm_eps": config["rms_norm_eps"]}
    theta = rope_theta(config)
    if theta != 10000 or options["llama_version"] not in ("1", "2"):
        own["rope_theta"] = theta
    if options["llama_version"] in ("3.1", "3.2", "Guard-3"):
        own["use_scaled_rope"] = True
    return {"params.json": own}


def _feed_forward(width: int, hidden: int) -> dict[str, float]:
    """The two numbers of which Meta's code computes the size of its feed-forward layers: those of a known model, or others that fit."""
    base = int(8 * width / 3)
    divisor = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if hidden % size == 0)
    own = (hidden - (divisor - 1) / 2 + 0.25) / base  # the middle of what is rounded up to this size
    published = [(256, None), (256, 1.5), (4096, 1.3), (4096, 1.2), (1024, 1.3), (divisor, None)]
    rounded = [(divisor, round(own, digits)) for digits in (2, 4, 8)]
    for multiple, factor in (*published, *rounded, (divisor, own)):
        if -(-int((factor or 1) * base) // multiple) * multiple == hidden:
            return {"multiple_of": multiple} | ({"ffn_dim_multiplier": factor} if factor else {})
    raise AssertionError("the middle always fits")


RANKS = Side(
    format="torch",
    ranks=(_RANK, "consolidated.{r}.pth"),
    config="params.json",
    aliases=(("consolidated.{r}.pth/{rest*}", f"{_RANK}/{{rest*}}"),),
    expects=("tokenizer.model",),
    writes=meta_files,
)

PARTITION = Recipe(
    name="model-parallel",
    summary="whole tensors to the parts that ranks hold",
    rules=(
        _partition("tok_embeddings.weight", "(r v) c -> r v c", when=f"{_RANKED} and embedding == 'rows'"),
        _partition("tok_embeddings.weight", "v (r c) -> r v c", when=f"{_RANKED} and embedding == 'columns'"),
        _partition(f"{_OWN}.attention.wq.weight", "(r g d) c -> r (g d) c"),
        _partition(f"{_OWN}.attention.{{wk,wv}}.weight", "(r g d) c -> r (g d) c", "consolidated.{r//repeats:02}.pth"),
        _partition(f"{_OWN}.attention.wo.weight", "c (r g d) -> r c (g d)"),
        _partition(f"{_OWN}.feed_forward.{{w1,w3}}.weight", "(r f) c -> r f c"),
        _partition(f"{_OWN}.feed_forward.w2.weight", "c (r f) -> r c f"),
        _partition(f"{_OWN}.{{attention_norm,ffn_norm}}.weight", None, _EVERY_RANK),
        _partition("norm.weight", None, _EVERY_RANK),
        _partition("output.weight", "(r v) c -> r v c", optional=True),
        _partition("rope.freqs", None, _EVERY_RANK, optional=True),
        _partition(f"{_OWN}.attention.inner_attention.rope.freqs", None, _EVERY_RANK, optional=True),
        Rule("{rest*}", "{rest*}", when=f"not {_RANKED}"),
    ),
    dims={"r": "=model_parallel", "repeats": "max(1, model_parallel // n_kv_heads)", "d": f"=head_dim or {WIDTH} // n_heads"},
    right=RANKS,
)
"""The partition over ranks; option ``model_parallel`` says how many there are, 0: tensors are whole, in files of any kind."""

_LLAMA = Recipe(
    name="llama-hf2meta",
    summary="Llama: Hugging Face to Meta's consolidated.NN.pth, one for each model-parallel rank",
    rules=RULES,
    dims={**DIMS, "j": f"={WIDTH} // n_heads // 2"},
    options={
        **heads("model"),
        "llama_version": Option(
            "which Llama it is: says the context length, rope scaling, token ids and how ranks share the embedding; by default judged"
            " from rope scaling, vocabulary and norm epsilon",
            default=f"{{('3.2' if not {HEAD} or {_params('dim')} in [2048, 3072] else '3.1') if {_params('use_scaled_rope')}"
            f" else ('3.2' if {_FACTOR} == 32 else '3.1') if {_SCALED} else '3' if {_LARGE} else '2' if {_SECOND} else '1'}}",
            choices=("1", "2", "3", "3.1", "3.2", "Guard-3"),
        ),
        "instruct": Option("whether it is tuned on instructions, whose turns end in tokens of their own (Llama 3)", default=False),
        **ranks(WIDTH, default="0 if has('norm.weight') else 1", by_rows="llama_version not in ['1', '2']"),
        "tied": Option(
            "whether the head is the embedding, which Hugging Face's side then stores once; Meta's repeats it",
            default=f"{{config.tie_word_embeddings == True and not {HEAD} if has('model.norm.weight') else llama_version == '3.2'}}",
            kind="bool",
        ),
    },
    requires={
        **SILU,
        f"{ROPE} in [None, 'default', 'llama3']": "Meta's code scales rope in Llama 3's way alone, config.json says another",
    },
    reference="transformers 4.57 models/llama/convert_llama_weights_to_hf.py",
    left=Side(writes=hf_files, expects=("tokenizer_config.json",)),
    then=PARTITION,
)

RECIPES = (
    _LLAMA,
    _LLAMA.inverse("llama-meta2hf", "Llama: Meta's consolidated.NN.pth, of any number of model-parallel ranks, to Hugging Face"),
)
