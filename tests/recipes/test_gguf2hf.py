"""GGUF to Hugging Face: names, rows of heads, config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, refusal
from gguf_files import HEAD, HEADS, KV_HEADS, VOCAB, model, to_gguf

import streamconv


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_it_becomes_what_it_was_made_of(tmp_path: Path, architecture: str, tied: bool) -> None:
    tensors = model(architecture, tied=tied)
    src = to_gguf(tmp_path / "x.gguf", architecture, tensors)
    streamconv.convert(src, tmp_path / "out", recipe="gguf-gguf2hf", verify=True, max_memory=ROOMY)
    assert_same(read(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == architecture
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV_HEADS, HEAD)
    assert (config["vocab_size"], config["tie_word_embeddings"], config["eos_token_id"]) == (VOCAB, tied, 2)
    assert config["rms_norm_eps"] == pytest.approx(1e-6)
    assert config["rope_theta"] == 50000.0


def test_what_config_json_could_not_say_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = model("llama")
    src = to_gguf(tmp_path / "x.gguf", "llama", tensors, **{"llama.rope.scaling.factor": 4.0})
    assert "--sidecars-from" in refusal(capsys, "convert", src, tmp_path / "out", "--recipe", "gguf-gguf2hf")
    other = to_gguf(tmp_path / "y.gguf", "gemma", tensors)
    assert "gemma" in refusal(capsys, "convert", other, tmp_path / "out", "--recipe", "gguf-gguf2hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_model_is_the_one_that_transformers_reads(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = model(architecture)
    src = to_gguf(tmp_path / "x.gguf", architecture, tensors)
    streamconv.convert(src, tmp_path / "out", recipe="gguf-gguf2hf", max_memory=ROOMY)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same({name: value for name, value in made.state_dict().items() if name in tensors}, tensors)
    assert made.config.rope_parameters["rope_theta"] == 50000.0
