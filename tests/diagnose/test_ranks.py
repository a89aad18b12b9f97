"""Folders of ranks: what the doctor and inspect say of them, and of what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, run, write
from safetensors.torch import load_file, save_file
from seeded_defects import CONFIG, llama

from streamconv.diagnose.doctor import examine
from streamconv.diagnose.ranks import read_names


def halves(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    return {name: tensor.chunk(2)[rank].clone() if tensor.dim() == 2 else tensor.clone() for name, tensor in tensors.items()}


def make_tp(folder: Path) -> None:
    folder.mkdir()
    for rank in range(2):
        save_file(halves(llama(), rank), folder / f"model{rank}-mp2.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


def make_deepseek(folder: Path) -> None:
    """Each rank has experts of its own."""
    folder.mkdir()
    for rank in range(2):
        tensors = {"embed.weight": torch.ones(4, 4)}
        for layer in range(3):
            tensors[f"layers.{layer}.attn.wq.weight"] = torch.ones(2, 4)
            tensors |= {f"layers.{layer}.ffn.experts.{4 * rank + k}.w1.weight": torch.ones(2, 2) for k in range(4)}
        save_file(tensors, folder / f"model{rank}-mp2.safetensors")


def make_megatron(folder: Path) -> None:
    for rank in range(2):
        for stage in range(2):
            inside = folder / f"mp_rank_{rank:02}_{stage:03}"
            inside.mkdir(parents=True)
            torch.save({"model": {f"layers.{stage}.weight": torch.ones(2, 2)}}, inside / "model_optim_rng.pt")


def make_by(recipe: str, config: dict[str, object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        source = write(folder.parent / "source", llama(), config=config)
        assert run("convert", source, folder, "--recipe", recipe, "--set", "model_parallel=2", "--quiet", "--max-memory", ROOMY) == 0

    return make


LLAMA = {**CONFIG, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64}
KINDS: dict[str, tuple[Callable[[Path], None], str, str]] = {  # how they are made, the second rank, what merges them
    "tp-split": (make_tp, "model1-mp2.safetensors", "--recipe tp-merge merges them"),
    "deepseek": (make_deepseek, "model1-mp2.safetensors", "--recipe deepseek3-mp2hf merges them"),
    "meta": (make_by("llama-hf2meta", LLAMA), "consolidated.01.pth", "--recipe llama-meta2hf merges them"),
    "sat": (make_by("llama-hf2sat", LLAMA), "1/mp_rank_01_model_states.pt", "--recipe llama-sat2hf merges them"),
    "megatron": (make_megatron, "mp_rank_01_000/model_optim_rng.pt", "no recipe merges them"),
}


@pytest.fixture(params=KINDS)
def ranks(request, tmp_path):
    make, second, merging = KINDS[request.param]
    folder = tmp_path / "ranks"
    make(folder)
    return folder, second, merging


def test_ranks_are_one_model(ranks, capsys):
    folder, second, merging = ranks
    count = 4 if "megatron" in second or "optim" in second else 2
    found = examine(folder)
    (note,) = [finding for finding in found.findings if "ranks of one model" in finding.what]
    assert found.healthy, found.findings
    assert note.what == f"{count} ranks of one model"
    assert note.do.startswith(merging)
    assert run("doctor", folder) == 0
    told = capsys.readouterr().out
    assert "remove" not in told
    assert f"{count} ranks of one model" in told
    assert run("inspect", folder) == 0
    told = capsys.readouterr().out
    assert f"note: {count} ranks of one model" in told
    assert merging.partition(" merges")[0] in told or merging.startswith("no recipe")
    assert run("inspect", folder, "--json") == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["tensors"]}
    file = second if "optim" in second else second.rpartition("/")[2]
    assert any(name.startswith(f"{file}/") for name in names)


def test_a_rank_is_missing(ranks):
    folder, second, _ = ranks
    first = second.replace("1", "0", 1) if "sat" not in second and not second.startswith("1/") else "1/mp_rank_00_model_states.pt"
    path = folder / first
    shutil.rmtree(path.parent) if "optim" in first else path.unlink()
    if "optim" in first:
        shutil.rmtree(folder / "mp_rank_00_001")
    found = examine(folder)
    assert not found.healthy
    assert any("number 0 is not" in finding.what or "mp_rank_00" in finding.what for finding in found.findings if finding.problem)


def test_a_rank_is_damaged(ranks):
    folder, second, _ = ranks
    path = folder / second
    path.write_bytes(path.read_bytes()[:-60])
    problems = [finding for finding in examine(folder).findings if finding.problem]
    assert len(problems) == 1, problems


@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", ["a name", "a dtype"])
def test_ranks_differ(change, tmp_path):
    make_tp(tmp_path / "ranks")
    path = tmp_path / "ranks" / "model1-mp2.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "a name":
        del tensors[name]
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, path)
    (problem,) = [finding for finding in examine(path.parent).findings if finding.problem]
    assert name in problem.what
    assert "model0-mp2.safetensors" in problem.what
    assert problem.where == path.name


def test_the_last_rank_is_missing_where_a_name_says_how_many(tmp_path):
    make_tp(tmp_path / "ranks")
    (tmp_path / "ranks" / "model1-mp2.safetensors").unlink()
    (problem,) = [finding for finding in examine(tmp_path / "ranks").findings if finding.problem]
    assert problem.what == "1 of 2 ranks are there, number 1 is not"


def test_what_names_say():
    (meta,) = read_names(["consolidated.00.pth", "consolidated.02.pth", "params.json", "tokenizer.model"])
    assert (meta.missing, meta.size) == ((1,), 3)
    assert read_names(["adapter_rank16.safetensors", "lora_rank8.safetensors", "model-00001-of-00002.safetensors", "rank3.bin"]) == []
    (loose,) = read_names(["rank_1.pt", "rank_0.pt"])
    assert loose.files == ("rank_0.pt", "rank_1.pt")
    assert read_names([f"model{10**9}-mp{10**12}.safetensors"]) == []


def test_shards_whose_names_count_are_no_ranks(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for k in range(2):
        torch.save({f"layers.{k}.weight": torch.ones(2, 2)}, folder / f"consolidated.{k:02}.pt")
    found = examine(folder)
    assert found.healthy
    assert not any("ranks" in finding.what for finding in found.findings)


def test_a_tensor_in_two_shards_is_still_a_problem(tmp_path):
    folder = write(tmp_path / "model", llama(), config=CONFIG)
    save_file({"model.norm.weight": torch.ones(8)}, folder / "more.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    found = examine(folder)
    assert "model.norm.weight" in {finding.where for finding in found.findings if finding.problem}
