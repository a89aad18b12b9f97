"""Ops that this module alone defines: two inputs in a recipe, from the plan to verification; a value that all tiles share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import yaml
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal, run, write

import streamconv
from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError, FormatError, RecipeError
from streamconv.graph.moves import identity
from streamconv.graph.node import apply
from streamconv.graph.ops import Compute, Elementwise, Reduce, as_torch, from_json
from streamconv.planning.plan import Plan
from streamconv.recipe.steps import step


@dataclass(frozen=True)
class Blend(Elementwise):
    """So much of one tensor, and the rest of another."""

    kind: ClassVar[str] = "blend-of-a-test"

    share: float

    def infer(self, inputs):
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise CoverageError(f"{' and '.join(map(str, inputs))} are not alike")
        return inputs[0]

    def scratch(self, inputs):  # noqa: ARG002
        return 1 << 25  # what torch takes for the products of a tile

    def values(self, region, parts, out):  # noqa: ARG002
        one, other = (part.torch() for part in parts)
        out.torch().copy_(one * self.share + other * (1 - self.share))
        return 0


@step("blend-of-a-test")
def blend(nodes, _entries, *, share: float):
    return apply(Blend(share), *nodes)


@dataclass(frozen=True)
class Largest(Reduce):
    """The largest of all values."""

    kind: ClassVar[str] = "largest-of-a-test"
    passes: ClassVar[list[str]] = []

    def infer(self, inputs):
        return TensorSpec(inputs[0].dtype, (1,))

    def buffers(self, inputs):
        return [(1000, inputs[0].dtype.itemsize), (1, inputs[0].dtype.itemsize)]

    def reduce(self, inputs, fetch, buffers):
        self.passes.append("")
        part, largest = (as_torch(buffer, inputs[0].dtype) for buffer in buffers)
        largest.fill_(-torch.inf)
        for start in range(0, inputs[0].numel, 1000):
            count = min(1000, inputs[0].numel - start)
            fetch(0, start, buffers[0][:count])
            torch.maximum(largest, part[:count].max(), out=largest)


@dataclass(frozen=True)
class Less(Compute):
    """Every value less one that all share."""

    kind: ClassVar[str] = "less-of-a-test"

    def infer(self, inputs):
        return inputs[0]

    def needs(self, region, inputs):  # noqa: ARG002
        return [region, identity(1)]

    def reach(self, numel, inputs):  # noqa: ARG002
        return [numel, 1]

    def values(self, region, parts, out):  # noqa: ARG002
        torch.sub(parts[0].torch(), parts[1].torch(), out=out.torch())
        return 0


@step("less-of-a-test")
def less(nodes, _entries):
    return apply(Less(), nodes[0], apply(Largest(), nodes[0]))


def recipe(folder, op, left, right="made"):
    (folder / "r.yaml").write_text(yaml.safe_dump({"rules": [{"rule": left, "right": right, "op": op}]}))
    return folder / "r.yaml"


def test_two_inputs_are_planned_converted_resumed_and_verified(tmp_path, monkeypatch):
    values = {"a.w": random_tensor(700, 900), "b.w": random_tensor(700, 900, seed=1)}
    src, out = write(tmp_path / "x", values, shards=2), tmp_path / "out"
    file = recipe(tmp_path, {"op": "blend-of-a-test", "share": 0.25}, "{m:a,b}.w")
    wanted = {"made": values["a.w"] * 0.25 + values["b.w"] * 0.75}
    monkeypatch.setattr("streamconv.planning.fitting.TILE", 1 << 20)
    plan = streamconv.plan(src, out, recipe=str(file), max_memory=ROOMY)
    assert plan.mapping[0].sources == ("a.w", "b.w")
    again = Plan.from_json(plan.to_json())
    assert (again.digest(), again.nodes[0].op) == (plan.digest(), Blend(0.25))
    made, own = [], Blend.values

    def stop(self, region, parts, target):
        made.append(region)
        if len(made) == 2:
            raise OSError("the disk is gone")
        return own(self, region, parts, target)

    monkeypatch.setattr(Blend, "values", stop)
    with pytest.raises(streamconv.StreamconvError, match="the disk is gone"):
        streamconv.convert(src, out, recipe=str(file), max_memory=ROOMY, workers=1)
    monkeypatch.setattr(Blend, "values", own)
    assert run("convert", src, out, "--recipe", file, "--resume", "--verify", "--quiet") == 0
    assert_same(read(out), wanted)
    assert run("verify", src, out, "--recipe", file, "--quiet") == 0
    streamconv.run(Plan.from_json(streamconv.plan(src, tmp_path / "json", recipe=str(file), max_memory=ROOMY).to_json()))
    assert_same(read(tmp_path / "json"), wanted)


def test_a_value_that_all_tiles_share_is_made_once_ahead_of_them(tmp_path, monkeypatch):
    values = random_tensor(900, 1100)
    src = write(tmp_path / "x", {"w": values})
    monkeypatch.setattr("streamconv.planning.fitting.TILE", 1 << 18)
    plan = streamconv.plan(src, tmp_path / "out", recipe=str(recipe(tmp_path, {"op": "less-of-a-test"}, "w")), max_memory=ROOMY)
    assert plan.files[0].segments[0].tile != plan.files[0].segments[0].move.sizes
    Largest.passes.clear()
    streamconv.run(Plan.from_json(plan.to_json()), verify=True)
    assert len(Largest.passes) == 1
    assert_same(read(tmp_path / "out"), {"made": values - values.max()})


def test_kinds_and_steps_are_known_once():
    with pytest.raises(TypeError, match="two ops are of kind 'cast'"):
        type("Other", (Blend,), {"kind": "cast"})
    with pytest.raises(RecipeError, match="there is an op add already"):
        step("add")(blend)
    with pytest.raises(FormatError, match="there is no op 'of-nobody'"):
        from_json({"op": "of-nobody"})
    assert from_json(json.loads(json.dumps(Blend(0.5).to_json()))) == Blend(0.5)


@pytest.mark.parametrize(
    ("op", "told"),
    [
        ({"op": "blend-of-a-test", "share": "'much'"}, "share is \"'much'\": expected a number"),
        ({"op": "blend-of-a-test"}, "needs share"),
        ({"op": "pad", "rows": -3}, "rows is -3: expected a whole number"),
        ({"op": "pad", "rows": "2 - 3"}, "rows is '2 - 3': expected a whole number"),
        ({"op": "pad", "rows": 1.5}, "expected a whole number"),
        ({"op": "pad", "rows": "3 +"}, "not an expression"),
        ({"op": "same", "tensor": 3}, "tensor is 3: expected a text"),
        ({"op": "scale", "value": "0"}, "expected a number other than 0"),
    ],
)
def test_what_a_step_cannot_take_is_said_with_line_and_column(tmp_path, capsys, op, told):
    src = write(tmp_path / "x", {"w": torch.ones(3, 3)})
    line = refusal(capsys, "plan", src, tmp_path / "out", "--recipe", recipe(tmp_path, op, "w"))
    assert told in line
    key = next((key for key in op if key != "op"), None)
    number = next(k for k, text in enumerate((tmp_path / "r.yaml").read_text().splitlines(), 1) if f"{key or 'op'}:" in text)
    assert f"r.yaml:{number}:" in line


def test_values_that_only_the_model_gives_are_checked_where_they_are_known(tmp_path, capsys):
    src = write(tmp_path / "x", {"w": torch.ones(3, 3)}, config={"hidden_size": "many"})
    file = recipe(tmp_path, {"op": "pad", "rows": "hidden_size"}, "w")
    assert "pad: rows is 'many': expected a whole number" in refusal(capsys, "plan", src, tmp_path / "out", "--recipe", file)
