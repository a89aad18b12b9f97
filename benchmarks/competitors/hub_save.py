"""huggingface_hub: load everything with safetensors, save it with ``save_torch_state_dict``.

python hub_save.py SRC DST [--shard-size BYTES] [--dtype float32]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shard-size", type=int, default=2 * 10**9, metavar="BYTES")
    parser.add_argument("--dtype")
    options = parser.parse_args(arguments)
    options.target.mkdir(parents=True)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(options.source.glob("*.safetensors")):
        state |= load_file(file)
    if options.dtype:
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = tensor.to(getattr(torch, options.dtype))
    save_torch_state_dict(state, options.target, max_shard_size=options.shard_size)
    shutil.copy(options.source / "config.json", options.target)


if __name__ == "__main__":
    main()
