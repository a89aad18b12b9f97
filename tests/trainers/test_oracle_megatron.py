"""Megatron Core's models of experts: what they save becomes what transformers loads, and computes the same logits of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, run
from safetensors.torch import load_file
from transformers_logits import logits_of

MAKER = Path(__file__).parent.parent / "fixtures" / "megatron_logits.py"
pytestmark = pytest.mark.oracle


def make(folder: Path, kind: str, *flags: str) -> Path:
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    subprocess.run([sys.executable, "-W", "ignore", MAKER, folder, kind, *flags], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("flags", [(), ("apart",)], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_the_trained_model(kind: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    made = make(tmp_path / "made", kind, *flags)
    options = ("--recipe", "mcore-gpt2hf", "--sidecars-from", made / "config", "--verify", "--quiet", "--max-memory", ROOMY)
    assert run("convert", made / "checkpoint", tmp_path / "hf", *options) == 0
    expected = load_file(made / "logits.safetensors")
    found = logits_of(tmp_path / "hf", expected["words"])
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)
