"""What README.md shows of writing a recipe, run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, random_tensor, read, run, write

README = Path(__file__).parent.parent / "README.md"


def block(mark: str) -> str:
    found = re.search(rf"^<!-- {re.escape(mark)} -->\n```\w*\n(.*?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, mark
    return found[1]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, 16)}
    for i in range(2):
        stem = f"blocks.{i}"
        shapes |= {f"{stem}.attn.q.weight": (16, 16), f"{stem}.attn.k.weight": (8, 16), f"{stem}.attn.v.weight": (8, 16)}
        shapes |= {f"{stem}.attn.inv_freq": (2,), f"{stem}.norm1.weight": (16,), f"{stem}.norm2.weight": (16,)}
        shapes |= {f"{stem}.experts.{e}.up.weight": (24, 16) for e in range(4)}
    tensors = {name: random_tensor(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    write(tmp_path / "toy", tensors, config=config)
    monkeypatch.chdir(tmp_path)
    return tensors


def fused(tensors):
    wanted = {"model.embed_tokens.weight": tensors["embed.weight"], "lm_head.weight": tensors["embed.weight"]}
    for i in range(2):
        own, layer = f"blocks.{i}", f"model.layers.{i}"
        wanted[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat([tensors[f"{own}.attn.{n}.weight"] for n in "qkv"])
        wanted[f"{layer}.mlp.experts.up_proj"] = torch.stack([tensors[f"{own}.experts.{e}.up.weight"].t() for e in range(4)])
        wanted[f"{layer}.input_layernorm.weight"] = tensors[f"{own}.norm1.weight"]
        wanted[f"{layer}.post_attention_layernorm.weight"] = tensors[f"{own}.norm2.weight"]
    return wanted


def test_the_recipe_file(toy, capsys):
    Path("toy.yaml").write_text(block("toy.yaml"))
    for line in block("toy commands").splitlines():
        program, *arguments = line.split()
        assert program == "streamconv"
        assert run(*arguments) == 0, line
    assert "qkv_proj" in capsys.readouterr().out
    assert_same(read(Path("toy-fused")), fused(toy))


def test_the_recipe_in_python(toy):
    done = subprocess.run([sys.executable, "-c", block("toy.py")], capture_output=True, text=True, env=os.environ, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(read(Path("fused")), fused(toy))
    assert_same(read(Path("toy-again")), {name: tensor for name, tensor in toy.items() if "inv_freq" not in name})
