"""Where torch cannot be imported everything works but what needs it, and that says so in one line, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, random_tensor, read, write

CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
TORCH = "needs torch: pip install 'streamconv[torch]'"


@pytest.fixture
def command(process):
    """A command without torch: its exit code is asserted, its document returned."""

    def call(code: int, *arguments: object):
        done = process(*arguments, without="torch")
        assert done.code == code, done.error
        return done.document

    return call


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "source", {"a.weight": random_tensor(30, 40), "b": random_tensor(7, dtype=torch.float16)})


def test_values_are_cast_compared_and_measured(command, source, tmp_path):
    command(0, "convert", source, tmp_path / "half", "--dtype", "bfloat16", "--verify", "--compare", source)
    assert_same(read(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in read(source).items()})
    assert command(1, "verify", source, tmp_path / "half")["l2"] > 0
    statistics = command(0, "inspect", tmp_path / "half", "--stats")["tensors"][0]
    values = read(tmp_path / "half")["a.weight"].double()
    assert (statistics["min"], statistics["max"]) == (float(values.min()), float(values.max()))
    assert statistics["mean"] == pytest.approx(float(values.mean()), rel=1e-12)
    assert statistics["norm"] == pytest.approx(float(values.norm()), rel=1e-12)
    assert "healthy" in command(0, "doctor", tmp_path / "half", "--data")
    assert command(0, "demo", tmp_path / "demo")["equal"]


def test_quantized_weights_become_numbers(command, tmp_path):
    codes, scales = random_tensor(200, 300).to(torch.float8_e4m3fn), random_tensor(2, 3).float()
    source = write(tmp_path / "source", {"w.weight": codes, "w.weight_scale_inv": scales}, config=CONFIG)
    command(0, "convert", source, tmp_path / "out", "--dequantize", "--verify")
    spread = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert_same(read(tmp_path / "out"), {"w.weight": (codes.float() * spread).bfloat16()})


def test_what_needs_torch_says_so_ahead(process, source, tmp_path):
    for options in (["--format", "torch"], ["--format", "torch", "--dtype", "float16"]):
        done = process("convert", source, tmp_path / "out", *options, without="torch")
        assert (done.code, done.document) == (2, {})
        assert done.error.startswith("streamconv: error: ")
        assert done.error.endswith(f"{TORCH}\n")
        assert done.error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "options"),
    [("transformers", ("--recipe", "transformers-hub2native")), ("torch", ("--recipe", "tp-split", "--set", "model_parallel=2"))],
)
def test_recipes_that_take_a_library_say_how_to_get_it(process, tmp_path, extra, options):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    source = write(tmp_path / "source", {"a.weight": random_tensor(4, 6)}, config=config)
    done = process("convert", source, tmp_path / "out", *options, without="torch")
    assert (done.code, done.error.count("\n")) == (2, 1), done.error
    assert f"pip install 'streamconv[{extra}]'" in done.error
    assert not (tmp_path / "out").exists()
