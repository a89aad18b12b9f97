"""How much faster two one-processor nodes of a Ray cluster on this machine are than one, where the processors are what bounds it.

``python -m benchmarks.ray_nodes --folder /dev/shm`` merges low-rank matrices into their weights, and prints seconds for each number of
nodes, from joining the cluster to the index, and the ratio; with ``--at-least 1.6`` it fails below that. The machine needs a core for each
node, and nothing else to do.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from streamconv.conversion import api
from streamconv.recipe import Recipe, Rule
from streamconv.running.run import run

SIDE = 4096  # rows and columns of a weight
MERGE = Recipe(
    name="merge",
    summary="low-rank matrices merged into their weights",
    rules=(Rule("{i}.{part:weight,A,B}", "{i}.weight", op={"op": "merge_lora", "merge": "True", "alpha": 1}),),
)


def make_source(folder: Path, shards: int, rank: int) -> Path:
    """A checkpoint of so many files, with one weight and its low-rank matrices in each."""
    folder.mkdir()
    for shard in range(shards):
        make = torch.Generator().manual_seed(shard)
        shapes = {"weight": (SIDE, SIDE), "A": (rank, SIDE), "B": (SIDE, rank)}
        tensors = {f"{shard}.{name}": torch.randn(shape, generator=make) for name, shape in shapes.items()}
        save_file(tensors, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors")
    return folder


def measure(source: Path, target: Path, nodes: int) -> float:
    """Seconds of a conversion by so many nodes; a task makes a file of one weight."""
    one = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**one, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**one)
        plan = api.plan(source, target, recipe=MERGE, max_shard_size=SIDE**2 * 4, engine="ray")
        return run(plan, engine="ray", ray_address=cluster.address).seconds
    finally:
        cluster.shutdown()


def main() -> int:
    """Measures one node and two, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=16, help="files of a weight of 64 MiB each")
    parser.add_argument("--rank", type=int, default=512, help="of the matrices")
    parser.add_argument("--folder", type=Path, help="where source and target lie: a tmpfs, so that no disk has a part in it")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--at-least", type=float, default=0.0, help="the ratio below which this fails")
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)
    taken: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = make_source(Path(folder) / "source", args.shards, args.rank)
        for k in range(args.repeat):
            for nodes, seconds in taken.items():
                seconds.append(measure(source, Path(folder) / f"target-{nodes}-{k}", nodes))
                print(f"{nodes} node{'s' * (nodes > 1)}: {seconds[-1]:.2f} s", flush=True)
    ratio = min(taken[1]) / min(taken[2])
    print(f"{args.shards} weights of {SIDE} x {SIDE}, rank {args.rank}: two nodes take 1 / {ratio:.2f} of the time (ray {ray.__version__})")
    return 0 if ratio >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
