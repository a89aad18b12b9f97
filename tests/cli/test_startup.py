"""What the command loads before it does what is asked: all that it does not need takes time and memory."""

import json
import subprocess
import sys

from tests.fixtures.checkpoint_files import numbered, write

LOADED = """
import json, sys
from streamconv.cli.command import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(json.dumps([code or 0, sorted(sys.modules)]), file=sys.stderr)
"""
EXTERNAL = {"ml_dtypes", "msgspec", "numpy", "psutil", "torch", "tqdm", "transformers", "yaml"}


def modules_of(*arguments):
    done = subprocess.run([sys.executable, "-c", LOADED, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=600)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


def packages_of(modules):
    return {name.split(".")[1] for name in modules if name.startswith("streamconv.") and name.count(".") > 1}


def test_help_loads_the_front_only():
    modules = modules_of("--help")
    assert not EXTERNAL & modules
    assert packages_of(modules) <= {"cli", "conversion", "running"}
    assert len([name for name in modules if name.startswith("streamconv")]) <= 20


def test_inspect_loads_neither_recipes_nor_what_plans_and_runs(tmp_path):
    modules = modules_of("inspect", write(tmp_path / "src", numbered({"model.layers.0.mlp.weight": (2, 3)})))
    assert EXTERNAL & modules <= {"msgspec"}
    assert packages_of(modules) <= {
        "checkpoint", "cli", "conversion", "diagnose", "formats", "graph", "notation", "running", "storage", "trainers",
    }  # fmt: skip
    assert {name for name in modules if name.startswith("streamconv.running.")} == {"streamconv.running.executors"}
