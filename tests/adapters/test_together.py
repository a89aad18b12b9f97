"""Adapters with what else a conversion does: quantized bases, casts of some tensors, other names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import adapter, added, low_rank
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal, write

import streamconv

NAME = "model.layers.0.mlp.up_proj"
BASE = {
    f"{NAME}.weight": random_tensor(128, 256, dtype=torch.bfloat16),
    "model.embed_tokens.weight": random_tensor(20, 256, dtype=torch.bfloat16, seed=1),
    "lm_head.weight": random_tensor(20, 256, dtype=torch.bfloat16, seed=2),
}
CONFIG = {"model_type": "toy", "dtype": "bfloat16"}
LOW = low_rank(NAME, 128, 256)


def converted(src: Path, dst: Path, **options: object) -> dict[str, torch.Tensor]:
    streamconv.convert(src, dst, max_memory=ROOMY, progress=False, **options)
    return read(dst)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return adapter(tmp_path / "lora", LOW)


def test_a_quantized_base(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers are those of steps that are taken one after the other."""
    src = write(tmp_path / "src", BASE, config=CONFIG)
    converted(src, tmp_path / "quantized", quantize="fp8")
    refused = refusal(capsys, "convert", tmp_path / "quantized", tmp_path / "no", "--adapter", lora)
    assert f"{NAME}.weight" in refused
    assert "--dequantize" in refused
    numbers = converted(tmp_path / "quantized", tmp_path / "numbers", dequantize=True)
    merged = converted(tmp_path / "quantized", tmp_path / "merged", dequantize=True, adapter=[lora])
    assert_same(merged, {**numbers, f"{NAME}.weight": added(numbers[f"{NAME}.weight"], LOW, 3 / 2)})
    again = converted(tmp_path / "quantized", tmp_path / "again", dequantize=True, adapter=[lora], quantize="fp8")
    assert_same(again, converted(tmp_path / "merged", tmp_path / "steps", quantize="fp8"))


def test_casts_round_once_but_where_names_say_otherwise(lora: Path, tmp_path: Path) -> None:
    src = write(tmp_path / "src", BASE, config=CONFIG)
    wide = added(BASE[f"{NAME}.weight"].float(), LOW, 3 / 2)
    made = converted(src, tmp_path / "wide", adapter=[lora], dtype="float32")
    assert torch.equal(made[f"{NAME}.weight"], wide)
    made = converted(src, tmp_path / "kept", adapter=[lora], dtype="float32", keep_dtype=["*up_proj*"])
    assert torch.equal(made[f"{NAME}.weight"], added(BASE[f"{NAME}.weight"], LOW, 3 / 2))
    options = {"rename": ["model.{name*} -> {name*}"], "keep_dtype": ["lm_head*"]}
    made = converted(src, tmp_path / "renamed", adapter=[lora], dtype="float32", **options)
    assert torch.equal(made[f"{NAME}.weight".removeprefix("model.")], added(BASE[f"{NAME}.weight"], LOW, 3 / 2).float())


def test_names_are_those_of_the_source_whatever_becomes_of_them(lora: Path, tmp_path: Path) -> None:
    """Adapters come first, then names, then grafts."""
    src = write(tmp_path / "src", BASE, config=CONFIG)
    other = write(tmp_path / "other", {f"{NAME}.weight": random_tensor(3, 2, seed=9)})
    options = {"drop": ["lm_head.weight"], "rename": [f"{NAME}.weight -> old"], "graft": other, "take": [f"{NAME}.weight"]}
    made = converted(src, tmp_path / "out", adapter=[lora], **options)
    assert made.keys() == {"old", "model.embed_tokens.weight", f"{NAME}.weight"}
    assert torch.equal(made["old"], added(BASE[f"{NAME}.weight"], LOW, 3 / 2))
    plan = streamconv.plan(src, tmp_path / "no", adapter=[lora], max_memory=ROOMY, **options)
    rows = {row.target: (row.sources, row.layout) for row in plan.mapping}
    assert rows["old"] == ((f"{NAME}.weight",), "add an adapter")
    assert rows[f"{NAME}.weight"] == ((f"{NAME}.weight",), "brought by a graft")
