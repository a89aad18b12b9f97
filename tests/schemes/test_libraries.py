"""Weights that libraries have quantized become the numbers that these libraries make of them, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, read
from quantized_models import CASES, Case, stored
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streamconv

GOLDEN = Path(__file__).parent.parent / "golden" / "quantized"


def check(folder: Path, case: Case) -> None:
    """Such a checkpoint, whose scales are in another file than its codes, becomes what it should."""
    src = folder / "src"
    src.mkdir(parents=True)
    scales = {name for name in case.tensors if "scale" in name or "absmax" in name}
    files = {"model-00001-of-00002.safetensors": case.tensors.keys() - scales, "model-00002-of-00002.safetensors": scales or {""}}
    for file, names in files.items():
        tensors = {name: case.tensors[name].contiguous() for name in names if name}
        save_file(tensors, src / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names if name}
    (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    dtype = next(iter(case.expected.values())).dtype
    (src / "config.json").write_text(json.dumps({"dtype": str(dtype).removeprefix("torch."), **case.config}))
    streamconv.convert(src, folder / "out", dequantize=True, verify=True, max_memory=ROOMY)
    config = json.loads((folder / "out" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "compression_config"}
    made = read(folder / "out")
    assert made.keys() == case.expected.keys()
    for name, tensor in case.expected.items():
        assert_bits(made[name], tensor)


def assert_bits(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
    same = (made == expected) & (made.signbit() == expected.signbit()) | (made.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} of {made.numel()} differ"


@pytest.mark.parametrize("path", stored(GOLDEN), ids=lambda path: path.stem)
def test_what_a_library_once_made_of_it(path: Path, tmp_path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    expected = {name.removeprefix("expected."): value for name, value in tensors.items() if name.startswith("expected.")}
    quantized = {name: value for name, value in tensors.items() if not name.startswith("expected.")}
    check(tmp_path, Case(quantized, config, expected))


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_what_a_library_makes_of_it(name: str, tmp_path: Path) -> None:
    try:
        case = CASES[name]()
    except ImportError as error:
        pytest.skip(str(error))
    check(tmp_path, case)
