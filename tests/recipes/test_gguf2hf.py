"""GGUF to Hugging Face: names, rows of heads, config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal
from gguf_files import write_gguf

import streamconv

HEADS, KV_HEADS, HEAD, WIDTH, HIDDEN, VOCAB = 4, 2, 8, 32, 48, 40
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def model(architecture: str, *, tied: bool = False) -> dict[str, torch.Tensor]:
    """A small one as Hugging Face has it."""
    tensors = {"model.embed_tokens.weight": random_tensor(VOCAB, WIDTH), "model.norm.weight": random_tensor(WIDTH)}
    if not tied:
        tensors["lm_head.weight"] = random_tensor(VOCAB, WIDTH, seed=1)
    for i in range(2):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD, WIDTH), "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD), "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }  # fmt: skip
        if architecture == "qwen3":
            shapes |= {"self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,)}
        for number, (name, shape) in enumerate(shapes.items()):
            tensors[f"model.layers.{i}.{name}.weight"] = random_tensor(*shape, seed=10 * i + number)
            if architecture == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"model.layers.{i}.{name}.bias"] = random_tensor(shape[0], seed=50 + 10 * i + number)
    return tensors


def to_gguf(path: Path, architecture: str, tensors: dict[str, torch.Tensor], **more: object) -> Path:
    """The same as llama.cpp's converter stores it."""
    own = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    stored = {}
    for name, tensor in tensors.items():
        target, values = own.get(name), tensor
        if target is None:
            _, _, i, *inner, end = name.split(".")
            target = f"blk.{i}.{NAMES['.'.join(inner)]}.{end}"
            if architecture == "llama" and inner[-1] in ("q_proj", "k_proj"):
                values = tensor.reshape(-1, 2, HEAD // 2, WIDTH).swapaxes(1, 2).reshape(tensor.shape)
        stored[target] = ("float32", tuple(tensor.shape), values.numpy().astype(np.float32).tobytes())
    pairs = {
        "general.architecture": architecture, f"{architecture}.block_count": 2, f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS, f"{architecture}.attention.key_length": HEAD,
        f"{architecture}.context_length": 512, f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{architecture}.rope.freq_base": 50000.0, "tokenizer.ggml.tokens": [str(k) for k in range(VOCAB)],
        "tokenizer.ggml.eos_token_id": 2, **more,
    }  # fmt: skip
    return write_gguf(path, stored, pairs)


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
