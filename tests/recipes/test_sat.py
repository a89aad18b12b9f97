"""SwissArmyTransformer folders: the container, golden cases, the partition over ranks, low-rank matrices, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import einops
import golden_cases
import pytest
import sat_models
import torch
from checkpoint_files import assert_same, numbered, random_tensor, raw, read, refusal, run, write

import streamconv

SAMPLES = Path(__file__).parent.parent / "data" / "sat"
CASES = {
    "cogvlm-hf2sat-a": ("cogvlm-hf2sat", "1"),
    "cogvlm-sat2hf-a": ("cogvlm-sat2hf", None),
    "sat-llama-hf2sat-a": ("llama-hf2sat", "1"),
    "sat-llama-sat2hf-a": ("llama-sat2hf", None),
    "sat-mp-merge-a": ("sat-repartition", "1"),
    "sat-mp-split-a": ("sat-repartition", "2"),
}
RANK = "mp_rank_{:02}_model_states.pt"


def write_sat(folder, ranks, config=None, iteration="1", latest=None, **beside):
    """A folder as SAT's save_checkpoint writes it, from a dict of tensors for each rank."""
    (folder / iteration).mkdir(parents=True)
    (folder / "latest").write_text(iteration if latest is None else latest)
    if config is not None:
        (folder / "model_config.json").write_text(json.dumps(config))
    for rank, tensors in enumerate(ranks):
        torch.save({**beside, "module": tensors}, folder / iteration / RANK.format(rank))
    return folder


def read_sat(folder):
    """The tensors of each rank; the folder holds nothing else but its config."""
    iteration = (folder / "latest").read_text()
    files = sorted((folder / iteration).iterdir())
    assert [file.name for file in files] == [RANK.format(rank) for rank in range(len(files))]
    loaded = [torch.load(file, weights_only=True) for file in files]
    assert all(set(one) == {"module"} for one in loaded)
    return [one["module"] for one in loaded]


def source_tensor(key, record):
    if record.get("fill") != "inv_freq":
        return golden_cases.source_tensor(key, record["dtype"], record["shape"])
    size = record["shape"][0]
    return (1.0 / 10000 ** (torch.arange(0, 2 * size, 2, dtype=torch.float32) / (2 * size))).to(getattr(torch, record["dtype"]))


def write_case(case, folder):
    source, config = case["source"], case["config"]
    if "files" in source:
        files = {file: {n: source_tensor(f"{file}/{n}", r) for n, r in names.items()} for file, names in source["files"].items()}
        return write_sat(folder, [files[RANK.format(rank)] for rank in range(len(files))], config)
    tensors = {name: source_tensor(name, record) for name, record in source.items()}
    return write_sat(folder, [tensors], config) if case["source_format"].startswith("sat") else write(folder, tensors, config=config)


# Golden cases ------------------------------------------------------------------------------------------------------


def test_every_case_is_run():
    assert {path.stem for path in (golden_cases.FOLDER / "sat").glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden(name, tmp_path):
    case = golden_cases.load(f"sat/{name}")
    recipe, ranks = CASES[name]
    settings = ["--set", f"model_parallel={ranks}"] if ranks else []
    assert run("convert", write_case(case, tmp_path / "in"), tmp_path / "out", "--recipe", recipe, "--quiet", *settings) == 0
    if ranks is None:
        found = read(tmp_path / "out")
    else:
        loaded = read_sat(tmp_path / "out")
        found = loaded[0] if len(loaded) == 1 else {f"{RANK.format(k)}/{n}": t for k, one in enumerate(loaded) for n, t in one.items()}
    assert {n: golden_cases.describe(t) for n, t in found.items()} == case["expected"]
    if "expected_model_config" in case:
        made = json.loads((tmp_path / "out" / "model_config.json").read_text())
        assert made == {key: value for key, value in case["expected_model_config"].items() if key != "tokenizer_type"}


@pytest.mark.parametrize("sample", ["cogvlm-hf2sat-a", "sat-llama-hf2sat-a", "sat-mp2-saved-by-sat"])
def test_what_sat_saved_is_read(sample, tmp_path):
    stored = read_sat(SAMPLES / sample)
    wanted = {f"{RANK.format(k)}/{name}": tensor for k, one in enumerate(stored) for name, tensor in one.items()}
    assert_same({name: entry.torch() for name, entry in streamconv.open(SAMPLES / sample).items()}, wanted)
    config = json.loads((SAMPLES / sample / "model_config.json").read_text())
    recipe = "cogvlm-sat2hf" if config["model_class"] == "CogVLMModel" else "llama-sat2hf"
    assert run("convert", SAMPLES / sample, tmp_path / "hf", "--recipe", recipe, "--quiet") == 0
    forth = ("--recipe", recipe.replace("sat2hf", "hf2sat"), "--set", f"model_parallel={config['model_parallel_size']}", "--quiet")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", *forth) == 0
    for rank, (found, wanted) in enumerate(zip(read_sat(tmp_path / "sat"), stored, strict=True)):
        known = {name for name in wanted if not name.endswith("inv_freq") and not (rank and "layernorm" in name)}  # norms differ by rank
        assert_same({name: found[name] for name in known}, {name: wanted[name] for name in known})
    assert json.loads((tmp_path / "sat" / "model_config.json").read_text()) == {k: v for k, v in config.items() if k != "tokenizer_type"}


# The container ----------------------------------------------------------------------------------------------------


def small(vocab=1024, kv_heads=4):
    """A whole Llama as SAT has it, and its model_config.json."""
    wide = sat_models.H + 2 * kv_heads * sat_models.H // sat_models.HEADS
    shapes = {"transformer.word_embeddings.weight": (vocab, sat_models.H), "mixins.lm.lm_head.weight": (vocab, sat_models.H)}
    for i in range(2):
        at = f"transformer.layers.{i}"
        shapes |= {f"{at}.attention.query_key_value.weight": (wide, sat_models.H), f"{at}.attention.query_key_value.bias": (wide,)}
        shapes |= sat_models.linear(f"{at}.attention.dense", sat_models.H, sat_models.H)
        shapes |= sat_models.linear(f"{at}.mlp.dense_h_to_4h", sat_models.FFN, sat_models.H)
        shapes |= sat_models.linear(f"{at}.mlp.dense_4h_to_h", sat_models.H, sat_models.FFN)
        shapes |= sat_models.norm(f"{at}.input_layernorm")
    config = {"hidden_size": sat_models.H, "num_attention_heads": sat_models.HEADS, "vocab_size": vocab, "model_parallel_size": 1}
    return numbered(shapes), config | ({"num_multi_query_heads": kv_heads} if kv_heads != sat_models.HEADS else {})


def strided(tensor, strides, ranks, rank):
    """A rank's share, as ColumnParallelLinear.partition cuts it."""
    factor = len(tensor) // sum(strides)
    blocks = tensor.split([factor * stride for stride in strides])
    return torch.cat([block.chunk(ranks)[rank] for block in blocks])


def share(name, tensor, ranks, rank, kv_heads):
    """What SAT's layers make of a whole tensor for one rank."""
    if "query_key_value" in name:
        return strided(tensor, [1, 1, 1] if kv_heads == sat_models.HEADS else [sat_models.HEADS, kv_heads, kv_heads], ranks, rank)
    if "dense_h_to_4h" in name or "lm_head" in name or ("word_embeddings" in name and len(tensor) >= 1000):
        return tensor.chunk(ranks)[rank]
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(ranks, 1)[rank].contiguous()
    return tensor


@pytest.mark.sampled(3)
@pytest.mark.parametrize("vocab", [996, 1000])
@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("ranks", [2, 4])
def test_partition_is_that_of_sats_layers(ranks, kv_heads, vocab, tmp_path):
    whole, config = small(vocab, kv_heads)
    shares = [{name: share(name, tensor, ranks, rank, kv_heads) for name, tensor in whole.items()} for rank in range(ranks)]
    write_sat(tmp_path / "one", [whole], config)
    settings = ("--recipe", "sat-repartition", "--quiet", "--set")
    assert run("convert", tmp_path / "one", tmp_path / "many", *settings, f"model_parallel={ranks}") == 0
    for found, wanted in zip(read_sat(tmp_path / "many"), shares, strict=True):
        assert_same(found, wanted)
    assert json.loads((tmp_path / "many" / "model_config.json").read_text()) == {**config, "model_parallel_size": ranks}
    write_sat(tmp_path / "shares", shares, {**config, "model_parallel_size": ranks})
    assert run("convert", tmp_path / "shares", tmp_path / "again", *settings, "model_parallel=1") == 0
    assert_same(read_sat(tmp_path / "again")[0], whole)


def test_from_two_ranks_to_four_in_one_pass(tmp_path):
    whole, config = small()
    shares = [[{n: share(n, t, ranks, rank, 4) for n, t in whole.items()} for rank in range(ranks)] for ranks in (2, 4)]
    write_sat(tmp_path / "two", shares[0], {**config, "model_parallel_size": 2})
    assert run("convert", tmp_path / "two", tmp_path / "four", "--recipe", "sat-repartition", "--set", "model_parallel=4", "--quiet") == 0
    for found, wanted in zip(read_sat(tmp_path / "four"), shares[1], strict=True):
        assert_same(found, wanted)


def test_shapes_tell_grouped_queries_where_no_config_is(tmp_path):
    whole, _ = small(kv_heads=2)
    write_sat(tmp_path / "one", [whole])
    assert run("convert", tmp_path / "one", tmp_path / "two", "--recipe", "sat-repartition", "--set", "model_parallel=2", "--quiet") == 0
    found = read_sat(tmp_path / "two")[1]["transformer.layers.1.attention.query_key_value.weight"]
    assert torch.equal(found, strided(whole["transformer.layers.1.attention.query_key_value.weight"], [8, 2, 2], 2, 1))


def test_what_deepspeed_adds_is_left_out(tmp_path):
    whole, config = small()
    folder = write_sat(tmp_path / "in", [whole], config, iteration="release", iteration_number=3, torch_rng_state=torch.zeros(5))
    assert run("convert", folder, tmp_path / "out", "--recipe", "sat-repartition", "--quiet") == 0
    assert_same(read_sat(tmp_path / "out")[0], whole)


def test_the_folder_of_an_iteration_will_do(tmp_path):
    whole, config = small()
    folder = write_sat(tmp_path / "in", [whole], config)
    assert run("convert", folder / "1", tmp_path / "out", "--recipe", "sat-repartition", "--quiet") == 0
    assert_same(read_sat(tmp_path / "out")[0], whole)


def test_a_file_is_that_of_torch_save(tmp_path):
    whole, config = small()
    folder = write_sat(tmp_path / "in", [whole], config)
    assert run("convert", folder, tmp_path / "out", "--recipe", "sat-repartition", "--quiet") == 0
    assert (tmp_path / "out" / "1" / RANK.format(0)).read_bytes() == (folder / "1" / RANK.format(0)).read_bytes()


def test_sat_without_a_recipe_keeps_ranks(tmp_path):
    whole, config = small()
    shares = [{n: share(n, t, 2, rank, 4) for n, t in whole.items()} for rank in range(2)]
    folder = write_sat(tmp_path / "in", shares, {**config, "model_parallel_size": 2})
    assert run("convert", folder, tmp_path / "out", "--format", "sat", "--dtype", "float16", "--quiet") == 0
    for found, wanted in zip(read_sat(tmp_path / "out"), shares, strict=True):
        assert_same(found, {name: tensor.half() for name, tensor in wanted.items()})


def test_one_rank_is_one_file_if_that_is_asked_for(tmp_path, capsys):
    whole, config = small()
    folder = write_sat(tmp_path / "in", [whole], config)
    settings = ("--recipe", "sat-repartition", "--quiet")
    assert run("convert", folder, tmp_path / RANK.format(0), *settings) == 0
    assert (tmp_path / RANK.format(0)).read_bytes() == (folder / "1" / RANK.format(0)).read_bytes()
    two = (*settings, "--set", "model_parallel=2")
    assert "give a directory" in refusal(capsys, "convert", folder, tmp_path / "two.pt", *two)


def test_a_finished_folder_is_verified_and_resumed(tmp_path):
    whole, config = small()
    folder = write_sat(tmp_path / "in", [whole], config)
    settings = ("--recipe", "sat-repartition", "--set", "model_parallel=2", "--quiet")
    assert run("convert", folder, tmp_path / "out", *settings, "--verify") == 0
    assert run("verify", folder, tmp_path / "out", *settings) == 0
    assert run("convert", folder, tmp_path / "out", *settings, "--resume") == 0
    torch.save({"module": read_sat(tmp_path / "out")[0]}, tmp_path / "out" / "1" / RANK.format(1))
    assert run("verify", folder, tmp_path / "out", *settings) == 1


def test_overwriting_leaves_no_rank_behind(tmp_path):
    whole, config = small()
    folder = write_sat(tmp_path / "in", [whole], config)
    settings = ("--recipe", "sat-repartition", "--quiet", "--set")
    assert run("convert", folder, tmp_path / "out", *settings, "model_parallel=4") == 0
    assert run("convert", folder, tmp_path / "out", *settings, "model_parallel=2", "--overwrite") == 0
    assert len(read_sat(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "latest").write_text("0"), "expected the number of an iteration"),
        (lambda f: (f / "latest").write_text("../1"), "expected the number of an iteration"),
        (lambda f: (f / "latest").write_text("7"), "names 7, and there is no such folder"),
        (lambda f: (f / "1" / RANK.format(0)).unlink(), "no mp_rank_00_model_states.pt"),
        (lambda f: (f / "1" / RANK.format(1)).rename(f / "1" / RANK.format(2)), "no mp_rank_01_model_states.pt"),
        (lambda f: (f / "1" / RANK.format(1)).unlink(), "model_config.json says 2 ranks"),
        (lambda f: torch.save({"model": {}}, f / "1" / RANK.format(1)), "module"),
        (lambda f: [(f / "1" / RANK.format(k)).rename(f / "1" / f"z3_rank_0{k}_model_states.pt") for k in (0, 1)], "ZeRO stage 3"),
    ],
)
def test_damaged_folders_are_refused(damage, said, tmp_path, capsys):
    whole, config = small()
    shares = [{n: share(n, t, 2, rank, 4) for n, t in whole.items()} for rank in range(2)]
    folder = write_sat(tmp_path / "in", shares, {**config, "model_parallel_size": 2})
    damage(folder)
    assert said in refusal(capsys, "convert", folder, tmp_path / "out", "--recipe", "sat-repartition", "--quiet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kv_heads", "ranks"), [(4, 3), (8, 16), (1, 2), (2, 4), (4, 0)])
def test_heads_are_not_cut(kv_heads, ranks, tmp_path, capsys):
    whole, config = small(kv_heads=kv_heads)
    folder = write_sat(tmp_path / "in", [whole], config)
    settings = ("--recipe", "sat-repartition", "--set", f"model_parallel={ranks}", "--quiet")
    said = refusal(capsys, "convert", folder, tmp_path / "out", *settings)
    assert "not divisible by that" in said or "expected 1 or more" in said


def test_names_without_ranks_are_no_sat_folder(tmp_path, capsys):
    write(tmp_path / "in", numbered({"a": (2,)}))
    assert "use a recipe" in refusal(capsys, "convert", tmp_path / "in", tmp_path / "out", "--format", "sat", "--quiet")


# Families ----------------------------------------------------------------------------------------------------------


def hf(family, folder, dtype=torch.float16, **config):
    shapes, own = sat_models.FAMILIES[family]
    tensors = numbered(shapes(), dtype)
    write(folder, tensors, config={**own, **config})
    return tensors


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"rope_theta": 500000.0}, "base 10000"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scales the rotary embedding"),
        ("llama", {"head_dim": 8}, ""),
        ("cogvlm", {"num_hidden_layers": 40}, "first 32 layers"),
    ],
)
def test_what_sats_models_cannot_be_is_refused(family, config, said, tmp_path, capsys):
    hf(family, tmp_path / "hf", **config)
    assert said in refusal(capsys, "convert", tmp_path / "hf", tmp_path / "out", "--recipe", f"{family}-hf2sat", "--quiet")


def test_a_tied_head_is_stored_and_left_out_again(tmp_path):
    tensors = hf("llama", tmp_path / "hf", tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    write(tmp_path / "tied", tensors, config={**sat_models.LLAMA_CONFIG, "tie_word_embeddings": True})
    assert run("convert", tmp_path / "tied", tmp_path / "sat", "--recipe", "llama-hf2sat", "--set", "model_parallel=2", "--quiet") == 0
    first = read_sat(tmp_path / "sat")[0]
    assert raw(first["mixins.lm.lm_head.weight"]) == raw(first["transformer.word_embeddings.weight"])
    back = ("--recipe", "llama-sat2hf", "--set", "tie_word_embeddings=true", "--quiet")
    assert run("convert", tmp_path / "sat", tmp_path / "back", *back) == 0
    assert_same(read(tmp_path / "back"), tensors)


def test_a_head_that_is_no_longer_the_embedding_is_said_to_be_so(tmp_path, capsys):
    hf("gpt2", tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "gpt2-hf2sat", "--quiet") == 0
    (whole,) = read_sat(tmp_path / "sat")
    whole["mixins.gpt2-final.lm_head.weight"] = whole["transformer.word_embeddings.weight"] + 1
    config = json.loads((tmp_path / "sat" / "model_config.json").read_text())
    write_sat(tmp_path / "tuned", [whole], config)
    assert run("convert", tmp_path / "tuned", tmp_path / "out", "--recipe", "gpt2-sat2hf", "--quiet") != 0
    apart = ("--recipe", "gpt2-sat2hf", "--set", "tie_word_embeddings=false", "--quiet")
    assert run("convert", tmp_path / "tuned", tmp_path / "out", *apart) == 0
    assert raw(read(tmp_path / "out")["lm_head.weight"]) == raw(whole["mixins.gpt2-final.lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_number_at_one_place_stands_on_one_side_only():
    with pytest.raises(streamconv.RecipeError, match=r"\{i=1\} must stand on one side only"):
        streamconv.Recipe("x", "", (streamconv.Rule("a.{i=1}", "b.{i}"),))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 3, 4), (6, 1, 2), (6, 2, 4), (5, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llamas_of_any_number_of_heads(heads, kv_heads, size, dtype, tmp_path):
    hidden, shapes = heads * size, {"model.embed_tokens.weight": (7, heads * size), "lm_head.weight": (7, heads * size)}
    for i in range(11):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.{n}_proj.weight": (rows * size, hidden) for n, rows in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        }
        shapes |= {f"{at}.self_attn.o_proj.weight": (hidden, hidden), f"{at}.mlp.down_proj.weight": (hidden, 10)}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (10, hidden) for n in ("up", "gate")}
        shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    tensors = numbered(shapes | {"model.norm.weight": (hidden,)}, dtype)
    config = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 11}
    write(tmp_path / "hf", tensors, shards=2, config=config)
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "llama-hf2sat", "--quiet") == 0
    (whole,) = read_sat(tmp_path / "sat")
    fused = torch.cat([tensors[f"model.layers.10.self_attn.{n}_proj.weight"] for n in "qkv"])
    assert raw(whole["transformer.layers.10.attention.query_key_value.weight"]) == raw(fused)
    frequencies = 1.0 / 10000 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    assert raw(whole["transformer.position_embeddings.inv_freq"]) == raw(frequencies)
    assert run("convert", tmp_path / "sat", tmp_path / "back", "--recipe", "llama-sat2hf", "--quiet") == 0
    assert_same(read(tmp_path / "back"), tensors)


def test_llama_of_before_its_layers_were_gated(tmp_path):
    tensors = hf("llama", tmp_path / "hf")
    old = ("--set", "is_gated_mlp=false", "--set", "is_rotary_emb=false", "--set", "model_parallel=2", "--quiet")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "llama-hf2sat", *old) == 0
    first = read_sat(tmp_path / "sat")[0]
    assert raw(first["mixins.mlp.gate_proj.1.weight"]) == raw(tensors["model.layers.1.mlp.gate_proj.weight"].chunk(2)[0])
    assert first["mixins.rotary.rotary_emb.inv_freq"].shape == (2,)
    config = json.loads((tmp_path / "sat" / "model_config.json").read_text())
    assert not {"is_gated_mlp", "is_rotary_emb"} & set(config)
    assert run("convert", tmp_path / "sat", tmp_path / "back", "--recipe", "llama-sat2hf", "--quiet") == 0
    assert_same(read(tmp_path / "back"), tensors)


def test_configs_come_from_a_folder_where_one_is_given(tmp_path):
    hf("llama", tmp_path / "hf")
    (tmp_path / "beside").mkdir()
    own = {"model_class": "LLaMAModel", "hidden_size": 32, "num_attention_heads": 8, "mine": 1, "model_parallel_size": 7}
    (tmp_path / "beside" / "model_config.json").write_text(json.dumps(own))
    (tmp_path / "beside" / "latest").write_text("9")
    beside = ("--sidecars-from", tmp_path / "beside", "--set", "model_parallel=2", "--quiet")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "llama-hf2sat", *beside) == 0
    assert json.loads((tmp_path / "sat" / "model_config.json").read_text()) == {**own, "model_parallel_size": 2}
    assert len(read_sat(tmp_path / "sat")) == 2
    back = ("--recipe", "llama-sat2hf", "--sidecars-from", tmp_path / "hf", "--quiet")
    assert run("convert", tmp_path / "sat", tmp_path / "back", *back) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())


def test_chatglm_queries_keys_and_values_become_blocks(tmp_path):
    tensors = hf("chatglm", tmp_path / "hf")
    name = "transformer.layers.1.attention.query_key_value.weight"
    by_head = tensors[name].view(sat_models.HEADS, 3, -1, sat_models.H)
    for option, wanted in (("blocks", by_head.transpose(0, 1).reshape(-1, sat_models.H)), ("heads", tensors[name])):
        settings = ("--recipe", "chatglm-hf2sat", "--set", f"qkv={option}", "--quiet")
        assert run("convert", tmp_path / "hf", tmp_path / option, *settings) == 0
        assert raw(read_sat(tmp_path / option)[0][name]) == raw(wanted)


@pytest.mark.parametrize(("family", "halves"), [("chatglm2", ("dense_h_to_4h", "w2")), ("chatglm3", ("w2", "dense_h_to_4h"))])
def test_halves_of_chatglms_wide_layer(family, halves, tmp_path):
    tensors = hf(family, tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", f"{family}-hf2sat", "--quiet") == 0
    found = read_sat(tmp_path / "sat")[0]
    places = {"w2": "mixins.mlp.w2.1.weight", "dense_h_to_4h": "transformer.layers.1.mlp.dense_h_to_4h.weight"}
    for half, wanted in zip(halves, tensors["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"].chunk(2), strict=True):
        assert raw(found[places[half]]) == raw(wanted)


def test_eva2_keys_have_zeros_for_a_bias(tmp_path):
    tensors = hf("eva2", tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "eva2-hf2sat", "--quiet") == 0
    found = read_sat(tmp_path / "sat")[0]["transformer.layers.1.attention.query_key_value.bias"]
    q, v = tensors["blocks.1.attn.q_bias"], tensors["blocks.1.attn.v_bias"]
    assert raw(found) == raw(torch.cat([q, torch.zeros_like(q), v]))


def test_cogvlms_experts_are_divided_and_its_projector_is_not(tmp_path):
    tensors = hf("cogvlm", tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "sat", "--recipe", "cogvlm-hf2sat", "--set", "model_parallel=4", "--quiet") == 0
    for rank, found in enumerate(read_sat(tmp_path / "sat")):
        at, tower, vit = "model.layers.1", "model.vision.transformer.layers.1", "mixins.eva.vit_model.transformer.layers.1"
        for name, source, cut in (
            ("mixins.rotary.vision_query_key_value_list.1.weight", f"{at}.self_attn.vision_expert_query_key_value.weight", (1, 1, 1)),
            ("mixins.rotary.vision_dense_list.1.weight", f"{at}.self_attn.vision_expert_dense.weight", None),
            ("mixins.mlp.gate_proj.1.weight", f"{at}.mlp.language_mlp.gate_proj.weight", (1,)),
            ("mixins.mlp.vision_gate_proj.1.weight", f"{at}.mlp.vision_mlp.gate_proj.weight", (1,)),
            ("mixins.mlp.vision_dense_h_to_4h_list.1.weight", f"{at}.mlp.vision_mlp.up_proj.weight", (1,)),
            ("mixins.mlp.vision_dense_4h_to_h_list.1.weight", f"{at}.mlp.vision_mlp.down_proj.weight", None),
            (
                f"{vit}.attention.query_key_value.bias",
                f"{tower}.attention.query_key_value.bias",
                (1, 1, 1),
            ),
            (f"{vit}.attention.dense.weight", f"{tower}.attention.dense.weight", None),
            (f"{vit}.mlp.dense_h_to_4h.bias", f"{tower}.mlp.fc1.bias", (1,)),
        ):
            whole = tensors[source]
            assert raw(found[name]) == raw(strided(whole, cut, 4, rank) if cut else whole.chunk(4, 1)[rank]), name
        for part in ("linear_proj", "dense_h_to_4h", "gate_proj", "dense_4h_to_h"):
            assert raw(found[f"mixins.eva.linear_proj.{part}.weight"]) == raw(tensors[f"model.vision.linear_proj.{part}.weight"])
        assert raw(found[f"{vit}.mlp.dense_4h_to_h.bias"]) == raw(tensors[f"{tower}.mlp.fc2.bias"])


# Low-rank matrices -------------------------------------------------------------------------------------------------


def adapted(ranks, kv_heads, rank=3, dtype=torch.bfloat16):
    """A model tuned by SAT's LoraMixin, for each of the ranks, and what merging makes of it."""
    whole, config = small(kv_heads=kv_heads)
    tuned, merged = [], []
    for number in range(ranks):
        mine = {name: share(name, tensor, ranks, number, kv_heads).to(dtype) for name, tensor in whole.items()}
        wanted = dict(mine)
        for i in range(2):
            for layer, sizes in (("query_key_value", (8, kv_heads, kv_heads)), ("dense", (1,))):
                at = f"transformer.layers.{i}.attention.{layer}"
                weight, bias = mine.pop(f"{at}.weight"), mine.pop(f"{at}.bias")
                rows = [len(weight) // sum(sizes) * size for size in sizes]
                seeds = range(100 * number, 100 * number + len(rows))
                downs = [random_tensor(rank, weight.shape[1], dtype=dtype, seed=s) for s in seeds]
                ups = [random_tensor(n, rank, dtype=dtype, seed=s + 50) for s, n in zip(seeds, rows, strict=True)]
                mine |= {f"{at}.original.weight": weight, f"{at}.original.bias": bias}
                mine |= {f"{at}.matrix_A.{k}": down for k, down in enumerate(downs)}
                mine |= {f"{at}.matrix_B.{k}": up for k, up in enumerate(ups)}
                product = torch.cat([up.double() @ down.double() for up, down in zip(ups, downs, strict=True)])
                wanted[f"{at}.weight"] = (weight.double() + product * 2 / rank).to(dtype)
        tuned.append(mine)
        merged.append(wanted)
    return tuned, merged, {**config, "model_parallel_size": ranks}


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_low_rank_matrices_are_merged(ranks, kv_heads, tmp_path):
    tuned, merged, config = adapted(ranks, kv_heads)
    write_sat(tmp_path / "in", tuned, config)
    settings = ("--recipe", "sat-repartition", "--set", f"model_parallel={ranks}", "--set", "merge_lora=true", "--set", "lora_alpha=2")
    assert run("convert", tmp_path / "in", tmp_path / "out", *settings, "--quiet", "--verify") == 0
    for found, wanted in zip(read_sat(tmp_path / "out"), merged, strict=True):
        assert_same(found, wanted)


def test_low_rank_matrices_that_are_not_merged_are_refused(tmp_path, capsys):
    tuned, _, config = adapted(1, 4)
    write_sat(tmp_path / "in", tuned, config)
    settings = (tmp_path / "in", tmp_path / "out", "--recipe", "sat-repartition", "--quiet")
    assert "--set merge_lora=true" in refusal(capsys, "convert", *settings)
    broken = {name: tensor for name, tensor in tuned[0].items() if not name.endswith("matrix_B.1")}
    shutil.rmtree(tmp_path / "in")
    write_sat(tmp_path / "in", [broken], config)
    said = refusal(capsys, "convert", *settings, "--set", "merge_lora=true")
    assert "matrix_B.1 is missing" in said


@pytest.mark.parametrize("layout", ["a b -> b a", "(r a) b -> r b a", "(a two) (b three) -> three a b two"])
def test_merged_weights_can_be_rearranged(layout, tmp_path):
    shapes = {"x.query_key_value.original.weight": (384, 300), "x.dense.original.weight": (300, 300), "x.dense.matrix_A.0": (130, 300)}
    shapes |= {f"x.query_key_value.matrix_A.{k}": (5, 300) for k in range(3)} | {
        f"x.query_key_value.matrix_B.{k}": (128, 5) for k in range(3)
    }
    tensors = numbered(shapes | {"x.dense.matrix_B.0": (300, 130)})
    sizes = {"r": 4, "two": 2, "three": 3}
    lora = {"op": "merge_lora", "merge": "True", "alpha": 3}
    parts = ",".join(["original.weight", *(f"matrix_{m}.{k}" for m in "AB" for k in range(3))])
    stage = {
        "name": "lora",
        "rules": [
            {"rule": f"x.query_key_value.{{part:{parts}}}", "right": "qkv", "op": lora},
            {"rule": "x.dense.{part:original.weight,matrix_A.0,matrix_B.0}", "right": "dense", "op": lora},
        ],
        "then": {"name": "turn", "rules": [{"rule": "{name*}", "right": "{name*}", "layout": layout, "dims": sizes}]},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(stage))
    write(tmp_path / "in", tensors)
    assert run("convert", tmp_path / "in", tmp_path / "out", "--recipe", tmp_path / "recipe.json", "--quiet") == 0
    found = read(tmp_path / "out")
    t = {name.removeprefix("x."): tensor.double() for name, tensor in tensors.items()}
    product = torch.cat([t[f"query_key_value.matrix_B.{k}"] @ t[f"query_key_value.matrix_A.{k}"] for k in range(3)])
    wanted = {
        "qkv": (t["query_key_value.original.weight"] + product * 3 / 5).float(),
        "dense": (t["dense.original.weight"] + t["dense.matrix_B.0"] @ t["dense.matrix_A.0"] * 3 / 130).float(),
    }
    left, right = layout.split(" -> ")
    known = {name: size for name, size in sizes.items() if name in layout.replace("(", " ").replace(")", " ").split()}
    assert_same(found, {name: einops.rearrange(tensor, f"{left} -> {right}", **known).contiguous() for name, tensor in wanted.items()})
