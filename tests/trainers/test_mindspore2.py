"""MindSpore Transformers' Checkpoint 2.0: boxes of ranks by metadata.json, and a device's own file, both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, read, read_any, refusal, run, write
from mindformers_models import config_of, llama
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent.parent / "golden" / "trainers"
TENSORS = {
    "model.tok_embeddings.embedding_weight": random_tensor(7, 6, dtype=torch.bfloat16),
    "model.layers.0.attention.wq.weight": random_tensor(8, 4, seed=1),
    "model.norm_out.weight": random_tensor(5, seed=2),
}
CUTS = {"model.tok_embeddings.embedding_weight": (4, 0), "model.layers.0.attention.wq.weight": (4, 2), "model.norm_out.weight": (0, 0)}
"""Rows of the first part, and columns of the first part; 0: not cut, so that both hold it."""


def save(folder: Path, *, drop: str = "") -> Path:
    """Two times two ranks: rows by the first two, columns by the others; with an optimizer's files."""
    iteration = folder / "iteration_00000012"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("12")
    (iteration / "common.json").write_text("{}")
    state: dict[str, object] = {}
    storage: dict[str, list[object]] = {}
    for rank in range(4):
        held: dict[str, torch.Tensor] = {}
        file = f"toy-model-{rank:07d}-0000004"
        for name, tensor in TENSORS.items():
            part, offsets = tensor, [0] * tensor.ndim
            for axis, at in enumerate(CUTS[name][: tensor.ndim]):
                second = (rank // 2, rank % 2)[axis]
                if at:
                    part = part.narrow(axis, at if second else 0, part.shape[axis] - at if second else at)
                    offsets[axis] = at if second else 0
            held[name] = part.contiguous()
            entry = state.setdefault(name, {"properties": {"dtype": "Float32"}, "global_shape": list(tensor.shape), "chunk": []})
            chunk = {"global_offset": offsets, "local_shape": list(part.shape)}
            if chunk not in entry["chunk"]:  # type: ignore[index]
                entry["chunk"].append(chunk)  # type: ignore[index]
            storage.setdefault(str((name, tuple(offsets))), []).append({"file_name": file, "storage_rank": rank, "rank_group": [rank]})
        save_file(held, iteration / f"{file}.safetensors")
        moment = f"adam_m.{next(iter(TENSORS))}"
        save_file({moment: torch.zeros(7, 6)}, iteration / f"toy-opt-{rank:07d}-0000004.safetensors")
        state[moment] = {"properties": {}, "global_shape": [7, 6], "chunk": [{"global_offset": [0, 0], "local_shape": [7, 6]}]}
        storage[str((moment, (0, 0)))] = [{"file_name": f"toy-opt-{rank:07d}-0000004", "storage_rank": rank, "rank_group": [rank]}]
    storage.pop(drop, None)
    (iteration / "metadata.json").write_text(json.dumps({"state_dict_metadata": state, "storage_data": storage}))
    return folder


@pytest.mark.parametrize("inner", ["", "iteration_00000012"])
def test_boxes_of_ranks(inner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = save(tmp_path / "src") / inner
    assert run("convert", src, tmp_path / "out", "--verify", "--check-replicas", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "out"), TENSORS)
    assert "4 files of the optimizer" in "".join(capsys.readouterr())
    assert run("doctor", src, "--data") == 0


def test_a_replica_may_be_missing_and_a_box_may_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = save(tmp_path / "src")
    file = src / "iteration_00000012" / "toy-model-0000003-0000004.safetensors"
    file.unlink()
    assert "'model.layers.0.attention.wq.weight'" in refusal(capsys, "convert", src, tmp_path / "out")
    other = save(tmp_path / "other", drop="('model.layers.0.attention.wq.weight', (4, 2))")
    assert "its box at [4, 2] lies in no file" in refusal(capsys, "convert", other, tmp_path / "out")
    whole = save(tmp_path / "whole", drop="('model.norm_out.weight', (0,))")
    assert "its box at [0] lies in no file" in refusal(capsys, "convert", whole, tmp_path / "out")
    (other / "iteration_00000012" / "metadata.json").unlink()
    assert "no metadata.json" in refusal(capsys, "convert", other, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"axis_fragmentations": [4, 2]}, "part 0 of [4, 3], of [8, 6] cut in [4, 2]"),
        ({"axis_fragmentations": [1, 1], "global_shape": [4, 3]}, "part 1 of [4, 3], of [4, 3] cut in [1, 1]"),
        ({"layout": {"interleaved_parallel": True}}, "its parts are interleaved"),
        ({"axis_fragmentations": [2, 0]}, "part 0 of"),
    ],
)
def test_parts_that_are_numbered_otherwise(
    change: dict[str, object], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = Path(shutil.copytree(GOLDEN / "mindspore2", tmp_path / "src"))
    path = src / "iteration_00000012" / "metadata.json"
    table = json.loads(path.read_text())
    table["state_dict_metadata"]["embedding.word_embeddings.weight"] |= change
    path.write_text(json.dumps(table))
    assert told in refusal(capsys, "convert", src, tmp_path / "out")


def test_of_one_device(tmp_path: Path) -> None:
    src = write(tmp_path / "src", TENSORS)
    assert run("convert", src, tmp_path / "out", "--format", "mindspore2", "--quiet", "--max-memory", ROOMY) == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert (tmp_path / "out" / "iteration_00000000" / "model-0000000-0000001.safetensors").exists()
    assert_same(read_any(tmp_path / "out"), TENSORS)
    assert run("convert", tmp_path / "out", tmp_path / "back", "--quiet", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "back"), TENSORS)


def test_a_family_out_and_in(tmp_path: Path) -> None:
    sizes = (4, 2, 2, 8, 12, 2)  # heads, groups, their width, width, inner width, layers
    src = write(tmp_path / "src", llama(*sizes), config={"model_type": "llama", **config_of(*sizes)})
    there = ("--recipe", "llama-hf2ms", "--format", "mindspore2", "--quiet", "--max-memory", ROOMY)
    assert run("convert", src, tmp_path / "there", *there) == 0
    assert (tmp_path / "there" / "iteration_00000000" / "model-0000000-0000001.safetensors").exists()
    back = ("--recipe", "llama-ms2hf", "--sidecars-from", src, "--quiet", "--max-memory", ROOMY)
    assert run("convert", tmp_path / "there", tmp_path / "back", *back) == 0
    assert_same(read(tmp_path / "back"), read(src))
