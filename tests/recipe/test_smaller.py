"""Models of fewer layers and experts, by a recipe file: names renumbered, rows picked, config.json as it is then."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, numbered, read, refusal, run, write
from documentation import listing

import streamconv
from streamconv.errors import CoverageError
from streamconv.recipe import Recipe, Rule

TYPES = ["full", "sliding"] * 3


def model(layers: int = 6, experts: int = 4) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (5, 3)}
    for i in range(layers):
        shapes |= {f"layers.{i}.experts.{e}.up.weight": (2, 3) for e in range(experts)}
        shapes |= {f"layers.{i}.router.weight": (experts, 3), f"layers.{i}.norm.weight": (3,)}
    return numbered(shapes)


@pytest.mark.parametrize("types", [{}, {"layer_types": TYPES}], ids=["", "types"])
def test_layers_and_experts(types: dict[str, list[str]], tmp_path: Path) -> None:
    tensors = model()
    src = write(tmp_path / "src", tensors, config={"num_hidden_layers": 6, "num_experts": 4, **types})
    recipe = tmp_path / "smaller.yaml"
    recipe.write_text(listing("smaller.yaml"))
    assert run("convert", src, tmp_path / "out", "--recipe", recipe, "--verify", "--quiet", "--max-memory", ROOMY) == 0
    wanted = {"embed.weight": tensors["embed.weight"]}
    for new, old in enumerate((0, 1, 4, 5)):
        wanted |= {f"layers.{new}.experts.{e}.up.weight": tensors[f"layers.{old}.experts.{k}.up.weight"] for e, k in enumerate((0, 3))}
        wanted[f"layers.{new}.router.weight"] = tensors[f"layers.{old}.router.weight"][[0, 3]]
        wanted[f"layers.{new}.norm.weight"] = tensors[f"layers.{old}.norm.weight"]
    assert_same(read(tmp_path / "out"), wanted)
    config = {"num_hidden_layers": 4, "num_experts": 2, **({"layer_types": [TYPES[k] for k in (0, 1, 4, 5)]} if types else {})}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_rows_are_picked_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = numbered({"experts.up": (6, 2, 3), "bias": (6,)})
    src = write(tmp_path / "src", tensors, config={"text_config": {"num_experts": 6, "x": 1}})
    op = {"op": "pick", "numbers": "[5, 0, 1]"}
    keys = {"text_config.num_experts": "text_config.num_experts - 3"}
    recipe = Recipe("toy-a2b", "s", tuple(Rule(name, name, op=op) for name in tensors), config=keys)
    streamconv.convert(src, tmp_path / "out", recipe=recipe, max_memory=ROOMY, progress=False)
    assert_same(read(tmp_path / "out"), {name: tensor[[5, 0, 1]] for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"text_config": {"num_experts": 3, "x": 1}}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    for numbers, told in (
        ("[6]", "has no rows [6]"),
        ("[]", "expected a list of whole numbers"),
        ("2", "expected a list of whole numbers"),
    ):
        wrong = {"op": "pick", "numbers": numbers}
        with pytest.raises((CoverageError, streamconv.StreamconvError), match=re.escape(told)):
            Recipe("toy-a2b", "s", (Rule("bias", "bias", op=wrong),)).apply({"bias": streamconv.open(src).contents.entries["bias"]})
    (tmp_path / "wrong.yaml").write_text("name: a\nsummary: s\nrules: [{rule: '{x*}', right: '{x*}'}]\nconfig: {n: '1 +'}\n")
    assert "not an expression" in refusal(capsys, "convert", src, tmp_path / "no", "--recipe", tmp_path / "wrong.yaml")
