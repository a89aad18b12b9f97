"""Quantized weights with all else in one pass: what comes of it is what two passes make, in bounded memory, each byte read once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import ROOMY, run
from fsspec.implementations.memory import MemoryFileSystem
from processes import MB, Run

from streamconv.engine.worker import Worker
from tools.make_checkpoint import Model, make_checkpoint, quantized_llama_shapes

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 64,
}  # fmt: skip


def packed(layout: str, size: int, **more: object) -> dict[str, object]:
    weights = {"num_bits": 4, "strategy": "group", "group_size": size, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


KINDS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [48, 64]},
    "int4": packed("pack-quantized", 64, type="int"),
    "mxfp4": packed("mxfp4-pack-quantized", 32, type="float"),
}
WAYS = {
    "another dtype": ("--dtype", "float16"),
    "MindSpore": ("--recipe", "llama-hf2ms"),
    "MindSpore, fused": ("--recipe", "llama-hf2ms", "--dtype", "float32"),
    "fused": ("--recipe", "benchmarks/recipes/llama-fuse.yaml"),
    "Meta's layout": ("--recipe", "llama-hf2meta"),
    "two ranks": ("--recipe", "llama-hf2meta", "--set", "model_parallel=2"),
    "small shards": ("--max-shard-size", "60kB"),
    "torch": ("--format", "torch"),
    "in little memory": ("--workers", "1", "--max-shard-size", "200kB"),
}


def checkpoint(folder: Path, kind: str, **sizes: int) -> Path:
    config = {**LLAMA, **sizes, "quantization_config": KINDS[kind]}
    make_checkpoint(Model(config, quantized_llama_shapes), folder, max_shard_size=50_000 if not sizes else None)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_with_another_step_it_is_what_two_passes_make(tmp_path: Path, kind: str, way: str) -> None:
    src = checkpoint(tmp_path / "src", kind)
    assert run("convert", src, tmp_path / "made", "--dequantize", *WAYS[way], "--verify", "--quiet", "--max-memory", ROOMY) == 0
    assert run("verify", src, tmp_path / "made", "--dequantize", *[text for text in WAYS[way] if text not in SIZES], "--quiet") == 0
    if way != "another dtype" and "--dtype" not in WAYS[way]:
        assert run("convert", src, tmp_path / "once", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
        assert run("convert", tmp_path / "once", tmp_path / "wanted", *WAYS[way], "--quiet", "--max-memory", ROOMY) == 0
        ranks = sorted(path.name for path in (tmp_path / "wanted").glob("*.pth")) or [""]
        for name in ranks:
            assert run("verify", tmp_path / "made" / name, tmp_path / "wanted" / name, "--quiet") == 0
        for path in (tmp_path / "wanted").glob("*.json"):
            assert "index" in path.name or (tmp_path / "made" / path.name).read_bytes() == path.read_bytes()


SIZES = {"--max-shard-size", "60kB", "200kB", "--format", "torch", "--workers", "1"}


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_store_and_to_one_it_is_what_it_is_here(tmp_path: Path, kind: str) -> None:
    src = checkpoint(tmp_path / "src", kind)
    store = MemoryFileSystem()
    for name, data in files(src).items():
        store.pipe_file(f"/quantized/{name}", data)
    assert run("convert", src, tmp_path / "here", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
    assert run("convert", "memory://quantized", tmp_path / "from", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
    assert files(tmp_path / "from") == files(tmp_path / "here")
    store.store.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_failed_goes_on(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    src = checkpoint(tmp_path / "src", kind)
    command = ("--dequantize", "--max-shard-size", "60kB", "--quiet", "--max-memory", ROOMY)
    assert run("convert", src, tmp_path / "wanted", *command) == 0
    compute, left = Worker.compute, threading.Semaphore(5)

    def fail(self: Worker, *args: object) -> int:
        if not left.acquire(blocking=False):
            raise OSError(28, "No space left on device")
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "compute", fail)
        assert run("convert", src, tmp_path / "made", *command) == 3
    assert run("convert", src, tmp_path / "made", *command, "--resume", "--verify") == 0
    assert files(tmp_path / "made") == files(tmp_path / "wanted")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_take_little_memory_and_are_read_once(tmp_path: Path, kind: str, convert: Callable[..., Run]) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 256, "num_attention_heads": 32}
    small, large = checkpoint(tmp_path / "small", kind), checkpoint(tmp_path / "large", kind, **sizes)
    nbytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert nbytes > 60 * MB
    idle, done = (convert(src, "--dequantize", max_memory=150 * MB) for src in (small, large))
    assert 0.99 * nbytes <= done.read - idle.read <= 1.1 * nbytes
