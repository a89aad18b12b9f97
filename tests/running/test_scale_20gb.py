"""A checkpoint that never is on a disk goes to a place that keeps no data, in little memory, and what arrives there is right.

Its bytes are computed by a server from their offsets; the sink only hashes. What the digests must be is computed here, from the same
description, without the package under test: headers by ``tools.make_checkpoint``, casts by shifting.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tools import make_checkpoint as made
from tools import range_server

pytest.importorskip("fsspec")
pytest.importorskip("requests")

LIMIT = 300_000_000
SIZES = [
    pytest.param("minilm", None, id="small"),
    pytest.param("llama-3-8b", 20_000_000_000, id="20GB", marks=pytest.mark.slow),
]


@contextmanager
def serve(model: str, size: int | None) -> Iterator[str]:
    """The address of a server of the checkpoint, in a process of its own."""
    command = [sys.executable, "-m", "tools.range_server", model, *(["--size", str(size)] if size else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def widened(checkpoint: range_server.Checkpoint, tensor: str) -> Iterator[bytes]:
    """A tensor of bfloat16 as float32."""
    for piece in checkpoint.read(tensor):
        yield (np.frombuffer(piece, "<u2").astype("<u4") << np.uint32(16)).tobytes()


def narrowed(checkpoint: range_server.Checkpoint, tensor: str) -> Iterator[bytes]:
    """A tensor of finite float32 as bfloat16: to the nearest, halves to the even one."""
    for piece in checkpoint.read(tensor):
        bits = np.frombuffer(piece, "<u4").astype(np.uint64)
        yield ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()


CASTS = {"bfloat16": ("float32", widened), "float32": ("bfloat16", narrowed)}


def expected(checkpoint: range_server.Checkpoint, shapes: made.Shapes, shard_size: int, *, cast: bool) -> dict[str, dict[str, object]]:
    """Size and digest of each weight file of the output, for which tensors are taken in the order of the source's files."""
    shapes = {name: shapes[name] for name in checkpoint.places}
    targets = {name: (CASTS[dtype][0] if cast and dtype in CASTS else dtype, shape) for name, (dtype, shape) in shapes.items()}
    shards = made.split(targets, shard_size)
    files = {}
    for number, shard in enumerate(shards, 1):
        head, tensors = made.layout(shard)
        digest = hashlib.sha256(head)
        for tensor in tensors:
            given = shapes[tensor.name][0]
            for piece in CASTS[given][1](checkpoint, tensor.name) if cast and given in CASTS else checkpoint.read(tensor.name):
                digest.update(piece)
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        files[name] = {"size": tensors[-1].offset + tensors[-1].nbytes, "sha256": digest.hexdigest()}
    return files


@pytest.mark.parametrize("cast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["reshard", "cast"])
@pytest.mark.parametrize(("model", "size"), SIZES)
def test_from_nowhere_to_nowhere(model, size, cast, tmp_path):
    known = made.MODELS[model]
    config = made.with_size(known, known.config, size) if size else known.config
    shapes = known.shapes(config)
    checkpoint = range_server.of_model(model, size=size)
    total = sum(file.size for file in checkpoint.files.values())
    shard_size = max(total // 10, 2_200_000_000 if size else 50_000_000)  # no tensor is larger
    out = tmp_path / "made.json"
    given = CASTS[known.config["torch_dtype"]][0]
    with serve(model, size) as url:
        command = [sys.executable, "-m", "tools.hashing", "--out", str(out), "convert", url, "sha256://target", "--no-progress"]
        options = ["--max-memory", str(LIMIT), "--max-shard-size", str(shard_size), *(["--dtype", given] if cast else [])]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=3000, check=False, cwd=Path(__file__).parent.parent.parent
        )
        assert done.returncode == 0, done.stderr
        with urllib.request.urlopen(f"{url}/.requests") as answer:
            requests = json.load(answer)
    found = json.loads(out.read_text())
    weights = {name.removeprefix("target/"): file for name, file in found["files"].items() if name.endswith(".safetensors")}
    assert weights == expected(checkpoint, shapes, shard_size, cast=cast)
    assert found["peak_memory"] <= LIMIT
    # Each byte came once: what was read again is headers, and what a request brought beyond what was needed.
    assert sum(request["sent"] for request in requests) <= 1.02 * total + 2_000_000
    assert not any(file.is_file() and file.stat().st_size > 1_000_000 for file in tmp_path.rglob("*"))
