"""What holds of every family of MindSpore Transformers: what is lost and what is refused, dtypes, containers, where sizes come from.

The models are those of the golden cases, and the newer ones of DeepSeek and Qwen, which go by their family's recipe.
"""

import itertools
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import golden_cases
import pytest
import torch
from checkpoint_files import assert_same, first_and_last, numbered, read_any, run, write, write_bin, write_ckpt
from mindformers_models import LLAMA, config_of, llama, stacked, table_of

from streamconv import recipes
from streamconv.checkpoint.opening import open_checkpoint
from streamconv.dtypes import parse_dtype
from streamconv.errors import CoverageError
from streamconv.notation.names import parse as parse_names

ROOTS = {"swin": "model", "vit": "model", "mae": "model"}  # the key below which a family's files hold tensors


# The models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A checkpoint of a family, on either side: its tensors, its config, and what the recipe is told."""

    recipe: str
    back: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def family(self):
        return self.recipe.rpartition("-")[0]

    def write(self, folder, *, config=True, extra=None):
        """As its framework stores it."""
        tensors, config = self.tensors | (extra or {}), self.config if config else None
        if self.recipe.endswith("ms2hf"):
            return write_ckpt(folder, tensors, config=config)
        if self.family in ROOTS:
            return write_bin(folder, {ROOTS[self.family]: tensors}, config=config)
        return write(folder, tensors, shards=2, config=config)


def golden(name):
    case = golden_cases.load(name)
    tensors = golden_cases.source_tensors(case)
    for name in tensors:  # which every model of DeepSeek-V3 repeats
        for part, first in ((".embed_tokens.weight", "model.embed_tokens.weight"), (".shared_head.head.weight", "lm_head.weight")):
            if name.endswith(part) and first in tensors:
                tensors[name] = tensors[first].clone()
    for name in tensors:  # the same in all layers
        if name.endswith(".self_attn.rotary_emb.inv_freq"):
            tensors[name] = next(tensor for other, tensor in tensors.items() if other.endswith(".self_attn.rotary_emb.inv_freq")).clone()
    words = golden_cases.options_of(case)[1::2]
    return Model(*golden_cases.recipes_of(case), tensors, case["config"], dict(word.split("=", 1) for word in words))


V2 = {"q": 12, "heads": 3, "nope": 4, "rope": 2, "v": 5, "latent": 6, "low": 7, "width": 10, "inner": 9, "moe": 4, "experts": 11}


def deepseek_v2(*, low_rank=True, layers=3, dense=1, dtype=torch.bfloat16):
    s = V2
    heads, width = s["heads"], s["width"]
    shapes = {"model.embed_tokens.weight": (13, width)}
    for i in range(layers):
        at, attention, mlp = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        rows = heads * (s["nope"] + s["rope"])
        if low_rank:
            shapes |= {f"{attention}.q_a_proj.weight": (s["low"], width), f"{attention}.q_b_proj.weight": (rows, s["low"])}
            shapes[f"{attention}.q_a_layernorm.weight"] = (s["low"],)
        else:
            shapes[f"{attention}.q_proj.weight"] = (rows, width)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (s["latent"] + s["rope"], width)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (s["latent"],)
        shapes[f"{attention}.kv_b_proj.weight"] = (heads * (s["nope"] + s["v"]), s["latent"])
        shapes[f"{attention}.o_proj.weight"] = (width, heads * s["v"])
        places = [(mlp, s["inner"])] if i < dense else [(f"{mlp}.shared_experts", 2 * s["moe"])]
        if i >= dense:
            shapes[f"{mlp}.gate.weight"] = (s["experts"], width)
            places += [(f"{mlp}.experts.{e}", s["moe"]) for e in range(s["experts"])]
        shapes |= linears(places, width)
        shapes |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    return numbered(shapes | {"model.norm.weight": (width,), "lm_head.weight": (13, width)}, dtype)


def linears(places, width):
    found = {}
    for at, inner in places:
        found |= {
            f"{at}.gate_proj.weight": (inner, width),
            f"{at}.up_proj.weight": (inner, width),
            f"{at}.down_proj.weight": (width, inner),
        }
    return found


def qwen2_moe(*, experts=11, layers=2, dtype=torch.bfloat16):
    tensors = {name: tensor for name, tensor in llama(4, 2, 3, 12, 5, layers, bias="qkv", dtype=dtype).items() if ".mlp." not in name}
    shapes = {}
    for i in range(layers):
        mlp = f"model.layers.{i}.mlp"
        shapes |= {f"{mlp}.gate.weight": (experts, 12), f"{mlp}.shared_expert_gate.weight": (1, 12)}
        shapes |= linears([(f"{mlp}.shared_expert", 7), *((f"{mlp}.experts.{e}", 5) for e in range(experts))], 12)
    return tensors | numbered(shapes, dtype)


CASES = {
    path.stem.removeprefix("mindformers-"): f"{folder}/{path.stem}"
    for folder in ("mindformers", "mindformers-extra")
    for path in sorted((golden_cases.FOLDER / folder).glob("*.json"))
}
QWEN2_SIZES = (4, 2, 3, 12, 5, 2)
MODELS = {name: golden(path) for name, path in CASES.items()} | {
    "deepseek-v2": Model("deepseek-hf2ms", "deepseek-ms2hf", deepseek_v2(), {"num_hidden_layers": 3}),
    "deepseek-v2-lite": Model("deepseek-hf2ms", "deepseek-ms2hf", deepseek_v2(low_rank=False), None, {"use_gmm": "true"}),
    "qwen1.5, qwen2": Model("qwen-hf2ms", "qwen-ms2hf", llama(*QWEN2_SIZES, bias="qkv"), config_of(*QWEN2_SIZES)),
    "qwen2-moe": Model("qwen-hf2ms", "qwen-ms2hf", qwen2_moe(), {"num_hidden_layers": 2}),
    "glm, wide": Model("glm-hf2ms", "glm-ms2hf", {n: t.float() for n, t in golden(CASES["glm-forward-a"]).tensors.items()}),
}
FORWARD = [name for name, model in MODELS.items() if model.recipe.endswith("-hf2ms")]
REVERSE = [name for name, model in MODELS.items() if model.recipe.endswith("-ms2hf")]
FAMILIES = sorted({MODELS[name].family for name in FORWARD})


def as_words(options):
    return [word for name, value in options.items() for word in ("--set", f"{name}={value}")]


def converted(source, target, recipe, *more):
    assert run("convert", source, target, "--recipe", recipe, "--quiet", *more) == 0
    return read_any(target)


def test_every_family_has_models():
    known = {recipe.name for recipe in recipes.registry().values() if recipe.name.endswith(("-hf2ms", "-ms2hf"))}
    assert {way for name in FORWARD for way in (MODELS[name].recipe, MODELS[name].back)} == known


# DeepSeek-V2, Qwen1.5, Qwen2, Qwen2-MoE -----------------------------------------------------------------------------

# As in test_mindformers_llama, what the scripts do to names; experts are stacked after it.
DEEPSEEK_V2 = [
    ("embed_tokens.weight", "tok_embeddings.embedding_weight"),
    (".self_attn.q_proj.", ".attention.q_proj."),
    (".self_attn.q_a_proj.", ".attention.q2l_proj."),
    (".self_attn.q_a_layernorm.", ".attention.lq_norm."),
    (".self_attn.q_b_proj.", ".attention.l2q_proj."),
    (".self_attn.kv_a_proj_with_mqa.", ".attention.kv2l."),
    (".self_attn.kv_a_layernorm.", ".attention.lkv_norm."),
    (".self_attn.kv_b_proj.", ".attention.lkv2kv."),
    (".self_attn.o_proj.", ".attention.wo."),
    ("mlp.gate_proj.", "feed_forward.w1."),
    ("mlp.down_proj.", "feed_forward.w2."),
    ("mlp.up_proj.", "feed_forward.w3."),
    ("mlp.experts.", "feed_forward.routed_experts.ffn."),
    ("mlp.shared_experts.", "feed_forward.shared_experts."),
    ("mlp.shared_expert.", "feed_forward.shared_experts."),
    ("mlp.shared_expert_gate.", "feed_forward.shared_experts_gate."),
    ("mlp.gate.", "feed_forward.routed_experts.router.dense."),
    ("gate_proj.", "w1."),
    ("down_proj.", "w2."),
    ("up_proj.", "w3."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    ("model.norm.", "model.norm_out."),
]
QWEN2_MOE = [*LLAMA[1:5], *DEEPSEEK_V2]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_gmm", [False, True])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize(("layers", "dense"), [(3, 1), (2, 0), (12, 2)])
def test_deepseek_v2(tmp_path, layers, dense, low_rank, use_gmm):
    tensors = deepseek_v2(low_rank=low_rank, layers=layers, dense=dense)
    source = write(tmp_path / "hf", tensors, shards=2, config={"num_hidden_layers": layers})
    options = as_words({"use_gmm": use_gmm})
    wanted = stacked(table_of(tensors, DEEPSEEK_V2), transposed=use_gmm)
    wanted = {name: tensor.float() if "norm" in name or "dense" in name else tensor for name, tensor in wanted.items()}
    assert_same(converted(source, tmp_path / "ms", "deepseek-hf2ms", *options), wanted)
    assert_same(converted(tmp_path / "ms", tmp_path / "back", "deepseek-ms2hf", "--dtype", "bf16", *options), tensors)


@pytest.mark.parametrize("use_gmm", [False, True])
@pytest.mark.parametrize("experts", [2, 11])
def test_qwen2_moe(tmp_path, experts, use_gmm):
    tensors = qwen2_moe(experts=experts)
    source = write(tmp_path / "hf", tensors, shards=2)
    options = as_words({"use_gmm": use_gmm})
    found = converted(source, tmp_path / "ms", "qwen-hf2ms", *options)
    assert_same(found, stacked(table_of(tensors, QWEN2_MOE), transposed=use_gmm))
    assert_same(converted(tmp_path / "ms", tmp_path / "back", "qwen-ms2hf", *options), tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_goes_by_qwen(tmp_path, tied):
    tensors = llama(6, 2, 4, 24, 15, 3, bias="qkv", head=not tied)
    config = {"num_hidden_layers": 3, "tie_word_embeddings": tied}
    source = write(tmp_path / "hf", tensors, config=config)
    found = converted(source, tmp_path / "ms", "qwen-hf2ms")
    assert_same(found, converted(source, tmp_path / "other", "qwen2_5-hf2ms"))
    assert "lm_head.weight" in found
    assert_same(converted(tmp_path / "ms", tmp_path / "back", "qwen-ms2hf"), tensors)


# What is lost -------------------------------------------------------------------------------------------------------

LAYER, BLOCK = "model.layers.0", "transformer.h.0"
_BUFFER = (f"{LAYER}.self_attn.rotary_emb.inv_freq",)
DROPPED = {  # by family, beside what the models hold
    **dict.fromkeys(["llama", "yi", "deepseek", "baichuan2", "mixtral", "qwen2_5", "telechat3"], _BUFFER),
    "internlm2": (f"{LAYER}.attention.rotary_emb.inv_freq",),
    "qwenvl": (f"{BLOCK}.attn.masked_bias", f"{BLOCK}.attn.rotary_emb.inv_freq", "transformer.rotary_emb.inv_freq"),
    "qwen": (f"{BLOCK}.attn.masked_bias", f"{BLOCK}.attn.rotary_emb.inv_freq", "transformer.rotary_emb.inv_freq"),
    "gpt": ("lm_head.weight",),
    "wizardcoder": (f"{BLOCK}.attn.bias", f"{BLOCK}.attn.masked_bias"),
    "telechat": ("h.0.self_attention.rotary_emb.inv_freq",),
    "telechat2": (f"{BLOCK}.self_attention.rotary_emb.inv_freq",),
}
OTHERWISE = {  # by model
    "telechat_12b-forward-a": (f"{BLOCK}.self_attention.rotary_emb.inv_freq",),
    "qwen1.5, qwen2": _BUFFER,
    "qwen2-moe": (),
}
FEWER = {"gpt": {"layers": "1"}, "wizardcoder": {"layers": "1"}, "deepseek3": {"num_layers": "1", "num_nextn_predict_layers": "0"}}


def lost_between(before, after):
    """Names of the tensors that are gone, and of those that are there in another dtype."""
    assert set(after) <= set(before)
    casts = {name for name in after if before[name].dtype != after[name].dtype}
    assert_same({n: t for n, t in after.items() if n not in casts}, {n: t for n, t in before.items() if n in after and n not in casts})
    return set(before) - set(after), casts


def check_lost(recipe, found):
    """What is lost is what the recipe of the way back says, and nothing that it says is not."""
    gone, casts = (set().union(*each) for each in zip(*found, strict=True))
    says = dict(line.split(": ", 1) for line in recipes.get(recipe).lost)
    said = {pattern: {name for name in gone if parse_names(pattern).match(name) is not None} for pattern in says}
    assert set().union(*said.values()) == gone
    for pattern, why in says.items():
        assert said[pattern] or "not made again" not in why, f"{recipe} says that it loses {pattern}, and does not"
    assert bool(casts) == any("keeps its dtype" in why for why in says.values())


@pytest.mark.sampled(7)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_lost_is_what_the_recipe_says(tmp_path, family):
    here, there = [], []
    for name in FORWARD:
        model = MODELS[name]
        if model.family != family:
            continue
        extra = numbered(dict.fromkeys(OTHERWISE.get(name, DROPPED.get(family, ())), (3,)))
        tied = {"tie_word_embeddings": "true"} if family == "wizardcoder" and "lm_head.weight" not in model.tensors else {}
        source = model.write(tmp_path / name / "hf", extra=extra)
        own = converted(source, tmp_path / name / "ms", model.recipe, *as_words(model.options))
        state = {f"adam_m.{next(iter(own))}": torch.ones(2), "global_step": torch.tensor(3)}
        trained = write_ckpt(tmp_path / name / "own", own | state, config=model.config)
        for fewer in ({}, FEWER[family]) if family in FEWER else ({},):
            given, at = model.options | fewer, tmp_path / name / ("fewer" if fewer else "all")
            converted(source, at / "ms", model.recipe, *as_words(given))
            found = converted(at / "ms", at / "hf", model.back, "--sidecars-from", source, *as_words(given | tied))
            here.append(lost_between(model.tensors | extra, found))
            converted(trained, at / "hf2", model.back, *as_words(given | tied))
            there.append(
                lost_between(own | state, converted(at / "hf2", at / "ms2", model.recipe, "--sidecars-from", source, *as_words(given)))
            )
    check_lost(f"{family}-ms2hf", here)
    check_lost(f"{family}-hf2ms", there)


# Dtypes, containers, configs ----------------------------------------------------------------------------------------

FIRM = {  # what stays float32
    "deepseek3-hf2ms": ("norm", "topk_bias", "router.dense"),
    "deepseek-v2": ("norm", "dense"),
    "deepseek-v2-lite": ("norm", "dense"),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*zip((name for name in MODELS if MODELS[name].family != "glm"), itertools.cycle(["fp32", "fp16", "bf16"]), strict=False)],
)
def test_a_dtype_casts_what_would_be_made(tmp_path, name, dtype):
    model = MODELS[name]
    source, wanted = model.write(tmp_path / "source"), getattr(torch, parse_dtype(dtype).name)
    plain = converted(source, tmp_path / "plain", model.recipe, *as_words(model.options))
    firm = FIRM.get(name, FIRM.get(model.recipe, ()))
    cast = {n: t.to(wanted) if t.is_floating_point() and not any(part in n for part in firm) else t for n, t in plain.items()}
    assert_same(converted(source, tmp_path / "cast", model.recipe, "--dtype", dtype, *as_words(model.options)), cast)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", FORWARD)
def test_torch_files_and_safetensors_are_read_alike(tmp_path, name):
    model = MODELS[name]
    options = as_words(model.options)
    wanted = converted(model.write(tmp_path / "source"), tmp_path / "a", model.recipe, *options)
    assert_same(converted(write(tmp_path / "st", model.tensors, config=model.config), tmp_path / "b", model.recipe, *options), wanted)
    root = {ROOTS[model.family]: model.tensors} if model.family in ROOTS else model.tensors
    assert_same(converted(write_bin(tmp_path / "bin", root, config=model.config), tmp_path / "c", model.recipe, *options), wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", REVERSE)
def test_torch_files_and_safetensors_are_made_alike(tmp_path, name):
    model = MODELS[name]
    source, options = model.write(tmp_path / "source"), as_words(model.options)
    wanted = converted(source, tmp_path / "st", model.recipe, "--format", "safetensors", *options)
    converted(source / "model.ckpt", tmp_path / "bin", model.recipe, "--format", "torch", *options)
    loaded = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert_same(loaded[ROOTS[model.family]] if model.family in ROOTS else loaded, wanted)
    if model.config and model.family not in ROOTS:
        assert all((tmp_path / made / "config.json").exists() for made in ("st", "bin"))
        shutil.move(source / "config.json", tmp_path / "config.json")
        found = converted(source, tmp_path / "other", model.recipe, "--sidecars-from", tmp_path, *options)
        assert_same(found, wanted)
        configs = [json.loads((tmp_path / made / "config.json").read_text()) for made in ("other", "st")]
        assert {**configs[0], "torch_dtype": None} == {**configs[1], "torch_dtype": None}  # one from elsewhere says what tensors have


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].config])
def test_options_stand_for_a_config(tmp_path, name):
    model = MODELS[name]
    source = model.write(tmp_path / "source")
    wanted = converted(source, tmp_path / "a", model.recipe, *as_words(model.options))
    entries = {tensor: entry.source for tensor, entry in open_checkpoint(source).items()}
    known = recipes.get(model.recipe).apply(entries, model.config, model.options).options
    (source / "config.json").unlink()
    options = {key: value for key, value in known.items() if value is not None}
    assert_same(converted(source, tmp_path / "b", model.recipe, *as_words(options)), wanted)


# What is refused ----------------------------------------------------------------------------------------------------

MAY_LACK = (  # what models have or do not have
    "inv_freq",
    "attn_pool.kv_proj.weight",
    ".embed_tokens.weight",  # of layers for multi-token prediction, which repeat it
    "shared_head.head.weight",
)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", [name for name in MODELS if "-ms-" not in MODELS[name].recipe])
def test_nothing_may_be_missing_and_nothing_unknown(tmp_path, name):
    model, recipe = MODELS[name], recipes.get(MODELS[name].recipe)
    entries = {tensor: entry.source for tensor, entry in open_checkpoint(model.write(tmp_path / "source")).items()}
    config, given = model.config or {}, model.options
    accepted = []
    for gone in first_and_last(entries):
        try:
            recipe.apply({tensor: source for tensor, source in entries.items() if tensor != gone}, config, given)
        except CoverageError:
            continue
        accepted.append(gone)
    headless = ("lm_head.weight",) if model.family in ("telechat2", "telechat3") else ()  # whose scripts do not ask for one
    assert not [tensor for tensor in accepted if not tensor.endswith(MAY_LACK + headless)]
    with pytest.raises(CoverageError, match="strange"):
        recipe.apply({**entries, "model.layers.0.strange.weight": next(iter(entries.values()))}, config, given)
