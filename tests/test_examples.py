"""The examples in public docstrings print what they say: each of them is run in a folder with a small checkpoint."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from checkpoint_files import write

import streamconv

DOCUMENTED = (
    streamconv.open,
    streamconv.plan,
    streamconv.run,
    streamconv.convert,
    streamconv.step,
    streamconv.stream,
    streamconv.verify,
    streamconv.doctor,
    streamconv.Checkpoint,
    streamconv.TensorEntry,
    streamconv.Recipe,
    streamconv.Plan.to_json,
    streamconv.Plan.from_json,
    streamconv.recipes.get.__func__,
)


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__qualname__)
def test_examples_in_docstrings(documented, tmp_path, monkeypatch):
    write(tmp_path / "model", {"w": torch.arange(6.0).reshape(2, 3), "layers.0.b": torch.zeros(2), "layers.1.b": torch.ones(2)})
    monkeypatch.chdir(tmp_path)
    names = {"streamconv": streamconv, "np": np, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, documented.__qualname__, globs=names)
    assert example.examples, "a runnable example"
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0
