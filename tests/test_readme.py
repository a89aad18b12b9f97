"""What README.md shows of writing a recipe, run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from checkpoint_files import assert_same, read, run
from toy_model import fused

README = Path(__file__).parent.parent / "README.md"


def block(mark: str) -> str:
    found = re.search(rf"^<!-- {re.escape(mark)} -->\n```\w*\n(.*?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, mark
    return found[1]


def test_the_recipe_file(toy, capsys):
    Path("toy.yaml").write_text(block("toy.yaml"))
    for line in block("toy commands").splitlines():
        program, *arguments = line.split()
        assert program == "streamconv"
        assert run(*arguments) == 0, line
    assert "qkv_proj" in capsys.readouterr().out
    assert_same(read(Path("toy-fused")), fused(toy))


def test_the_recipe_in_python(toy):
    done = subprocess.run([sys.executable, "-c", block("toy.py")], capture_output=True, text=True, env=os.environ, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(read(Path("fused")), fused(toy))
    assert_same(read(Path("toy-again")), {name: tensor for name, tensor in toy.items() if "inv_freq" not in name})
