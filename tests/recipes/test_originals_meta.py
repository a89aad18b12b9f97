"""Meta's, Mistral's and Mixtral's own checkpoints to Hugging Face and back."""

import json
import subprocess
import sys

import golden_cases
import pytest
import torch
from checkpoint_files import assert_same, raw, read, refusal, run, write
from meta_models import (
    DIM,
    FFN,
    LAYERS,
    VOCAB,
    hf,
    mistral_params,
    mixtral,
    mixtral_params,
    params,
    ranks,
    spread,
    whole,
    write_consolidated,
    write_ranks,
)
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.advice.matching import match_recipes
from streamconv.notation import expressions
from streamconv.recipes.originals import llama_meta
from tools import make_checkpoint as made


def files_of(folder, pattern="consolidated.*"):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob(pattern)) if path.suffix in (".pth", ".pt")}


def assert_ranks(folder, parts):
    found = files_of(folder)
    assert list(found) == [f"consolidated.{number:02}.pth" for number in range(len(parts))]
    for tensors, part in zip(found.values(), parts, strict=True):
        assert_same(tensors, part)


def convert(source, target, recipe, *options):
    given = [piece for option in options for piece in (("--set", option) if "=" in str(option) else (option,))]
    return run("convert", source, target, "--recipe", recipe, "--quiet", *given)


def plan(source, tmp_path, recipe, **settings):
    return streamconv.plan(source, tmp_path / "planned", recipe=recipe, max_memory="4GB", **settings)


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


# Llama -------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv", "count", "by_rows"),
    [(4, 4, 1, False), (4, 2, 2, False), (4, 2, 1, True), (8, 1, 1, False), (6, 3, 3, True), (8, 4, 4, False), (8, 8, 8, True)],
)
def test_llama_there_and_back(heads, kv, count, by_rows, dtype, tmp_path):
    dim = 8 * heads
    tensors = whole(heads, kv, dim=dim, dtype=dtype)
    parts = ranks(tensors, count, by_rows=by_rows)
    for number, part in enumerate(parts[1:], 2):  # what a rank does not share counts for nothing
        part["norm.weight"] = part["norm.weight"] * number
    source = write_ranks(tmp_path / "source", parts, params(heads, kv, dim=dim))
    version = "llama_version=3" if by_rows else "llama_version=2"
    assert convert(source, tmp_path / "hf", "llama-meta2hf", version) == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, heads, kv))
    assert convert(tmp_path / "hf", tmp_path / "back", "llama-hf2meta", version, f"model_parallel={count}") == 0
    assert_ranks(tmp_path / "back", ranks(tensors, count, by_rows=by_rows))
    found = config_of(tmp_path / "back", "params.json")
    assert {key: found[key] for key in ("dim", "n_layers", "n_heads")} == {"dim": dim, "n_layers": LAYERS, "n_heads": heads}
    assert found.get("n_kv_heads", heads) == kv


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("count", "wanted"), [(1, 4), (4, 1), (2, 8), (8, 2)])
def test_llama_for_another_number_of_ranks(count, wanted, tmp_path):
    tensors = whole(8, 8, dim=64)
    source = write_ranks(tmp_path / "source", ranks(tensors, count), params(8, 8, dim=64))
    assert convert(source, tmp_path / "hf", "llama-meta2hf", "llama_version=1") == 0
    assert convert(tmp_path / "hf", tmp_path / "back", "llama-hf2meta", f"model_parallel={wanted}", "llama_version=1") == 0
    assert_ranks(tmp_path / "back", ranks(tensors, wanted))
    assert convert(tmp_path / "hf", tmp_path / "rows", "llama-hf2meta", f"model_parallel={wanted}", "embedding=rows") == 0
    assert_ranks(tmp_path / "rows", ranks(tensors, wanted, by_rows=True))


@pytest.mark.parametrize(("heads", "kv", "count"), [(8, 2, 4), (8, 1, 4), (16, 8, 16)])
def test_ranks_that_repeat_key_and_value_heads(heads, kv, count, tmp_path):
    dim = 4 * heads
    tensors = whole(heads, kv, dim=dim, ffn=32)
    parts = ranks(tensors, count, by_rows=True, copies=count // kv)
    assert parts[0]["layers.0.attention.wk.weight"].shape == (4, dim)
    source = write_ranks(tmp_path / "source", parts, params(heads, kv, dim=dim))
    assert convert(source, tmp_path / "hf", "llama-meta2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, heads, kv))
    assert config_of(tmp_path / "hf")["num_key_value_heads"] == kv
    assert convert(tmp_path / "hf", tmp_path / "back", "llama-hf2meta", f"model_parallel={count}", "embedding=rows") == 0
    assert_ranks(tmp_path / "back", parts)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.1.attention.inner_attention.rope.freqs"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_the_model_computes_itself_is_dropped(name, count, tmp_path):
    tensors = whole()
    parts = ranks(tensors | {name: torch.arange(4.0)}, count)
    source = write_ranks(tmp_path / "source", parts, params())
    assert any(name in dropped for dropped in plan(source, tmp_path, "llama-meta2hf").dropped)
    assert convert(source, tmp_path / "hf", "llama-meta2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors))
    old = write(
        tmp_path / "old", hf(tensors) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, config=config_of(tmp_path / "hf")
    )
    assert convert(old, tmp_path / "back", "llama-hf2meta", f"model_parallel={count}", "llama_version=2") == 0
    assert_ranks(tmp_path / "back", ranks(tensors, count))


def test_a_single_file(tmp_path):
    tensors = whole(4, 2)
    source = write_ranks(tmp_path / "source", [tensors], params(4, 2))
    assert convert(source / "consolidated.00.pth", tmp_path / "hf", "llama-meta2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, 4, 2))
    assert config_of(tmp_path / "hf")["num_key_value_heads"] == 2
    assert convert(tmp_path / "hf", tmp_path / "model.pth", "llama-hf2meta") == 0
    assert_same(torch.load(tmp_path / "model.pth", weights_only=True), tensors)
    assert convert(tmp_path / "model.pth", tmp_path / "again.safetensors", "llama-meta2hf", "n_heads=4", "n_kv_heads=2") == 0
    assert_same(read(tmp_path / "again.safetensors"), hf(tensors, 4, 2))
    target = tmp_path / "two.pth"
    assert convert(tmp_path / "hf", target, "llama-hf2meta", "model_parallel=2") == 2
    assert not target.exists()


def test_verify_compares_by_rank(tmp_path):
    source = write_ranks(tmp_path / "source", ranks(whole(4, 2), 2), params(4, 2))
    assert convert(source, tmp_path / "hf", "llama-meta2hf", "--verify") == 0
    assert run("verify", source, tmp_path / "hf", "--recipe", "llama-meta2hf", "--quiet") == 0
    back = ("--recipe", "llama-hf2meta", "--set", "model_parallel=2", "--quiet")
    assert run("verify", tmp_path / "hf", source, *back, "--set", "llama_version=2") == 0
    assert run("verify", tmp_path / "hf", source, *back, "--set", "embedding=rows") == 1


def test_ranks_that_are_missing(tmp_path, capsys):
    source = write_ranks(tmp_path / "source", ranks(whole(), 4), params())
    (source / "consolidated.03.pth").rename(tmp_path / "last")
    message = refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "llama-meta2hf")
    assert "consolidated.03.pth/tok_embeddings.weight is missing" in message
    assert "4 tensors go together, 3 were found" in message
    (tmp_path / "last").rename(source / "consolidated.03.pth")
    (source / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth/" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "llama-meta2hf")
    one = source / "consolidated.00.pth"
    assert "consolidated.01.pth/" in refusal(capsys, "convert", one, tmp_path / "hf", "--recipe", "llama-meta2hf")
    assert not (tmp_path / "hf").exists()


WRONG = {
    "ranks": ("model_parallel=4", "consolidated.02.pth/"),
    "layers": ("n_layers=3", "layers.2.attention.wq.weight is missing"),
    "heads": ("n_heads=6", "layers.0.attention.wq.weight"),
    "grouped heads": ("n_kv_heads=4", "layers.0.attention.wk.weight"),
    "version": ("llama_version=4", "--set llama_version=4: expected one of 1, 2, 3, 3.1, 3.2, Guard-3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_that_are_wrong(wrong, tmp_path, capsys):
    option, message = WRONG[wrong]
    source = write_ranks(tmp_path / "source", ranks(whole(4, 2), 2), params(4, 2))
    assert message in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "llama-meta2hf", "--set", option)


@pytest.mark.parametrize("name", ["layers.1.attention.wk.weight", "layers.0.ffn_norm.weight", "output.weight", "layers.1"])
def test_tensors_that_are_missing(name, tmp_path, capsys):
    parts = ranks(whole(4, 2), 2)
    kept = [{key: tensor for key, tensor in part.items() if not key.startswith(name)} for part in parts]
    source = write_ranks(tmp_path / "source", kept, params(4, 2))
    assert name in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "llama-meta2hf")


def test_names_that_no_llama_has(tmp_path, capsys):
    source = write_ranks(tmp_path / "source", [whole() | {"layers.0.attention.wq.bias": torch.ones(DIM)}], params())
    assert "layers.0.attention.wq.bias: no rule" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "llama-meta2hf")


@pytest.mark.parametrize(("count", "message"), [(3, "3"), (8, "layers.0.attention.wq.weight")])
def test_ranks_that_cannot_share_the_heads(count, message, tmp_path, capsys):
    source = write_ranks(tmp_path / "source", [whole()], params())
    assert convert(source, tmp_path / "hf", "llama-meta2hf") == 0
    options = ("--recipe", "llama-hf2meta", "--set", f"model_parallel={count}")
    assert message in refusal(capsys, "convert", tmp_path / "hf", tmp_path / "meta", *options)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
INSTRUCT = [128001, 128008, 128009]
VERSIONS = {
    ("1", False, 10000.0): (2048, None, 1, 2),
    ("2", True, 10000.0): (4096, None, 1, 2),
    ("2", False, 1e6): (16384, None, 1, 2),
    ("3", False, 5e5): (8192, None, 128000, 128001),
    ("3", True, 5e5): (8192, None, 128000, INSTRUCT),
    ("3.1", True, 5e5): (131072, LLAMA3 | {"factor": 8.0}, 128000, INSTRUCT),
    ("3.2", False, 5e5): (131072, LLAMA3 | {"factor": 32.0}, 128000, 128001),
    ("Guard-3", False, 5e5): (131072, LLAMA3 | {"factor": 8.0}, 128000, 128001),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_config_of_each_version(version, nested, tmp_path):
    name, instruct, theta = version
    positions, scaling, bos, eos = VERSIONS[version]
    said = params(4, 2, rope_theta=theta)
    source = write_ranks(tmp_path / "source", ranks(whole(4, 2), 2), {"model": said} if nested else said)
    options = [f"llama_version={name}", *(["instruct=true"] if instruct else [])]
    assert convert(source, tmp_path / "hf", "llama-meta2hf", *options, "--dtype", "bf16") == 0
    found, tokens = config_of(tmp_path / "hf"), config_of(tmp_path / "hf", "generation_config.json")
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["dtype"] == "bfloat16"
    sizes = {
        "hidden_size": DIM, "intermediate_size": FFN, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB, "head_dim": DIM // 4,
    }  # fmt: skip
    assert {size: found[size] for size in sizes} == sizes
    assert (found["max_position_embeddings"], found["rope_scaling"], found["rope_theta"]) == (positions, scaling, theta)
    assert found["rms_norm_eps"] == 1e-5
    assert found["tie_word_embeddings"] is (name == "3.2")
    assert ("lm_head.weight" in read(tmp_path / "hf")) is (name != "3.2")
    assert (found["bos_token_id"], found["eos_token_id"]) == (tokens["bos_token_id"], tokens["eos_token_id"]) == (bos, eos)
    assert (tokens["do_sample"], tokens["temperature"], tokens["top_p"]) == (True, 0.6, 0.9)
    # The way back knows the version from the config.
    assert convert(tmp_path / "hf", tmp_path / "back", "llama-hf2meta") == 0
    back = config_of(tmp_path / "back", "params.json")
    assert back.get("use_scaled_rope", False) is (scaling is not None)
    assert back.get("rope_theta", 10000.0) == theta


# What params.json says -> the version it is taken for.
LIKELY = [
    ({"norm_eps": 1e-6}, "1"),
    ({"n_layers": 80}, "1"),
    ({}, "2"),
    ({"n_kv_heads": 2, "n_layers": 80, "ffn_dim_multiplier": 1.3}, "2"),
    ({"vocab_size": 128256, "n_kv_heads": 2}, "3"),
    ({"vocab_size": 128256, "use_scaled_rope": True}, "3.1"),
    ({"vocab_size": 128256, "use_scaled_rope": True, "dim": 2048}, "3.2"),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("said", "version"), LIKELY)
def test_the_version_that_it_is_taken_for(said, version, nested):
    option = llama_meta.RECIPES[1].settings["llama_version"]
    config = params() | said
    scope = {"config": {"model": config} if nested else config, "has": lambda _pattern: True}
    assert expressions.evaluate(str(option.default)[1:-1], scope) == version


def test_a_tied_head_is_repeated_for_meta(tmp_path):
    tensors = whole()
    tied = hf(tensors)
    del tied["lm_head.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_hidden_layers": LAYERS, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5}, "tie_word_embeddings": True,
    }  # fmt: skip
    source = write(tmp_path / "hf", tied, config=config)
    assert convert(source, tmp_path / "meta", "llama-hf2meta", "model_parallel=2") == 0
    repeated = tensors | {"output.weight": tensors["tok_embeddings.weight"]}
    assert_ranks(tmp_path / "meta", ranks(repeated, 2, by_rows=True))
    found = config_of(tmp_path / "meta", "params.json")
    assert (found["use_scaled_rope"], found["rope_theta"]) == (True, 5e5)
    assert convert(tmp_path / "meta", tmp_path / "back", "llama-meta2hf", "llama_version=3.2") == 0
    assert_same(read(tmp_path / "back"), tied)
    assert convert(tmp_path / "meta", tmp_path / "untied", "llama-meta2hf", "llama_version=3.2", "tied=false") == 0
    assert raw(read(tmp_path / "untied")["lm_head.weight"]) == raw(tensors["tok_embeddings.weight"])
    assert config_of(tmp_path / "untied")["tie_word_embeddings"] is False


def test_a_head_that_is_taken_for_tied_is_compared(tmp_path, capsys):
    tensors = whole(8, 2, dim=2048, ffn=8, layers=1)
    config = params(8, 2, dim=2048, layers=1, use_scaled_rope=True)
    options = ("--recipe", "llama-meta2hf")
    source = write_ranks(tmp_path / "source", ranks(tensors, 2, by_rows=True), config)
    message = refusal(capsys, "convert", source, tmp_path / "hf", *options)
    assert "output.weight" in message
    assert "tok_embeddings.weight" in message
    assert convert(source, tmp_path / "untied", "llama-meta2hf", "tied=false") == 0
    assert raw(read(tmp_path / "untied")["lm_head.weight"]) == raw(tensors["output.weight"])
    assert convert(source, tmp_path / "asked", "llama-meta2hf", "llama_version=3.2") == 0
    assert "lm_head.weight" not in read(tmp_path / "asked")
    same = tensors | {"output.weight": tensors["tok_embeddings.weight"].clone()}
    source = write_ranks(tmp_path / "same", ranks(same, 2, by_rows=True), config)
    assert convert(source, tmp_path / "hf", "llama-meta2hf") == 0
    assert "lm_head.weight" not in read(tmp_path / "hf")
    assert config_of(tmp_path / "hf")["rope_scaling"]["factor"] == 32


BEYOND = [
    ("llama-hf2meta", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales rope"),
    ("llama-hf2meta", {"hidden_act": "gelu"}, "config.json says gelu"),
    ("mistral-hf2original", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope is scaled"),
]


@pytest.mark.parametrize(("recipe", "said", "message"), BEYOND)
def test_what_the_original_code_cannot_do(recipe, said, message, tmp_path, capsys):
    config = {"num_attention_heads": 4, "num_hidden_layers": LAYERS, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, **said}
    source = write(tmp_path / "hf", hf(whole()), config=config)
    assert message in refusal(capsys, "convert", source, tmp_path / "own", "--recipe", recipe)


def test_scaling_that_only_mistral_knows(tmp_path, capsys):
    source = write_consolidated(tmp_path / "source", whole(4, 2), mistral_params(yarn={"factor": 16}))
    assert "rope is scaled" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "mistral-original2hf")


def test_a_head_that_should_be_there(tmp_path, capsys):
    tensors = hf(whole())
    del tensors["lm_head.weight"]
    source = write(tmp_path / "hf", tensors, config={"num_attention_heads": 4, "tie_word_embeddings": False})
    assert "lm_head.weight" in refusal(capsys, "convert", source, tmp_path / "meta", "--recipe", "llama-hf2meta")


def meta_hidden(dim, multiple_of, ffn_dim_multiplier=None):
    """The size of a feed-forward layer as Meta's model.py computes it."""
    hidden = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


REAL = {
    (4096, 11008): {"multiple_of": 256},
    (4096, 14336): {"multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    (8192, 28672): {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    (16384, 53248): {"multiple_of": 4096, "ffn_dim_multiplier": 1.2},
    (2048, 8192): {"multiple_of": 256, "ffn_dim_multiplier": 1.5},
}


@pytest.mark.parametrize("sizes", REAL)
def test_the_feed_forward_numbers_of_real_models(sizes):
    assert llama_meta._feed_forward(*sizes) == REAL[sizes]


@pytest.mark.parametrize("dim", [8, 32, 100, 2048, 5120])
@pytest.mark.parametrize("hidden", [1, 2, 7, 24, 97, 1000, 11009, 13824, 53249])
def test_the_feed_forward_numbers_give_the_size(dim, hidden):
    found = llama_meta._feed_forward(dim, hidden)
    assert meta_hidden(dim, **found) == hidden


def test_files_beside_the_weights(tmp_path):
    source = write_ranks(tmp_path / "source", [whole()], params())
    notes = plan(source, tmp_path, "llama-meta2hf").notes
    assert any(note.startswith("tokenizer_config.json: not beside") for note in notes)
    assert convert(source, tmp_path / "hf", "llama-meta2hf") == 0
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    beside = tmp_path / "reference"
    beside.mkdir()
    (beside / "config.json").write_text('{"mine": 1}')
    (beside / "tokenizer_config.json").write_text("{}")
    given = plan(source, tmp_path, "llama-meta2hf", sidecars_from=beside)
    assert not any("tokenizer_config.json" in note for note in given.notes)
    assert convert(source, tmp_path / "with", "llama-meta2hf", "--sidecars-from", beside) == 0
    assert config_of(tmp_path / "with") == {"mine": 1}
    assert convert(tmp_path / "hf", tmp_path / "back", "llama-hf2meta", "--sidecars-from", source) == 0
    assert config_of(tmp_path / "back", "params.json") == params()
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"consolidated.00.pth", "params.json", "tokenizer.model"}


def test_without_params_the_config_is_not_guessed(tmp_path, capsys):
    source = write_ranks(tmp_path / "source", [whole()], None)
    message = refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "llama-meta2hf")
    assert "no value for n_heads" in message
    assert "give --set n_heads=..." in message
    made = plan(source, tmp_path, "llama-meta2hf", options={"n_heads": 4})
    assert any(note.startswith("config.json is not written: it takes params.json") for note in made.notes)


# Mistral -----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("shards", "index"), [(1, ""), (3, ""), (3, "consolidated.safetensors.index.json"), (2, "model.safetensors.index.json")]
)
def test_mistral_there_and_back(shards, index, both, tmp_path):
    tensors = whole(4, 2)
    source = write_consolidated(tmp_path / "source", tensors, mistral_params(), shards, index)
    if both:  # as repositories that have the model in both forms
        save_file({"model.norm.weight": torch.zeros(3)}, source / "model-00001-of-00001.safetensors")
        if index != "model.safetensors.index.json":
            one = {"model.norm.weight": "model-00001-of-00001.safetensors"}
            (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": one}))
    assert convert(source, tmp_path / "hf", "mistral-original2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, 4, 2))
    assert convert(tmp_path / "hf", tmp_path / "back", "mistral-hf2original") == 0
    assert_same(load_file(tmp_path / "back" / "consolidated.safetensors"), tensors)
    assert config_of(tmp_path / "back", "params.json") == mistral_params(head_dim=DIM // 4)
    assert convert(tmp_path / "hf", tmp_path / "sharded", "mistral-hf2original", "--max-shard-size", "6KB") == 0
    assert (tmp_path / "sharded" / "consolidated.safetensors.index.json").exists()
    assert convert(tmp_path / "sharded", tmp_path / "again", "mistral-original2hf") == 0
    assert_same(read(tmp_path / "again"), hf(tensors, 4, 2))


def test_files_with_names_that_only_the_index_knows(tmp_path, capsys):
    tensors = whole(4, 2)
    source = write_consolidated(tmp_path / "source", tensors, mistral_params(), 2)
    index = source / "consolidated.safetensors.index.json"
    index.write_text(index.read_text().replace("consolidated-0000", "part"))
    for number in (1, 2):
        (source / f"consolidated-0000{number}-of-00002.safetensors").rename(source / f"part{number}-of-00002.safetensors")
    save_file({"model.norm.weight": torch.zeros(3)}, source / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert convert(source, tmp_path / "hf", "mistral-original2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, 4, 2))
    (source / "part2-of-00002.safetensors").unlink()
    message = refusal(capsys, "convert", source, tmp_path / "again", "--recipe", "mistral-original2hf")
    assert "part2-of-00002.safetensors" in message


def test_which_recipes_fit(tmp_path):
    llama = write_ranks(tmp_path / "llama", ranks(whole(4, 2), 2), params(4, 2))
    assert "llama-meta2hf" in match_recipes(llama)
    mistral = write_consolidated(tmp_path / "mistral", whole(4, 2), mistral_params())
    assert "mistral-original2hf" in match_recipes(mistral)
    own, _ = mixtral()
    original = write_ranks(tmp_path / "mixtral", spread(own, 8), mixtral_params(), "consolidated.{:02}.pt")
    assert "mixtral-original2hf" in match_recipes(original)


@pytest.mark.parametrize("name", ["consolidated.{:02}.pth", "consolidated.{}.pth"])
@pytest.mark.parametrize(("heads", "kv", "count"), [(4, 4, 2), (4, 2, 2), (4, 2, 1), (8, 2, 4)])
def test_mistral_split_over_ranks(heads, kv, count, name, tmp_path):
    tensors = whole(heads, kv, head_dim=8)
    copies = max(1, count // kv)
    config = mistral_params(heads, kv, head_dim=8)
    source = write_ranks(tmp_path / "source", ranks(tensors, count, copies=copies), config, name)
    assert convert(source, tmp_path / "hf", "mistral-original2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, heads, kv))
    options = (f"model_parallel={count}", "--format", "torch")
    assert convert(tmp_path / "hf", tmp_path / "back", "mistral-hf2original", *options) == 0
    assert_ranks(tmp_path / "back", ranks(tensors, count, copies=copies))


def test_ranks_of_mistral_are_torch_files(tmp_path, capsys):
    source = write_consolidated(tmp_path / "source", whole(4, 2), mistral_params())
    assert convert(source, tmp_path / "hf", "mistral-original2hf") == 0
    options = ("--recipe", "mistral-hf2original", "--set", "model_parallel=2")
    assert "give --format torch" in refusal(capsys, "convert", tmp_path / "hf", tmp_path / "back", *options)


def test_heads_of_another_size_than_their_share(tmp_path):
    tensors = whole(4, 2, head_dim=12)
    source = write_consolidated(tmp_path / "source", tensors, mistral_params(head_dim=12))
    assert convert(source, tmp_path / "hf", "mistral-original2hf") == 0
    assert_same(read(tmp_path / "hf"), hf(tensors, 4, 2))
    assert config_of(tmp_path / "hf")["head_dim"] == 12
    assert convert(tmp_path / "hf", tmp_path / "back", "mistral-hf2original") == 0
    assert_same(load_file(tmp_path / "back" / "consolidated.safetensors"), tensors)


SAID = [
    ({}, (), {"sliding_window": None, "max_position_embeddings": 32768, "rope_theta": 1e6}),
    ({"sliding_window": "4096"}, (), {"sliding_window": 4096}),
    ({"max_seq_len": 65536}, (), {"max_position_embeddings": 65536}),
    ({}, ("max_position_embeddings=8192",), {"max_position_embeddings": 8192}),
]


@pytest.mark.parametrize(("said", "options", "wanted"), SAID)
def test_the_config_of_mistral(said, options, wanted, tmp_path):
    source = write_consolidated(tmp_path / "source", whole(4, 2), mistral_params(**said))
    assert convert(source, tmp_path / "hf", "mistral-original2hf", *options) == 0
    found = config_of(tmp_path / "hf")
    assert found["architectures"] == ["MistralForCausalLM"]
    assert {key: found[key] for key in wanted} == wanted
    assert (found["bos_token_id"], found["eos_token_id"], found["intermediate_size"]) == (1, 2, FFN)
    assert convert(tmp_path / "hf", tmp_path / "back", "mistral-hf2original") == 0
    assert convert(tmp_path / "back", tmp_path / "again", "mistral-original2hf") == 0
    assert config_of(tmp_path / "again") == found


@pytest.mark.parametrize("name", ["layers.0.attention.wq.lora_A.weight", "vision_encoder.norm.weight"])
def test_names_that_no_mistral_has(name, tmp_path, capsys):
    source = write_consolidated(tmp_path / "source", whole(4, 2) | {name: torch.ones(2)}, mistral_params())
    assert f"{name}: no rule" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "mistral-original2hf")


# Mixtral -----------------------------------------------------------------------------------------------------------


def merged(folder):
    found = {}
    for part in files_of(folder).values():
        assert not set(part) & set(found)
        found |= part
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("count", "name"), [(8, "consolidated.{:02}.pt"), (3, "consolidated.{:02}.pt"), (1, "consolidated.{:02}.pth")])
@pytest.mark.parametrize("experts", [1, 4, 5])
def test_mixtral_there_and_back(experts, count, name, tmp_path):
    own, plain = mixtral(experts)
    source = write_ranks(tmp_path / "source", spread(own, count), mixtral_params(experts), name)
    assert convert(source, tmp_path / "hf", "mixtral-original2hf") == 0
    assert_same(read(tmp_path / "hf"), plain)
    assert convert(tmp_path / "hf", tmp_path / "back", "mixtral-hf2original") == 0
    assert list(files_of(tmp_path / "back")) == [f"consolidated.{number:02}.pt" for number in range(8)]
    assert_same(merged(tmp_path / "back"), own)
    assert config_of(tmp_path / "back", "params.json") == mixtral_params(experts, num_experts_per_tok=2)
    assert convert(tmp_path / "hf", tmp_path / "one", "mixtral-hf2original", "--single-file") == 0
    assert list(files_of(tmp_path / "one")) == ["consolidated.00.pt"]
    assert run("verify", source, tmp_path / "hf", "--recipe", "mixtral-original2hf", "--quiet") == 0
    assert run("verify", tmp_path / "hf", source, "--recipe", "mixtral-hf2original", "--quiet") == 0


def test_files_of_mixtral_are_about_as_large(tmp_path):
    own, _ = mixtral(layers=12)
    source = write_ranks(tmp_path / "source", [own], mixtral_params(layers=12), "consolidated.{:02}.pt")
    assert convert(source, tmp_path / "hf", "mixtral-original2hf") == 0
    assert convert(tmp_path / "hf", tmp_path / "back", "mixtral-hf2original") == 0
    sizes = [sum(t.nbytes for t in part.values()) for part in files_of(tmp_path / "back").values()]
    largest = max(t.nbytes for t in own.values())
    assert max(sizes) - min(sizes) <= 2 * largest


def test_a_matrix_for_each_expert(tmp_path):
    own, plain = mixtral(stacked=False)
    config = mistral_params(head_dim=DIM // 4, moe={"num_experts": 4, "num_experts_per_tok": 2})
    source = write_consolidated(tmp_path / "source", own, config, 2)
    assert convert(source, tmp_path / "hf", "mixtral-original2hf") == 0
    assert_same(read(tmp_path / "hf"), plain)
    assert config_of(tmp_path / "hf")["num_local_experts"] == 4
    assert convert(tmp_path / "hf", tmp_path / "back", "mixtral-hf2original", "experts=separate") == 0
    assert_same(merged(tmp_path / "back"), own)
    assert config_of(tmp_path / "back", "params.json") == config


def test_the_config_of_mixtral(tmp_path):
    own, _ = mixtral()
    source = write_ranks(tmp_path / "source", spread(own, 8), mixtral_params(sliding_window="4096"), "consolidated.{:02}.pt")
    assert convert(source, tmp_path / "hf", "mixtral-original2hf", "--dtype", "fp16") == 0
    found = config_of(tmp_path / "hf")
    wanted = {
        "architectures": ["MixtralForCausalLM"], "dtype": "float16", "hidden_size": DIM, "intermediate_size": FFN, "num_local_experts": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": 4096, "vocab_size": VOCAB, "rope_theta": 1e6,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_a_file_of_mixtral_that_is_missing(tmp_path, capsys):
    own, _ = mixtral()
    parts = spread(own, 8)
    for number in range(8):
        source = write_ranks(tmp_path / f"source{number}", parts, mixtral_params(), "consolidated.{:02}.pt")
        (source / f"consolidated.{number:02}.pt").unlink()
        refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "mixtral-original2hf")
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("option", ["num_local_experts=3", "num_local_experts=5", "n_heads=5"])
def test_numbers_of_mixtral_that_are_wrong(option, tmp_path, capsys):
    own, plain = mixtral()
    source = write_ranks(tmp_path / "source", [own], mixtral_params(), "consolidated.{:02}.pt")
    refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "mixtral-original2hf", "--set", option)
    saved = write(tmp_path / "saved", plain, config=mixtral_params(experts=int(option[-1])) if "experts" in option else None)
    refusal(capsys, "convert", saved, tmp_path / "back", "--recipe", "mixtral-hf2original")


# What the reference scripts make -----------------------------------------------------------------------------------

GOLDEN = {
    "llama-meta-a": ("llama-meta2hf", "llama-hf2meta"),
    "llama-meta-a2": ("llama-meta2hf", "llama-hf2meta"),
    "mistral-a": ("mistral-original2hf", "mistral-hf2original"),
    "mixtral-a": ("mixtral-original2hf", "mixtral-hf2original"),
}
LEFT_OUT = {"rope.freqs"}


def by_file(case):
    """The source's tensors by file."""
    files = case["source"].get("files")
    if files is None:
        tensors, found = golden_cases.source_tensors(case), {}
        for name, file in case["source_shards"].items():
            found.setdefault(file, {})[name] = tensors[name]
        return found
    return {
        file: {name: golden_cases.source_tensor(f"{file}/{name}", one["dtype"], one["shape"]) for name, one in names.items()}
        for file, names in files.items()
    }


def write_golden(case, folder):
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(case["config"]))
    for file, tensors in by_file(case).items():
        (save_file if file.endswith(".safetensors") else torch.save)(tensors, folder / file)
    return folder


@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_reference_makes(name, tmp_path):
    case = golden_cases.load(f"originals/{name}")
    recipe, inverse = GOLDEN[name]
    source = write_golden(case, tmp_path / "source")
    version = [f"llama_version={case['params']['llama_version']}"] if "llama" in name else []
    cast = ["--dtype", "bfloat16"] if version else []  # the script always writes that
    assert convert(source, tmp_path / "hf", recipe, *version, *cast) == 0
    found = {tensor: golden_cases.describe(value) for tensor, value in read(tmp_path / "hf").items()}
    assert found == case["expected"]
    made = config_of(tmp_path / "hf")
    odd = {key: value for key, value in case["expected_config"].items() if value is not None and key in made and made[key] != value}
    assert not odd
    left = {key for key, value in case["expected_config"].items() if value is not None and key not in made}
    assert left == {"transformers_version"} | ({"pretraining_tp"} if version else set())
    if version:
        tokens = case["expected_generation_config"]
        assert config_of(tmp_path / "hf", "generation_config.json") == {k: v for k, v in tokens.items() if k != "transformers_version"}

    assert convert(source, tmp_path / "kept", recipe, *version) == 0
    parts = by_file(case)
    ranked = [f"model_parallel={len(parts)}"] if version else []
    assert convert(tmp_path / "kept", tmp_path / "back", inverse, *version, *ranked) == 0
    first = next(iter(parts.values()))
    wanted = {
        f"{file if version else ''}{key}": first[key] if tensor.ndim == 1 and version else tensor
        for file, part in parts.items()
        for key, tensor in part.items()
        if key not in LEFT_OUT
    }
    files = {} if name == "mistral-a" else files_of(tmp_path / "back")
    again = {f"{file if version else ''}{key}": tensor for file, part in files.items() for key, tensor in part.items()}
    assert_same(again or load_file(tmp_path / "back" / "consolidated.safetensors"), wanted)


# Memory ------------------------------------------------------------------------------------------------------------


def in_300_mb(source, target, recipe, *options):
    """Converts in a process of its own, which keeps to its budget."""
    given = ["convert", source, target, "--recipe", recipe, "--max-memory", "300MB", "--json", *options]
    done = subprocess.run([sys.executable, "-m", "streamconv", *map(str, given)], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_rss"] <= found["peak_memory"] <= 300_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "forward", "back", "options"),
    [
        ("llama-3-8b", "llama-hf2meta", "llama-meta2hf", ("--set", "model_parallel=4")),
        ("mixtral-8x7b", "mixtral-hf2original", "mixtral-original2hf", ()),
    ],
)
def test_gigabytes_there_and_back(model, forward, back, options, tmp_path):
    made.make_checkpoint(model, tmp_path / "hf", size=8_000_000_000, sparse=True)
    in_300_mb(tmp_path / "hf", tmp_path / "own", forward, *options)
    files = sorted((tmp_path / "own").glob("consolidated.*"))
    assert len(files) == (4 if options else 8)
    assert sum(file.stat().st_size for file in files) > 7_500_000_000
    in_300_mb(tmp_path / "own", tmp_path / "back", back)
    assert made.check_stamps(tmp_path / "back") == []
    in_300_mb(tmp_path / "own", tmp_path / "cast", back, "--dtype", "float16")  # torch computes every element
