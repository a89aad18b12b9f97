"""A model of transformers that FSDP and DeepSpeed trained: what they saved is loaded, and gives the logits of the trained model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, run
from safetensors.torch import load_file
from transformers_logits import logits_of

MAKER = Path(__file__).parent.parent / "fixtures" / "trained_llama.py"


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dcp", "verl", "zero2", "zero3"])
def test_logits_are_those_of_the_trained_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("deepspeed" if kind.startswith("zero") else "torch")
    made = tmp_path / "made"
    subprocess.run([sys.executable, "-W", "ignore", MAKER, made, kind], check=True, capture_output=True)
    beside = ["--sidecars-from", made / "config"]
    if kind == "verl":  # which keeps a copy of the model's folder itself
        shutil.copytree(made / "config", made / "checkpoint" / "huggingface")
        beside = []
    options = ("--verify", "--check-replicas", "--quiet", "--max-memory", ROOMY)
    assert run("convert", made / "checkpoint", tmp_path / "hf", *beside, *options) == 0
    expected = load_file(made / "logits.safetensors")
    torch.testing.assert_close(logits_of(tmp_path / "hf", expected["words"]), expected["logits"], rtol=1e-4, atol=1e-5)
