"""Arithmetic steps of recipes: numbers added and multiplied as torch does, the way back, and what a declaration may say."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from checkpoint_files import assert_same, random_tensor, read, refusal, run, write

import streamconv
from streamconv import recipes
from streamconv.errors import RecipeError
from streamconv.recipe import Recipe

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORM, W = "layers.0.norm.weight", "layers.0.mlp.weight"


def recipe_file(folder, op):
    """A recipe that changes norms by ``op`` and leaves the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"rule": "{rest*}", "right": "{rest*}", "fallback": True, "optional": True}
    rules = [{"rule": "layers.{i}.norm.weight", "right": "norm.{i}", "op": op}, rest]
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"rules": rules}))
    return file


def checkpoint(folder, dtype=torch.bfloat16):
    values = random_tensor(33, 70, dtype=torch.float32)
    values[0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, 1e-30])
    return write(folder, {NORM: values.to(dtype), W: random_tensor(4, 4, dtype=dtype)})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "made"),
    [
        ({"op": "add", "value": 1}, lambda t: t + 1),
        ({"add": 1}, lambda t: t + 1),
        ({"add": -0.3}, lambda t: t - 0.3),
        ({"op": "scale", "value": 0.5}, lambda t: t * 0.5),
        ({"scale": 3}, lambda t: t * 3),
        ({"scale": "-4"}, lambda t: t * -4),
    ],
)
def test_numbers_are_added_and_multiplied_as_torch_does(tmp_path, dtype, op, made):
    src = checkpoint(tmp_path / "x", dtype)
    file = recipe_file(tmp_path, op)
    assert run("convert", src, tmp_path / "out", "--recipe", file, "--verify", "--quiet") == 0
    given = read(src)
    assert_same(read(tmp_path / "out"), {"norm.0": made(given[NORM]), W: given[W]})
    assert run("convert", tmp_path / "out", tmp_path / "back", "--recipe", f"{file}:inverse", "--quiet") == 0
    back = read(tmp_path / "back")[NORM]
    if "scale" in json.dumps(op) and "3" not in json.dumps(op):  # powers of two lose nothing
        assert torch.equal(back, given[NORM])
    else:
        near = {torch.bfloat16: 0.02, torch.float16: 0.003}.get(dtype, 1e-6)
        finite = given[NORM].isfinite()
        assert torch.allclose(back[finite].double(), given[NORM][finite].double(), atol=near, rtol=near)


def test_the_way_back_says_whether_it_is_exact(tmp_path):
    def lost(op):
        return recipes.get(f"{recipe_file(tmp_path, op)}:inverse").lost

    assert lost({"scale": 0.5}) == lost({"op": "scale", "value": -4}) == []
    assert lost({"add": 1}) == ["norm.{i}: add of the other direction is undone up to rounding"]
    assert "scale" in lost({"scale": 3})[0]
    recipe = recipes.get(str(recipe_file(tmp_path, {"add": 1})))
    again = recipe.inverse("back").inverse(recipe.name)
    assert again.rules == recipe.rules
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).rules == recipe.rules


def test_values_that_become_infinite_are_counted(tmp_path):
    src = write(tmp_path / "x", {NORM: torch.tensor([60000.0, 1.0, float("inf")], dtype=torch.float16)})
    result = streamconv.convert(src, tmp_path / "out", recipe=str(recipe_file(tmp_path, {"scale": 2})), max_memory="4GB")
    assert result.overflow.counts == {"norm.0": 1}


@pytest.mark.parametrize(
    ("op", "told"),
    [
        ({"op": "add", "valeu": 1}, "did you mean value"),
        ({"op": "add"}, "needs value"),
        ({"op": "scale", "value": 0}, "other than 0"),
        ({"op": "scale", "value": float("nan")}, "expected a number"),
        ({"op": "rows", "stopp": 3}, "did you mean stop"),
        ({"op": "grow", "rows": 3}, "needs"),
        ({"op": "multiply", "value": 3}, "unknown"),
        ({"op": "add", "value": [1]}, "op must hold"),
    ],
)
def test_what_a_step_does_not_take_is_refused_when_it_is_declared(tmp_path, op, told):
    with pytest.raises(RecipeError, match=told):
        recipes.get(str(recipe_file(tmp_path, op)))


def test_whole_numbers_are_not_scaled(tmp_path, capsys):
    src = write(tmp_path / "x", {NORM: torch.arange(4)})
    assert "add is for tensors of" in refusal(capsys, "convert", src, tmp_path / "out", "--recipe", recipe_file(tmp_path, {"add": 1}))


# Sizes that --set gives -------------------------------------------------------------------------------------------------

ROTARY = {"rule": "q", "right": "wq", "layout": "(h two d) c -> (h d two) c"}


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        ({**ROTARY, "dims": {"two": 2}}, "h=4"),
        ({**ROTARY, "dims": {"two": 2}}, "d=3"),
        ({**ROTARY, "dims": {"two": 2, "h": "num_attention_heads"}}, "num_attention_heads=4"),
        ({**ROTARY, "dims": {"two": 2, "h": "num_attention_heads"}}, "h=4"),
        ({**ROTARY, "dims": {"two": 2, "h": "=heads // 2"}}, "heads=8"),
    ],
)
def test_the_size_that_an_error_asks_for_can_be_set(tmp_path, capsys, rule, given):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"rules": [rule]}))
    src = write(tmp_path / "x", {"q": random_tensor(24, 5)})
    own = ("convert", src, tmp_path / "out", "--recipe", tmp_path / "r.yaml")
    assert "--set" in refusal(capsys, *own)
    assert "has no such option" in refusal(capsys, *own, "--set", "hh=4")
    assert run(*own, "--set", given, "--quiet") == 0
    assert torch.equal(read(tmp_path / "out")["wq"], read(src)["q"].view(4, 2, 3, 5).transpose(1, 2).reshape(24, 5))
    assert run("convert", tmp_path / "out", tmp_path / "back", "--recipe", f"{tmp_path / 'r.yaml'}:inverse", "--set", given, "--quiet") == 0
    assert_same(read(tmp_path / "back"), read(src))


def test_a_number_that_a_step_takes_can_be_set(tmp_path, capsys):
    rules = [{"rule": "q", "right": "wq", "op": {"op": "rows", "stop": "kept"}}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"rules": rules}))
    src = write(tmp_path / "x", {"q": random_tensor(24, 5)})
    own = ("convert", src, tmp_path / "out", "--recipe", tmp_path / "r.yaml")
    assert "no value for stop, which is 'kept'" in refusal(capsys, *own)
    assert run(*own, "--set", "kept=7", "--quiet") == 0
    assert torch.equal(read(tmp_path / "out")["wq"], read(src)["q"][:7])
