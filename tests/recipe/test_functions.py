"""Functions of arrays as a recipe's own steps, in Python files and in Python."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_files import failure, read, run, write

import streamconv
from streamconv.errors import RecipeError
from streamconv.graph.casts import PIECE

FILE = """
import numpy as np
import streamconv
from streamconv import Recipe, Rule

@streamconv.step("soft_cap", tiled=True, scratch=2.0)
def soft_cap(weight, *, cap: float):
    wide = weight.astype("float32")
    return (np.tanh(wide / np.float32(cap)) * np.float32(cap)).astype(weight.dtype)

@streamconv.step("outer", dtype="float32", shape=lambda a, b, times: (a[0], b[0] * times), scratch=1.0)
def outer(a, b, *, times: int):
    return np.tile(np.outer(a, b), times).astype("float32")

@streamconv.step("sorted_rows", framework="torch")
def sorted_rows(weight):
    return weight.sort(0).values

RECIPE = Recipe("mine", "of its own", (
    Rule("w", "w", op={"op": "soft_cap", "cap": 0.5}),
    Rule("{a,b}", "ab", op={"op": "outer", "times": 2}),
    Rule("s", "s", op={"op": "sorted_rows"}),
))
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    tensors = {"w": torch.randn(PIECE // 64 + 3, 65).bfloat16(), "a": torch.randn(3), "b": torch.randn(4), "s": torch.randn(50, 3).half()}
    write(tmp_path / "src", tensors)
    return tensors


def test_a_recipes_own_functions(source, tmp_path):
    assert run("convert", tmp_path / "src", tmp_path / "out", "--recipe", tmp_path / "mine.py", "--verify", "--quiet") == 0
    made = read(tmp_path / "out")
    wide = source["w"].float().numpy()
    assert torch.equal(made["w"], torch.from_numpy(np.tanh(wide / np.float32(0.5)) * np.float32(0.5)).bfloat16())
    assert torch.equal(made["ab"], torch.outer(source["a"], source["b"]).tile(1, 2))
    assert torch.equal(made["s"], source["s"].sort(0).values)
    assert run("verify", tmp_path / "src", tmp_path / "out", "--recipe", tmp_path / "mine.py", "--quiet") == 0


def test_a_plan_names_a_function_and_brings_none(source, tmp_path, capsys):
    assert run("plan", tmp_path / "src", tmp_path / "out", "--recipe", tmp_path / "mine.py", "--out", tmp_path / "plan.json", "-q") == 0
    code = "from streamconv.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert "the function" in done.stderr
    assert "is not there: convert with --recipe FILE.py" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.py").write_text(FILE.replace("weight.sort(0)", "weight.sort(0, True)"))
    streamconv.recipes.get(str(tmp_path / "mine.py"))
    assert "is not the one that was planned with" in failure(capsys, 2, "run", tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ('return weight.sort(0).values', 'return weight.float()', 3, "sorted_rows has made float32[50, 3], declared is float16[50, 3]"),
        ('return weight.sort(0).values', 'return 1 / 0', 3, "the function sorted_rows: ZeroDivisionError: division by zero"),
        ('(a[0], b[0] * times)', '(a[1], 2)', 2, "the function outer: its shape for float32[3], float32[4]: IndexError"),
        ('"times": 2', '"time": 2', 2, "op outer has no 'time'"),
        ('"times": 2', '"times": "many"', 2, "times"),
        ("times: int", "times", 2, "times must be declared as int, float, bool or str"),
        ('"outer"', '"rows"', 2, "there is an op rows already"),
    ],
)  # fmt: skip
def test_what_a_function_gets_wrong(old, new, code, words, source, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FILE.replace(old, new))
    assert words in failure(capsys, code, "convert", tmp_path / "src", tmp_path / "out", "--recipe", tmp_path / "mine.py")


def test_what_a_function_takes_is_counted(tmp_path):
    write(tmp_path / "src", {"w": torch.zeros(1024, 1024)})

    def peak(scratch: float) -> int:
        streamconv.step("whole", scratch=scratch)(lambda weight: -weight)
        recipe = streamconv.Recipe("one", "one", (streamconv.Rule("w", "w", op={"op": "whole"}),))
        return streamconv.plan(tmp_path / "src", tmp_path / "out", recipe=recipe).peak_memory

    assert peak(scratch=10.0) - peak(scratch=0.0) > 30 << 20


def test_what_does_not_go_together():
    with pytest.raises(RecipeError, match="leave out shape"):
        streamconv.step("a", tiled=True, shape=lambda shape: shape)
    with pytest.raises(RecipeError, match="expected framework numpy or torch"):
        streamconv.step("a", framework="jax")
