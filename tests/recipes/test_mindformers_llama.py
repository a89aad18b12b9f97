"""MindSpore Transformers' families with Llama's and Qwen's names against its scripts' own tables, applied as they stand, and back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, read_any, refusal, run, write, write_bin, write_ckpt
from einops import rearrange
from mindformers_models import BF16, FP16, FP32, LLAMA, MIXTRAL, QWEN, config_of, internlm2, llama, mixtral, qwen, stacked, table_of, visual

from streamconv import plan, recipes
from tools import make_checkpoint as made

SIZES = [  # heads, key and value heads, head size, width, width of the MLP, layers
    pytest.param((4, 4, 8, 32, 44, 2), id="mha"),
    pytest.param((6, 2, 4, 24, 15, 3), id="gqa"),
    pytest.param((5, 1, 6, 30, 7, 1), id="mqa"),
    pytest.param((8, 4, 2, 16, 9, 11), id="eleven layers"),
]

INTERNLM2 = [
    ("tok_embeddings.weight", "tok_embeddings.embedding_weight"),
    ("wqkv", "w"),
    (".norm.", ".norm_out."),
    ("output", "lm_head"),
]


# Small models -------------------------------------------------------------------------------------------------------


def split_grouped(fused, heads, groups):
    """q, k, v of rows that are grouped by key and value heads."""
    parts = rearrange(fused, "(k n d) ... -> k n d ...", k=groups, n=heads // groups + 2)
    return [rearrange(part, "k n d ... -> (k n d) ...") for part in (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])]


def split_thirds(tensors, old, new):
    """The tensors whose names contain ``old`` in three, called as in ``new``."""
    found = {}
    for name, tensor in tensors.items():
        if old in name:
            found |= {name.replace(old, part): third.contiguous() for part, third in zip(new, tensor.chunk(3), strict=True)}
        else:
            found[name] = tensor
    return found


def both_ways(tmp_path, family, tensors, wanted, *options, config=None, back=None, back_options=None, source=None):
    """Converts to MindSpore and back, with --verify; there it is as wanted, here as before."""
    source = source or write(tmp_path / "hf", tensors, shards=2, config=config)
    given = [word for option in options for word in ("--set", option)]
    assert run("convert", source, tmp_path / "ms", "--recipe", f"{family}-hf2ms", "--quiet", "--verify", *given) == 0
    assert [path.name for path in (tmp_path / "ms").iterdir() if path.name != "config.json"] == ["model.ckpt"]
    assert_same(read_any(tmp_path / "ms"), wanted)
    given = [word for option in (options if back_options is None else back_options) for word in ("--set", option)]
    assert run("convert", tmp_path / "ms", tmp_path / "back", "--recipe", f"{family}-ms2hf", "--quiet", "--verify", *given) == 0
    assert_same(read_any(tmp_path / "back"), tensors if back is None else back)
    assert (tmp_path / "back" / "config.json").exists() == (config is not None)


# There and back -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(7)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("family", "bias", "dtype"),
    [
        ("llama", "", FP32),
        ("llama", "qkvo", BF16),
        ("yi", "", BF16),
        ("deepseek", "", FP16),
        ("internlm", "qkvo", FP16),
        ("qwen2_5", "qkv", BF16),
    ],
)
def test_llama_names(tmp_path, family, bias, dtype, sizes):
    tensors = llama(*sizes, bias=bias, dtype=dtype)
    both_ways(tmp_path, family, tensors, table_of(tensors, LLAMA), config=config_of(*sizes))


@pytest.mark.parametrize("sizes", SIZES)
def test_baichuan2_packs_q_k_v(tmp_path, sizes):
    plain = llama(*sizes)
    packed = {name.replace("q_proj", "W_pack"): tensor for name, tensor in plain.items() if "k_proj" not in name and "v_proj" not in name}
    for name in [name for name in packed if "W_pack" in name]:
        packed[name] = random_tensor(3 * sizes[3], sizes[3], seed=len(name))
    wanted = split_thirds(table_of(packed, LLAMA), ".self_attn.W_pack", [f".attention.w{part}" for part in "qkv"])
    both_ways(tmp_path, "baichuan2", packed, wanted)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_in_one_tensor(tmp_path, sizes, bias):
    tensors = internlm2(*sizes, bias=bias)
    both_ways(tmp_path, "internlm2", tensors, table_of(tensors, INTERNLM2))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("given", ["config", "options"])
def test_internlm2_split(tmp_path, sizes, given):
    tensors = internlm2(*sizes, bias=True)
    wanted = {}
    for name, tensor in table_of(tensors, INTERNLM2).items():
        if ".attention.w." in name:
            parts = split_grouped(tensor, sizes[0], sizes[1])
            wanted |= {name.replace(".w.", f".w{part}."): value.contiguous() for part, value in zip("qkv", parts, strict=True)}
        else:
            wanted[name] = tensor
    heads = () if given == "config" else (f"num_attention_heads={sizes[0]}", f"num_key_value_heads={sizes[1]}")
    config = config_of(*sizes) if given == "config" else None
    # The way back sees for itself that there are three tensors.
    both_ways(tmp_path, "internlm2", tensors, wanted, "qkv_concat=False", *heads, config=config, back_options=heads)


@pytest.mark.parametrize("experts", [2, 8, 11])
@pytest.mark.parametrize("use_gmm", [False, True])
def test_mixtral_stacks_experts_by_number(tmp_path, experts, use_gmm):
    tensors = mixtral(experts)
    wanted = stacked(table_of(tensors, MIXTRAL), transposed=use_gmm)
    assert sum(".ffn." in name for name in wanted) == 6
    both_ways(tmp_path, "mixtral", tensors, wanted, f"use_gmm={use_gmm}")


def test_qwen(tmp_path):
    tensors = qwen(dtype=BF16)
    wanted = split_thirds(table_of(tensors, QWEN), "attn.c_attn", [f"attention.w{part}" for part in "qkv"])
    both_ways(tmp_path, "qwen", tensors, wanted)


def vision_of(tensors, heads):
    """What mindformers' script makes of Qwen-VL's vision tower, test by test as it has them."""
    found = {}
    for old, tensor in tensors.items():
        name = old.replace("transformer.visual.", "vision_encoder.")
        norm = name.replace("weight", "gamma").replace("bias", "beta")
        at, _, kind = name.rpartition("attn.in_proj")
        if at:
            thirds = tensor.chunk(3) if "attn_pool" in name else rearrange(tensor, "(h n d) ... -> n (h d) ...", h=heads, n=3)
            found |= {f"{at}attn.dense{n}.{kind[1:]}": third.contiguous() for n, third in enumerate(thirds, 1)}
        elif "out_proj" in name:
            found[name.replace("out_proj", "projection")] = tensor.T.contiguous() if name.endswith("weight") else tensor
        else:
            found[norm if "ln" in name else name] = tensor
    return found


@pytest.mark.parametrize("heads", [2, 3, 12])
@pytest.mark.parametrize("concat", [False, True])
def test_qwenvl(tmp_path, heads, concat):
    language, seen = qwen(), visual()
    tensors = language | seen
    text = {f"llm_model.{name}": tensor for name, tensor in table_of(language, QWEN).items()}
    parts = ["attention.w"] if concat else [f"attention.w{part}" for part in "qkv"]
    text = table_of(text, [("attn.c_attn", "attention.w")]) if concat else split_thirds(text, "attn.c_attn", parts)
    config = {"num_hidden_layers": 2, "vocab_size": 13, "visual": {"heads": heads, "layers": 3}}
    both_ways(tmp_path, "qwenvl", tensors, text | vision_of(seen, heads), f"use_qkv_concat={concat}", config=config, back_options=())


@pytest.mark.parametrize(("strategy", "rows"), [(1, 512), (2, 1024)])
def test_qwenvl_pads_the_embedding(tmp_path, strategy, rows):
    tensors = qwen() | visual()
    source = write(tmp_path / "hf", tensors, config={"vocab_size": 13})
    given = ["--set", "enable_emb_opt=true", "--set", "vit_num_head=4"]
    pad = ["--set", f"emb_strategy={strategy}"]
    assert run("convert", source, tmp_path / "ms", "--recipe", "qwenvl-hf2ms", "--quiet", *given, *pad) == 0
    found = read_any(tmp_path / "ms")
    for old, new in (("transformer.wte.weight", "transformer.wte.embedding_weight"), ("lm_head.weight",) * 2):
        assert torch.equal(found[f"llm_model.{new}"], torch.cat([tensors[old], torch.zeros(rows - 13, 12)]))
    assert run("convert", tmp_path / "ms", tmp_path / "back", "--recipe", "qwenvl-ms2hf", "--quiet", *given) == 0
    assert_same(read_any(tmp_path / "back"), tensors)


# Fused parts --------------------------------------------------------------------------------------------------------


def fused(tensors, heads, groups, layout, bias):
    """q, k, v in one tensor, gate and up in one."""
    found = {name: t for name, t in tensors.items() if not re.search(r"attention\.w[qkv]\.|feed_forward\.w[13]\.", name)}
    for name in [name for name in tensors if ".wq." in name]:
        q, k, v = (tensors[name.replace(".wq.", f".w{part}.")] for part in "qkv")
        if (layout if name.endswith("weight") else bias) == "grouped":
            parts = [rearrange(part, "(k n d) ... -> k n d ...", k=groups, d=q.shape[0] // heads) for part in (q, k, v)]
            found[name.replace(".wq.", ".w_qkv.")] = rearrange(torch.cat(parts, 1), "k n d ... -> (k n d) ...")
        else:
            found[name.replace(".wq.", ".w_qkv.")] = torch.cat([q, k, v])
    for name in [name for name in tensors if ".w1." in name]:
        pair = (tensors[name], tensors[name.replace(".w1.", ".w3.")])
        both = rearrange(torch.stack(pair, 1), "f two c -> (f two) c") if layout == "grouped" else torch.cat(pair)
        found[name.replace(".w1.", ".w_gate_hidden.")] = both
    return found


@pytest.mark.sampled(7)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("family", "options", "layout", "bias"),
    [
        ("llama", [], "plain", "plain"),
        ("llama", ["layout=grouped"], "grouped", "plain"),
        ("llama", ["layout=grouped", "group_bias=true"], "grouped", "grouped"),
        ("qwen2_5", [], "grouped", "grouped"),
        ("qwen2_5", ["layout=plain"], "plain", "plain"),
    ],
)
def test_fusing(tmp_path, sizes, family, options, layout, bias):
    tensors = table_of(llama(*sizes, bias="qkv", dtype=BF16), LLAMA)
    source = write_ckpt(tmp_path / "ms", tensors, config=config_of(*sizes))
    given = [word for option in options for word in ("--set", option)]
    assert run("convert", source, tmp_path / "fused", "--recipe", f"{family}-ms-fuse", "--quiet", "--verify", *given) == 0
    assert_same(read_any(tmp_path / "fused"), fused(tensors, sizes[0], sizes[1], layout, bias))
    assert run("convert", tmp_path / "fused", tmp_path / "back", "--recipe", f"{family}-ms-unfuse", "--quiet", *given) == 0
    assert_same(read_any(tmp_path / "back"), tensors)


@pytest.mark.parametrize("layout", ["plain", "grouped"])
def test_qwen2_5_fused_on_the_way(tmp_path, layout):
    sizes = (6, 2, 4, 24, 15, 3)
    tensors = llama(*sizes, bias="qkv")
    wanted = fused(table_of(tensors, LLAMA), 6, 2, layout, layout)
    options = (f"layout={layout}", "qkv_concat=true")
    both_ways(tmp_path, "qwen2_5", tensors, wanted, *options, config=config_of(*sizes), back_options=options[:1])


def test_plain_parts_fuse_without_a_config(tmp_path):
    tensors = table_of(llama(6, 2, 4, 24, 15, 2), LLAMA)
    assert run("convert", write_ckpt(tmp_path / "ms", tensors), tmp_path / "fused", "--recipe", "llama-ms-fuse", "--quiet") == 0
    assert_same(read_any(tmp_path / "fused"), fused(tensors, 6, 2, "plain", "plain"))
    heads = ["--set", "num_attention_heads=6", "--set", "num_key_value_heads=2"]
    assert run("convert", tmp_path / "fused", tmp_path / "back", "--recipe", "llama-ms-unfuse", "--quiet", *heads) == 0
    assert_same(read_any(tmp_path / "back"), tensors)


# Heads that are the embedding ---------------------------------------------------------------------------------------


TIED = {"tie_word_embeddings": True, "num_hidden_layers": 2}


@pytest.mark.parametrize("family", ["llama", "yi", "deepseek", "internlm", "qwen2_5"])
def test_a_tied_head_is_listed_twice(tmp_path, family):
    tensors = llama(4, 2, 3, 12, 5, 2, head=False)
    wanted = table_of(tensors, LLAMA)
    both_ways(tmp_path, family, tensors, {**wanted, "lm_head.weight": wanted["model.tok_embeddings.embedding_weight"]}, config=TIED)


def test_a_tied_head_of_qwen_is_listed_twice(tmp_path):
    tensors = qwen()
    del tensors["lm_head.weight"]
    wanted = split_thirds(table_of(tensors, QWEN), "attn.c_attn", [f"attention.w{part}" for part in "qkv"])
    both_ways(tmp_path, "qwen", tensors, {**wanted, "lm_head.weight": tensors["transformer.wte.weight"]}, config=TIED)


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_of_internlm2_is_listed_once(tmp_path, stored):
    tensors = internlm2(4, 2, 3, 12, 5, 2)
    del tensors["output.weight"]
    head = {"output.weight": tensors["model.tok_embeddings.weight"]} if stored else {}
    source = write(tmp_path / "hf", tensors | head, config=TIED)
    both_ways(tmp_path, "internlm2", tensors, table_of(tensors, INTERNLM2), config=TIED, source=source)


def test_a_tied_head_of_mixtral_stays_as_it_is(tmp_path):
    tensors = mixtral(2)
    del tensors["lm_head.weight"]
    both_ways(tmp_path, "mixtral", tensors, stacked(table_of(tensors, MIXTRAL)), config=TIED)


def test_a_tied_head_that_differs_is_refused(tmp_path, capsys):
    source = write_ckpt(tmp_path / "ms", table_of(llama(4, 2, 3, 12, 5, 2), LLAMA), config=TIED)
    assert run("convert", source, tmp_path / "hf", "--recipe", "llama-ms2hf", "--quiet") != 0
    assert "lm_head.weight" in capsys.readouterr().err
    assert run("convert", source, tmp_path / "hf2", "--recipe", "llama-ms2hf", "--quiet", "--set", "tie_word_embeddings=false") == 0


# Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "yi", "internlm"])
def test_a_model_without_a_head_keeps_its_bare_names(tmp_path, family):
    tensors = llama(4, 2, 3, 12, 5, 2, head=False, prefix="")
    wanted = table_of({f".{name}": tensor for name, tensor in tensors.items()}, LLAMA)
    both_ways(tmp_path, family, tensors, {name[1:]: tensor for name, tensor in wanted.items()})


def test_rotary_buffers(tmp_path):
    tensors = llama(4, 2, 3, 12, 5, 2)
    buffers = numbered({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (2,) for i in (0, 1)})
    source = write(tmp_path / "hf", tensors | buffers)
    for family, extra in (("llama", {}), ("internlm", buffers)):
        assert run("convert", source, tmp_path / family, "--recipe", f"{family}-hf2ms", "--quiet") == 0
        assert_same(read_any(tmp_path / family), table_of(tensors, LLAMA) | extra)


def with_factors(tensors, modules, suffixes):
    """The tensors and a pair of LoRA factors for each of these modules."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(modules)]
    shapes = {f"{name}{suffix}": shape for name in names for suffix, shape in zip(suffixes, ((2, 12), (12, 2)), strict=True)}
    return tensors | numbered(shapes)


PEFT, PET, MINDPET = (
    (".lora_A.weight", ".lora_B.weight"),
    (".tk_delta_lora_a", ".tk_delta_lora_b"),
    (".mindpet_delta_lora_a", ".mindpet_delta_lora_b"),
)


@pytest.mark.parametrize(
    ("family", "here", "there"),
    [("llama", PEFT, PET), ("qwen2_5", PEFT, (".lora_a", ".lora_b")), ("yi", PET, PET), ("deepseek", MINDPET, MINDPET)],
)
def test_lora_factors(tmp_path, family, here, there):
    tensors = with_factors(llama(4, 2, 3, 12, 5, 2), ("q_proj.weight", "up_proj.weight"), here)
    both_ways(tmp_path, family, tensors, table_of(table_of(tensors, LLAMA), list(zip(here, there, strict=True))))


def test_lora_factors_of_qwen(tmp_path):
    tensors = with_factors(qwen(projected=12), ("w1.weight", "attn.c_proj.weight"), PEFT)
    parts = numbered({f"transformer.h.0.attention.wq{suffix}": (2, 2) for suffix in PEFT})
    wanted = split_thirds(table_of(tensors, QWEN), "attn.c_attn", [f"attention.w{part}" for part in "qkv"])
    wanted |= {name.replace(".h.", ".layers."): tensor for name, tensor in parts.items()}
    both_ways(tmp_path, "qwen", tensors | parts, table_of(wanted, list(zip(PEFT, MINDPET, strict=True))))


def test_stacked_lora_factors_of_baichuan2(tmp_path, capsys):
    own = table_of(llama(4, 4, 3, 12, 5, 1), LLAMA)
    factors = numbered(
        {f"model.layers.0.attention.w{p}{s}": shape for p in "qkv" for s, shape in zip(MINDPET, ((2, 12), (12, 2)), strict=True)}
    )
    source = write_ckpt(tmp_path / "ms", own | factors)
    assert run("convert", source, tmp_path / "hf", "--recipe", "baichuan2-ms2hf", "--quiet") == 0
    found = read_any(tmp_path / "hf")
    for suffix, peft in zip(MINDPET, PEFT, strict=True):
        wanted = torch.cat([factors[f"model.layers.0.attention.w{part}{suffix}"] for part in "qkv"])
        assert torch.equal(found[f"model.layers.0.self_attn.W_pack{peft}"], wanted)
    # Of a pair that is not known to be stacked nothing is made.
    refused = ("convert", tmp_path / "hf", tmp_path / "back", "--recipe", "baichuan2-hf2ms")
    assert "W_pack.lora_" in refusal(capsys, *refused)
    assert run(*refused, "--set", "lora=stacked", "--quiet") == 0
    assert_same(read_any(tmp_path / "back"), own | factors)


def test_state_of_a_training_run_is_left_out(tmp_path, capsys):
    tensors = table_of(llama(4, 2, 3, 12, 5, 2), LLAMA)
    state = {f"{kind}.{name}": tensor for kind in ("adam_m", "adam_v") for name, tensor in tensors.items()}
    state |= {"global_step": torch.tensor([7]), "loss_scale": torch.tensor([1024.0]), "epoch_num": torch.tensor(3)}
    source = write_ckpt(tmp_path / "ms", tensors | state)
    assert run("convert", source / "model.ckpt", tmp_path / "hf", "--recipe", "llama-ms2hf", "--json") == 0
    assert_same(read_any(tmp_path / "hf"), llama(4, 2, 3, 12, 5, 2))
    assert set(json.loads(capsys.readouterr().out)["dropped"]) == set(state)
    assert any("optimizer" in line for line in recipes.get("llama-hf2ms").lost)


# Containers ---------------------------------------------------------------------------------------------------------


def test_torch_files_on_both_ends(tmp_path):
    sizes = (4, 2, 3, 12, 5, 2)
    tensors = llama(*sizes, bias="qkvo", dtype=BF16)
    source = write_bin(tmp_path / "hf", tensors, config=config_of(*sizes, torch_dtype="bfloat16"))
    assert run("convert", source, tmp_path / "some.ckpt", "--recipe", "llama-hf2ms", "--quiet") == 0
    assert_same(read_any(tmp_path / "some.ckpt"), table_of(tensors, LLAMA))
    back = ("convert", tmp_path / "some.ckpt", tmp_path / "back", "--recipe", "llama-ms2hf", "--format", "torch", "--quiet")
    assert run(*back, "--sidecars-from", source) == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    loaded = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert_same(loaded, tensors)


def test_config_comes_along(tmp_path, capsys):
    sizes = (4, 2, 3, 12, 5, 2)
    for name, tensors, family in (("a", llama(*sizes), "llama"), ("b", llama(*sizes, bias="qkv"), "qwen2_5")):
        config = config_of(*sizes, rope_theta=5e5)
        source = write_ckpt(tmp_path / name, table_of(tensors, LLAMA), config=config)
        to_hf = ("--recipe", f"{family}-ms2hf", "--quiet")
        assert run("convert", source, tmp_path / f"{name}-of-folder", *to_hf) == 0
        assert run("convert", source / "model.ckpt", tmp_path / f"{name}-of-file", *to_hf, "--dtype", "bf16") == 0
        (source / "config.json").rename(tmp_path / "config.json")
        assert run("convert", source / "model.ckpt", tmp_path / f"{name}-without", *to_hf) == 0
        assert run("convert", source / "model.ckpt", tmp_path / f"{name}-given", *to_hf, "--sidecars-from", tmp_path) == 0
        found = {way: tmp_path / f"{name}-{way}" / "config.json" for way in ("of-folder", "of-file", "without", "given")}
        assert found["of-folder"].read_text() == found["given"].read_text() == json.dumps(config)
        assert json.loads(found["of-file"].read_text()) == {**config, "torch_dtype": "bfloat16"}
        assert not found["without"].exists()
    assert "config.json is not written" in "".join(plan(source, tmp_path / "none", recipe="llama-ms2hf").notes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bf16"])
def test_dtype_casts_every_tensor(tmp_path, dtype):
    sizes = (4, 2, 3, 12, 5, 2)
    source = write(tmp_path / "hf", llama(*sizes), config=config_of(*sizes))
    assert run("convert", source, tmp_path / "ms", "--recipe", "llama-hf2ms", "--dtype", dtype, "--quiet") == 0
    wanted = {"float32": FP32, "float16": FP16, "bf16": BF16}[dtype]
    assert_same(read_any(tmp_path / "ms"), {name: t.to(wanted) for name, t in table_of(llama(*sizes), LLAMA).items()})
    said = json.loads((tmp_path / "ms" / "config.json").read_text())["torch_dtype"]
    assert said == str(wanted).removeprefix("torch.")


REAL = Path(__file__).parent.parent / "data" / "ckpt"  # what mindformers' own scripts made, with their tensors' shapes and digests


@pytest.mark.parametrize("family", ["llama", "yi", "deepseek", "internlm", "internlm2", "baichuan2", "qwen", "qwenvl", "mixtral"])
def test_files_that_mindspore_wrote(tmp_path, family):
    source = REAL / f"{family}.ckpt"
    stored = read_any(source)
    options = []
    if family == "internlm2":  # q, k and v apart; any number of heads fits that has queries and keys in this proportion
        rows = [stored[f"model.layers.0.attention.w{part}.weight"].shape[0] for part in "qk"]
        options = ["--set", f"num_attention_heads={rows[0]}", "--set", f"num_key_value_heads={rows[1]}", "--set", "qkv_concat=false"]
    if family == "qwenvl":
        options = ["--set", "vit_num_head=1"]
    assert run("convert", source, tmp_path / "hf", "--recipe", f"{family}-ms2hf", "--quiet", *options) == 0
    assert run("convert", tmp_path / "hf", tmp_path / "back.ckpt", "--recipe", f"{family}-hf2ms", "--quiet", *options) == 0
    assert_same(read_any(tmp_path / "back.ckpt"), stored)


# What transformers makes of it --------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("llama", "Llama", {"attention_bias": True}),
        ("llama", "Llama", {"tie_word_embeddings": True}),
        ("deepseek", "Llama", {}),
        ("qwen2_5", "Qwen2", {}),
        ("qwen2_5", "Qwen2", {"tie_word_embeddings": True}),
        ("mixtral", "Mixtral", {"num_local_experts": 4}),
    ],
)
def test_transformers_reads_what_comes_back(tmp_path, family, kind, more):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(vocab_size=61, **sizes, **more)).eval()
    model.save_pretrained(tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "ms", "--recipe", f"{family}-hf2ms", "--quiet") == 0
    back = ("convert", tmp_path / "ms", tmp_path / "back", "--recipe", f"{family}-ms2hf", "--quiet")
    assert run(*back, "--max-shard-size", "20KB") == 0
    found, notes = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(notes.values()), notes
    tokens = torch.tensor([[1, 5, 7, 9, 33]])
    with torch.no_grad():
        assert torch.equal(found.eval()(tokens).logits, model(tokens).logits)


# What is refused ----------------------------------------------------------------------------------------------------

SMALL = (4, 2, 3, 12, 5, 3)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight is missing"),
        ("model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight is missing"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight is missing"),
        ("model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.k_proj.bias is missing"),
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", "rule 'lm_head.weight': no tensor for it; the nearest tensor is"),
        ("lm_head.weight", "(the rule holds when not (tie_word_embeddings or"),
    ],
)
def test_nothing_is_made_up_for_a_missing_tensor(tmp_path, capsys, gone, said):
    tensors = llama(*SMALL, bias="qkv")
    del tensors[gone]
    message = refusal(capsys, "convert", write(tmp_path / "hf", tensors), tmp_path / "ms", "--recipe", "llama-hf2ms")
    assert said in message
    assert not (tmp_path / "ms").exists()


def test_a_layer_less_than_the_config_says(tmp_path, capsys):
    source = write(tmp_path / "hf", llama(*SMALL), config={"num_hidden_layers": 4})
    assert "model.layers.3." in refusal(capsys, "convert", source, tmp_path / "ms", "--recipe", "llama-hf2ms")


def test_a_missing_part_on_the_way_back(tmp_path, capsys):
    tensors = table_of(qwen(), QWEN)
    tensors = split_thirds(tensors, "attn.c_attn", [f"attention.w{part}" for part in "qkv"])
    del tensors["transformer.layers.1.attention.wk.weight"]
    source = write_ckpt(tmp_path / "ms", tensors)
    assert "transformer.layers.1.attention.wk.weight is missing" in refusal(
        capsys, "convert", source, tmp_path / "hf", "--recipe", "qwen-ms2hf"
    )


def test_a_missing_expert(tmp_path, capsys):
    tensors = {name: tensor for name, tensor in mixtral(4).items() if ".1.block_sparse_moe.experts.3." not in name}
    message = refusal(capsys, "convert", write(tmp_path / "hf", tensors), tmp_path / "ms", "--recipe", "mixtral-hf2ms")
    assert "experts" in message
    assert "3" in message


REFUSED = {
    "unknown tensor": ("llama-hf2ms", {**llama(*SMALL), "model.layers.0.self_attn.q_norm.weight": torch.zeros(3)}, [], "no rule for it"),
    "option of no family": ("llama-hf2ms", llama(*SMALL), ["n_head=4"], "tie_word_embeddings"),
    "no truth value": ("mixtral-hf2ms", mixtral(2), ["use_gmm=maybe"], "true or false"),
    "heads that do not divide": ("qwenvl-hf2ms", qwen() | visual(), ["vit_num_head=5"], "attn.in_proj"),
    "no emb_strategy": ("qwenvl-hf2ms", qwen() | visual(), ["vit_num_head=4", "enable_emb_opt=true"], "emb_strategy=N"),
    "no heads": ("internlm2-hf2ms", internlm2(*SMALL), ["qkv_concat=false"], "num_key_value_heads"),
    "other experts": ("mixtral-hf2ms", mixtral(2), ["num_local_experts=3"], "experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, capsys, name):
    recipe, tensors, options, said = REFUSED[name]
    given = [word for option in options for word in ("--set", option)]
    assert said in refusal(capsys, "convert", write(tmp_path / "hf", tensors), tmp_path / "ms", "--recipe", recipe, *given)


def test_heads_that_the_width_contradicts(tmp_path, capsys):
    config = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = write(tmp_path / "hf", internlm2(8, 4, 3, 24, 5, 1), config=config)
    options = ("--set", "qkv_concat=false")
    assert "wqkv" in refusal(capsys, "convert", source, tmp_path / "ms", "--recipe", "internlm2-hf2ms", *options)


def test_fused_parts_need_the_number_of_heads(tmp_path, capsys):
    own = table_of(llama(*SMALL), LLAMA)
    source = write_ckpt(tmp_path / "ms", fused(own, 4, 2, "plain", "plain"))
    assert "num_attention_heads" in refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "llama-ms-unfuse")


def test_factors_cannot_be_fused(tmp_path, capsys):
    tensors = with_factors(llama(4, 4, 3, 12, 5, 1), ("q_proj.weight",), PEFT)
    source = write(tmp_path / "hf", tensors, config=config_of(4, 4, 3, 12, 5, 1))
    assert "qkv_concat=false" in refusal(
        capsys, "convert", source, tmp_path / "ms", "--recipe", "qwen2_5-hf2ms", "--set", "qkv_concat=true"
    )


# Sizes that users have ----------------------------------------------------------------------------------------------


def in_300_mb(source, target, recipe, *options):
    """Converts in a process of its own, which is measured."""
    command = [sys.executable, "-c", "import sys; from streamconv.cli import main; sys.exit(main(sys.argv[1:]))", "convert"]
    command += [source, target, "--recipe", recipe, "--max-memory", "300MB", "--json", *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1200, check=True)
    found = json.loads(done.stdout)
    assert found["peak_rss"] <= found["peak_memory"] <= 300_000_000
    return found


@pytest.mark.parametrize(
    ("name", "recipe", "options", "size"),
    [
        ("llama-3-8b", "llama", [], 16_000_000_000),
        pytest.param("mixtral-8x7b", "mixtral", ["--set", "use_gmm=true"], 3_000_000_000, marks=pytest.mark.slow),
    ],
)
def test_billions_of_parameters_there_and_back(tmp_path, name, recipe, options, size):
    made.make_checkpoint(name, tmp_path / "hf", sparse=True, **({} if recipe == "llama" else {"size": size}))
    in_300_mb(tmp_path / "hf", tmp_path / "ms", f"{recipe}-hf2ms", *options)
    assert (tmp_path / "ms" / "model.ckpt").stat().st_size > size
    in_300_mb(tmp_path / "ms", tmp_path / "back", f"{recipe}-ms2hf", *options)
    assert made.check_stamps(tmp_path / "back") == []
