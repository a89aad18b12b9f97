"""Merges run as other conversions do: gone on with, in parts, from servers, by Ray, within their memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal, run, write
from fsspec.implementations.memory import MemoryFileSystem
from merged_models import merge_file, merged, models
from safetensors.torch import save_file

from streamconv.conversion import api
from streamconv.errors import RunError
from streamconv.merging.file import read as read_file

TIES: dict[str, Any] = {
    "models": [{"model": "{m1}", "parameters": {"weight": 0.6, "density": 0.3}}],
    "merge_method": "ties",
    "base_model": "{m0}",
}


def test_parts_of_a_plan(tmp_path: Path) -> None:
    models(tmp_path, 2)
    whole = merged(tmp_path, TIES, "--max-shard-size", "200")
    plan = tmp_path / "plan.json"
    file = merge_file(tmp_path, TIES)
    assert run("plan", file, tmp_path / "parts", "--max-shard-size", "200", "--out", plan, "--quiet") == 0
    for part in ("2/2", "1/2"):
        assert run("run", plan, "--part", part, "--quiet") == 0
    assert run("run", plan, "--finish", "--quiet") == 0
    assert_same(read(tmp_path / "parts"), whole)


def test_an_interrupted_merge_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path, 2)
    whole = merged(tmp_path, TIES, "--max-shard-size", "200")
    file, dst = merge_file(tmp_path, TIES), tmp_path / "dst"
    options = ["--max-shard-size", "200", "--quiet", "--max-memory", ROOMY]

    def fail(*_: object, **__: object) -> None:
        raise RunError("no more")

    with monkeypatch.context() as patch:
        patch.setattr("streamconv.running.filling.LocalEngine._commit", fail)
        assert run("merge", file, dst, *options) == 3
    capsys.readouterr()
    other = merge_file(tmp_path, {**TIES, "merge_method": "task_arithmetic"})
    assert run("merge", other, dst, *options, "--resume") == 2
    assert "the interrupted run was another one" in capsys.readouterr().err
    assert run("merge", merge_file(tmp_path, TIES), dst, *options, "--resume") == 0
    assert_same(read(dst), whole)


def test_no_model_is_written_over_or_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = models(tmp_path, 2)
    file = merge_file(tmp_path, TIES)
    for model in ("m0", "m1"):
        assert "DST is SRC" in refusal(capsys, "merge", file, tmp_path / model, "--overwrite")
        assert "lies inside SRC" in refusal(capsys, "merge", file, tmp_path / model / "out")
    assert "--reclaim-source: " in refusal(capsys, "convert", file, tmp_path / "out", "--reclaim-source", "--yes")
    assert_same(read(tmp_path / "m0"), first)
    assert_same(read(tmp_path / "m1"), second)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Two models and an adapter in fsspec's file system in memory."""
    models(tmp_path, 2)
    low_rank = {"lora_A.weight": torch.eye(2, 6), "lora_B.weight": torch.eye(6, 2)}
    (tmp_path / "a").mkdir()
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({f"{module}.{name}": tensor for name, tensor in low_rank.items()}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    files = MemoryFileSystem()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        files.pipe_file(f"/merged/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    yield "memory://merged"
    files.store.clear()


def test_models_behind_urls(served: str, tmp_path: Path) -> None:
    text = json.dumps({**TIES, "models": [{"model": "{m1}+{a}", "parameters": {"weight": 0.6, "density": 0.3}}]})
    whole = merged(tmp_path, text.replace("{a}", str(tmp_path / "a")), "--max-shard-size", "200")
    remote = text.replace("{m0}", f"{served}/m0").replace("{m1}+{a}", f"{served}/m1+{served}/a")
    assert_same(merged(tmp_path, remote), whole)
    file = merge_file(tmp_path, remote)
    assert run("merge", file, f"{served}/out", "--quiet", "--max-memory", ROOMY) == 0
    assert run("verify", file, f"{served}/out", "--quiet") == 0


def test_no_secret_of_a_url_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("https://127.0.0.1:9/model?sig=hunter2", "https://127.0.0.1:9/model?sig=hunter2+https://127.0.0.1:9/a?sig=hunter2"):
        text = {"models": [{"model": url, "parameters": {"weight": 1}}], "merge_method": "linear"}
        line = read_file(merge_file(tmp_path, text)).slices[0].inputs[0].model
        assert line.count("https://") == url.count("https://")
        assert "hunter2" not in line


def test_what_verify_and_diff_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models(tmp_path, 2)
    merged(tmp_path, TIES)
    file = merge_file(tmp_path, TIES)
    assert run("verify", file, tmp_path / "out") == 0
    assert run("verify", file, tmp_path / "m0") == 1
    assert "equal" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_does_not_depend_on_a_tensor(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"m{k}", {"w": random_tensor(8000, 8000, seed=k).bfloat16()})
    texts = [
        TIES,
        {
            **TIES,
            "merge_method": "dare_ties",
            "models": [*TIES["models"], {"model": "{m2}", "parameters": {"weight": 0.1, "density": 0.6}}],
        },
        {"models": [{"model": "{m0}"}, {"model": "{m1}"}], "merge_method": "slerp", "base_model": "{m0}", "parameters": {"t": 0.3}},
        {"models": [{"model": f"{{m{k}}}", "parameters": {"weight": 0.3}} for k in range(3)], "merge_method": "linear"},
    ]
    for text in texts:
        command = [sys.executable, "-m", "streamconv", "merge", merge_file(tmp_path, text), tmp_path / "out", "--json"]
        done = subprocess.run([*command, "--max-memory", "150MB"], capture_output=True, text=True, check=True, timeout=600)
        result = json.loads(done.stdout)
        assert result["peak_rss"] <= result["peak_memory"] <= 150_000_000
        tight = read(tmp_path / "out")["w"]
        shutil.rmtree(tmp_path / "out")
        api.merge(merge_file(tmp_path, text), tmp_path / "out", workers=1, max_memory=ROOMY)
        assert torch.equal(read(tmp_path / "out")["w"].view(torch.int16), tight.view(torch.int16))
        shutil.rmtree(tmp_path / "out")
