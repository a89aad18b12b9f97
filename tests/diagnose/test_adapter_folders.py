"""What the doctor says of an adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import numbered
from safetensors.torch import save_file

from streamconv.diagnose.doctor import examine

AT = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
SHAPES = {AT.format(i, side): (4, 8) if side == "A" else (8, 4) for i in range(2) for side in "AB"}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}


def lora(folder: Path, shapes: dict[str, tuple[int, ...]], config: object) -> Path:
    folder.mkdir()
    save_file(numbered(shapes), folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_healthy_adapter_is_told_for_what_it_is(tmp_path):
    examination = examine(lora(tmp_path / "lora", SHAPES, CONFIG))
    assert examination.healthy
    (note,) = map(str, examination.findings)
    assert "an adapter of kind LORA, rank 4, of org/base" in note
    assert f"merge it: convert BASE DST --adapter {tmp_path / 'lora'}" in note


@pytest.mark.parametrize(
    ("shapes", "config", "told"),
    [
        (dict(list(SHAPES.items())[1:]), CONFIG, f"{AT.format(0, 'A')} is not there"),
        (SHAPES, CONFIG | {"r": 2}, "its shape is [4, 8], and r is 2 (and so of 3 more)"),
        (SHAPES, {"r": 4}, "it has no peft_type"),
        (SHAPES, [1], "expected a JSON object"),
        (SHAPES, None, "adapter_config.json: it is missing"),
    ],
    ids=["half", "rank", "kind", "list", "none"],
)
def test_what_cannot_be_merged_is_a_problem(shapes, config, told, tmp_path):
    examination = examine(lora(tmp_path / "lora", shapes, config))
    assert not examination.healthy
    assert told in "\n".join(str(finding) for finding in examination.findings if finding.problem)


def test_ranks_by_pattern_are_no_contradiction(tmp_path):
    assert examine(lora(tmp_path / "lora", SHAPES, CONFIG | {"r": 2, "rank_pattern": {"q_proj": 4}})).healthy
