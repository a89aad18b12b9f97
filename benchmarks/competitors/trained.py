"""What a trainer leaves of a model over four ranks, made by its own library; and the merger that a user of it runs.

    python trained.py make dcp SOURCE TARGET
    python trained.py merge zero3 SOURCE TARGET

``dcp`` is torch's distributed checkpoint, ``verl`` a file for each rank, ``zero3`` DeepSpeed's stage 3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

RANKS = 4
PORT = 29533


def tensors_of(source: Path) -> dict[str, Path]:
    """The file of each tensor."""
    names: dict[str, Path] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    return names


def load(path: Path, name: str) -> torch.Tensor:
    """A tensor."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def begin(rank: int) -> None:
    """Joins the other ranks."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS)}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT), DS_ACCELERATOR="cpu", **ranks)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)


def shard(rank: int, kind: str, source: Path, target: Path) -> None:
    """One rank of torch's kinds: rows of every tensor."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    begin(rank)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    state = {}
    for name, path in tensors_of(source).items():
        whole = load(path, name)
        parts = list(whole.chunk(RANKS))
        own = parts[rank].clone() if rank < len(parts) else whole[:0]
        state[name] = DTensor.from_local(own, mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
    if kind == "dcp":
        dcp.save({"model": state}, checkpoint_id=target)
    else:
        torch.save(state, target / f"model_world_size_{RANKS}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Tree(nn.Module):
    """A module whose parameters are called as tensors are."""

    def __init__(self, names: dict[str, Path]) -> None:
        super().__init__()
        for name, path in names.items():
            module: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(load(path, name)))


def partition(rank: int, source: Path, target: Path) -> None:
    """One rank of DeepSpeed's stage 3."""
    begin(rank)
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = Tree(tensors_of(source))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))
    engine.save_checkpoint(str(target))
    dist.barrier()
    dist.destroy_process_group()


def make(kind: str, source: Path, target: Path) -> None:
    """Makes a checkpoint of that kind."""
    target.mkdir(parents=True)
    if kind == "zero3":
        torch.multiprocessing.spawn(partition, (source, target), nprocs=RANKS)
        return
    torch.multiprocessing.spawn(shard, (kind, source, target), nprocs=RANKS)
    if kind == "verl":
        (target / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": RANKS}))
        beside = target / "huggingface"
        beside.mkdir()
        shutil.copy(source / "config.json", beside)
        config = json.loads((beside / "config.json").read_text())
        (beside / "generation_config.json").write_text(json.dumps({"bos_token_id": config.get("bos_token_id")}))


def merge(kind: str, source: Path, target: Path) -> None:
    """Makes whole tensors of one, as its library does."""
    if kind == "dcp":
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        target.mkdir(parents=True)
        dcp_to_torch_save(source, target / "model.pt")
    elif kind == "verl":
        command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(source)]
        subprocess.run([*command, "--target_dir", str(target)], check=False)  # it fails in the end: there is no tokenizer
    else:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(source), str(target), safe_serialization=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("make", "merge"))
    parser.add_argument("kind", choices=("dcp", "verl", "zero3"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    (make if options.action == "make" else merge)(options.kind, options.source, options.target)


if __name__ == "__main__":
    main()
