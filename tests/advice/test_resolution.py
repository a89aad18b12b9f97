"""``--to`` on the command line: what is printed does the same, and what is said to be there is."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from checkpoint_files import refusal, run, write
from meta_models import params, ranks, whole, write_ranks
from safetensors.torch import save_file
from seeded_defects import CONFIG

from streamconv import memory
from streamconv.advice.recognition import recognize
from streamconv.cli import command as cli
from tools.crash import read_tree


def test_what_is_printed_does_the_same(healthy, tmp_path, capsys):
    assert run("convert", healthy, tmp_path / "one", "--to", "meta,fp16", "--to", "tp=2", "--keep-dtype", "*norm*") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        f"= streamconv convert {healthy} {tmp_path / 'one'} --recipe llama-hf2meta --set model_parallel=2 --dtype float16"
    )
    words = shlex.split(first)[2:]
    assert words[0] == "convert"
    words[2] = str(tmp_path / "two")
    assert run(*words, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "two")
    assert run("plan", healthy, tmp_path / "three", "--to", "bin", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"]


def test_looking_keeps_to_the_budget(healthy, tmp_path, capsys, monkeypatch):
    peaks = iter([50 << 20, 120_000_000])
    monkeypatch.setattr(memory, "peak", lambda: next(peaks))
    assert cli.main(["convert", str(healthy), str(tmp_path / "out"), "--to", "fp32", "--max-memory", "100MB"]) == 2
    out, err = capsys.readouterr()
    assert not out
    what = "--max-memory 100 MB is too small for --to, which took 120 MB to look at SRC"
    assert err == f"streamconv: error: {what}: say the options that follow, or use --max-memory 120MB\n"
    assert not (tmp_path / "out").exists()


def test_each_word_that_there_is_said_to_be_leads_somewhere(healthy, tmp_path, capsys):
    line = refusal(capsys, "plan", healthy, tmp_path / "out", "--to", "hf")
    said, _, words = line.partition("; there is --to ")
    assert said == f"--to hf: {healthy} is that already"
    assert {"meta", "ms", "sat", "fp16", "fp32", "bin", "dcp"} <= set(words.split(", "))
    for word in words.split(", "):
        assert run("plan", healthy, tmp_path / "out", "--to", word, "--quiet") == 0, word
    assert not (tmp_path / "out").exists()


def test_ranks_are_joined_by_a_recipe_only(tmp_path, capsys):
    write_ranks(tmp_path / "src", ranks(whole(), 2), params())
    line = refusal(capsys, "convert", tmp_path / "src", tmp_path / "out", "--to", "bf16")
    assert line == f"--to bf16: {tmp_path / 'src'} is files of ranks, which only a recipe joins; there is --to hf"
    assert run("convert", tmp_path / "src", tmp_path / "out", "--to", "hf,bf16", "--quiet") == 0


def test_tensor_parallel_ranks_are_merged_by_the_model_s_plan(tmp_path):
    for rank in range(2):
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 4)}, tmp_path / f"model{rank}-mp2.safetensors")
    assert [(fit.name, fit.tried) for fit in recognize(tmp_path).fits] == [("tp-merge", False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "fp32", "--dtype", "fp16"], "--dtype fp16: --to says --dtype float32: leave out one of them"),
        (["--to", "ms", "--recipe", "llama-hf2meta"], "--to ms: --recipe llama-hf2meta does not lead there"),
        (["--to", "ms", "--set", "x"], "--set x: expected KEY=VALUE"),
        (["--to", "nonsense"], "--to nonsense: nothing is called so"),
    ],
)
def test_what_contradicts_it_is_refused(healthy, tmp_path, capsys, options, message):
    assert message in refusal(capsys, "convert", healthy, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_family_of_which_there_is_no_recipe_is_asked_about(healthy, tmp_path, capsys):
    (healthy / "config.json").write_text(json.dumps(CONFIG | {"model_type": "granite"}))
    line = refusal(capsys, "convert", healthy, tmp_path / "out", "--to", "meta")
    assert "config.json says model type granite" in line
    assert line.endswith("llama-hf2meta; say by --recipe that it is meant")
    assert run("convert", healthy, tmp_path / "out", "--to", "meta", "--recipe", "llama-hf2meta", "--quiet") == 0


@pytest.mark.parametrize("base", ["org/name", "https://host/name", "memory://name"])
def test_no_base_is_fetched_because_an_adapter_says_so(tmp_path, capsys, base):
    own = tmp_path / "lora"
    own.mkdir()
    save_file({"base_model.model.w.lora_A.weight": torch.ones(2, 3)}, own / "adapter_model.safetensors")
    (own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    line = refusal(capsys, "convert", own, tmp_path / "out", "--to", "merged")
    assert (
        line
        == f"--to merged: {own} is an adapter of {base}, which is no folder here: 'streamconv convert BASE DST --adapter {own}' merges it"
    )


def test_a_recipe_that_may_fit_codes_and_numbers_is_one(tmp_path):
    layer = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors = {layer: torch.ones(4, 4).to(torch.float8_e4m3fn), f"{layer}_scale_inv": torch.ones(1, 1)}
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}
    source = recognize(write(tmp_path, tensors, config=config))
    assert len({fit.name for fit in source.fits}) == len(source.fits)
