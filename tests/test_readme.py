"""What the documentation shows of writing a recipe, run as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from checkpoint_files import assert_same, read, run
from documentation import listing
from toy_model import fused


def test_the_recipe_file(toy, capsys):
    Path("toy.yaml").write_text(listing("toy.yaml"))
    for line in listing("toy commands").splitlines():
        program, *arguments = line.split()
        assert program == "streamconv"
        assert run(*arguments) == 0, line
    assert "qkv_proj" in capsys.readouterr().out
    assert_same(read(Path("toy-fused")), fused(toy))


def test_the_recipe_in_python(toy):
    done = subprocess.run(
        [sys.executable, "-c", listing("toy.py")], capture_output=True, text=True, env=os.environ, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(read(Path("fused")), fused(toy))
    assert_same(read(Path("toy-again")), {name: tensor for name, tensor in toy.items() if "inv_freq" not in name})
