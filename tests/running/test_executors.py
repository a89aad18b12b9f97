"""Where files are made is one object: another executor is a module and its tests, here one that starts a process for each file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import ROOMY, random_tensor, refusal, run, write

from streamconv.conversion import api
from streamconv.errors import RunError, UsageError
from streamconv.graph.losses import Losses
from streamconv.planning.plan import Plan
from streamconv.running.executors import EXECUTORS, MakeFiles
from streamconv.running.filling import Progress
from streamconv.running.run import run as run_plan
from tools.crash import read_tree

MAKE = """
import json, sys
from streamconv.planning.plan import Plan
from streamconv.running.making import make_files
print(json.dumps(make_files(Plan.from_json(sys.stdin.read()), [0]).plain()))
"""


class Toy:
    """A process for each file."""

    threads = 1

    def __init__(self) -> None:
        self.made: list[str] = []

    def load(self, root: str) -> int:
        if "://" in root:
            raise UsageError(f"--engine toy: cannot write to {root}")
        return 0

    @contextmanager
    def open(self, plan: Plan, here: MakeFiles, address: str | None) -> Iterator[MakeFiles]:  # noqa: ARG002
        assert not Path(plan.root).exists()

        def make_files(plan: Plan, numbers: Iterable[int], tell: Progress) -> Losses:
            losses = Losses()
            for number in numbers:
                alone = plan.for_files([number])
                made = subprocess.run([sys.executable, "-c", MAKE], input=alone.to_json(), capture_output=True, text=True, check=False)
                if made.returncode:
                    raise RunError(f"{alone.files[0].path}: {made.stderr.splitlines()[-1]}")
                losses += Losses.from_plain(json.loads(made.stdout))
                tell(alone.files[0].size)
                self.made.append(alone.files[0].path)
            return losses

        yield make_files


@pytest.fixture
def toy(monkeypatch) -> Toy:
    toy = Toy()
    monkeypatch.setitem(EXECUTORS, "toy", lambda: toy)
    return toy


@pytest.fixture
def source(tmp_path) -> Path:
    tensors = {f"w{k}": random_tensor(30, 40 + k, seed=k) for k in range(3)} | {"large": torch.full((300,), 1e6)}
    return write(tmp_path / "src", tensors, shards=2, config={"dtype": "float32"})


def test_an_executor_of_ones_own_makes_the_files(toy, source, tmp_path, capsys):
    options = ["--dtype", "fp16", "--max-shard-size", "4KB", "--max-memory", str(ROOMY)]
    assert run("convert", source, tmp_path / "here", *options, "--quiet") == 0
    assert run("convert", source, tmp_path / "dst", *options, "--engine", "toy", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["workers"], figures["overflowed"]["values"], figures["overflowed"]["complete"]) == (1, 300, True)
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "here")
    made = sorted(path.name for path in (tmp_path / "dst").glob("*.safetensors"))
    assert [path for path in toy.made if path.endswith(".safetensors")] == made


def test_what_it_fails_with_is_told_and_finished_files_stay(toy, source, tmp_path):
    plan = api.plan(source, tmp_path / "dst", max_shard_size="4KB", engine="toy")
    source.joinpath("model-00002-of-00002.safetensors").touch()
    with pytest.raises(RunError, match="changed"):
        run_plan(plan, engine="toy")
    with pytest.raises(UsageError, match="cannot write to s3://"):
        api.plan(source, "s3://bucket/dst", engine="toy")


def test_another_package_adds_one_by_an_entry_point(source, tmp_path, monkeypatch, capsys):
    toy = Toy()
    entries = [SimpleNamespace(name="toy", value="toys:TOY", load=lambda: toy), SimpleNamespace(name="no", value="toys:NO", load=lambda: 1)]
    monkeypatch.setattr("streamconv.extensions.entry_points", lambda group: entries if group == "streamconv.executors" else [])
    monkeypatch.setattr(EXECUTORS, "data", dict(EXECUTORS.data))
    assert run("convert", source, tmp_path / "dst", "--engine", "toy", "--max-memory", str(ROOMY), "--quiet") == 0
    assert "model.safetensors" in toy.made
    wrong = refusal(capsys, "convert", source, tmp_path / "other", "--engine", "no")
    assert "entry point toys:NO of group streamconv.executors: expected an Executor, found a int: mend it" in wrong


def test_names_come_from_the_registry(toy, source, tmp_path, capsys):
    assert [*EXECUTORS][:2] == ["local", "ray"]
    with pytest.raises(UsageError, match="'none': known are local, ray, toy"):
        api.plan(source, tmp_path / "dst", engine="none")
    assert "toy" in refusal(capsys, "convert", source, tmp_path / "dst", "--engine", "none")
