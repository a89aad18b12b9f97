"""Planning a merge of many experts takes steps in proportion to their number, though the norms and thresholds are of all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checkpoint_files import ROOMY, write
from merged_models import merge_file

import streamconv

METHODS = {
    "slerp": {"models": [{"model": "{m0}"}, {"model": "{m1}"}], "parameters": {"t": [0.2, 0.4]}},
    "ties": {"models": [{"model": "{m1}", "parameters": {"weight": [0.5, 0.6], "density": 0.5}}]},
    "dare_ties": {"models": [{"model": "{m1}", "parameters": {"weight": 0.5, "density": 0.5}}]},
}


def models(folder: Path, experts: int) -> None:
    """Two models of one layer of so many experts."""
    folder.mkdir()
    parts = [f"model.layers.0.mlp.experts.{k}.{part}_proj.weight" for k in range(experts) for part in ("gate", "up", "down")]
    for model in ("m0", "m1"):
        write(folder / model, {name: torch.zeros(2, 2) for name in parts})


def steps(file: Path) -> int:
    """How many functions are called, and generators gone on with, while a merge is planned."""
    count = 0

    def tell(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(tell)
    try:
        streamconv.plan(file, file.parent / "out", max_memory=ROOMY)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("method", METHODS)
def test_steps_grow_with_the_experts(method: str, tmp_path: Path) -> None:
    text: dict[str, Any] = {"merge_method": method, "base_model": "{m0}", **METHODS[method]}
    counts = []
    for experts in (1, 20, 40):  # the first loads what planning needs
        models(tmp_path / str(experts), experts)
        counts.append(steps(merge_file(tmp_path / str(experts), text)))
    assert counts[2] < 2.2 * counts[1]
