"""Small checkpoints on disk for tests, written and read with the safetensors library."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.cli import main
from streamconv.formats import AnyNode, Node

# The tests share one process, which holds torch and more; how well a run keeps its memory is tested elsewhere.
ROOMY = "4GB"


def write(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    """Writes ``tensors``, in their order, to as many files, and an index where there is more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    size = max(1, -(-len(names) // shards))
    weight_map = {name: f"model-{1 + k // size:05d}-of-{shards:05d}.safetensors" for k, name in enumerate(names)}
    if shards == 1:
        weight_map = dict.fromkeys(names, "model.safetensors")
    for file in sorted(set(weight_map.values())):
        mine = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in names if weight_map[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return _with_config(folder, config)


def write_ckpt(folder: Path, tensors: Mapping[str, torch.Tensor], *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes ``tensors`` to ``model.ckpt``."""
    write(folder / "in-safetensors", tensors)
    assert run("convert", folder / "in-safetensors", folder / "model.ckpt", "--quiet") == 0
    shutil.rmtree(folder / "in-safetensors")
    return _with_config(folder, config)


def write_bin(folder: Path, tree: object, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes ``tree`` to ``pytorch_model.bin``."""
    folder.mkdir(parents=True)
    torch.save(tree, folder / "pytorch_model.bin")
    return _with_config(folder, config)


def _with_config(folder: Path, config: Mapping[str, Any] | None) -> Path:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_any(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in any container."""
    return {name: entry.torch() for name, entry in streamconv.open(path).items()}


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, or of a directory's ``.safetensors`` files."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        loaded = load_file(file)
        assert not set(loaded) & set(found), "a tensor in two files"
        found |= loaded
    return found


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's row-major bytes."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def stored(node: AnyNode) -> bytes:
    """The row-major bytes of a stored tensor, from its extents, or of a view of one, as numpy has it."""
    if isinstance(node, Node):
        itemsize = node.spec.dtype.itemsize
        flat = np.frombuffer(stored(node.inputs[0]), f"u{itemsize}")[node.op.start :]
        return np.lib.stride_tricks.as_strided(flat, node.op.shape, [stride * itemsize for stride in node.op.strides]).tobytes()
    found = b""
    for extent in node.extents:
        with Path(extent.path).open("rb") as file:
            file.seek(extent.offset)
            found += file.read(extent.nbytes)
    return found


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values of any magnitude, the same for the same arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape))).to(dtype)


def numbered(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, all different."""
    return {name: random_tensor(*shape, dtype=dtype, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def first_and_last(names: Iterable[str]) -> list[str]:
    """The first and the last of the names that differ in their numbers only."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    return [*dict.fromkeys(name for kind in kinds.values() for name in (kind[0], kind[-1]))]


def run(*arguments: object) -> int:
    """The exit code of a command line, with memory enough."""
    given = [str(argument) for argument in arguments]
    return main([*given, *(["--max-memory", ROOMY] if given[0] in {"convert", "plan", "verify"} else [])])


def failure(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The one line with which a command line fails, all of it."""
    capsys.readouterr()
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("streamconv: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refusal says."""
    return failure(capsys, 2, *arguments).removeprefix("streamconv: error: ").rstrip("\n")


def write_both(folder: Path, tensors: Mapping[str, torch.Tensor], recipes: Mapping[str, object]) -> Path:
    """The same tensors as ``safetensors/``, in three shards, and ``bin/``; and recipe files."""
    config = {"model_type": "any"}
    write(folder / "safetensors", tensors, shards=3, config=config)
    write_bin(folder / "bin", tensors, config=config)
    for name, rules in recipes.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"rules": rules}))
    return folder
