"""safetensors: load everything, change it in memory, save it shard by shard.

python load_save.py SRC DST [--shard-size BYTES] [--dtype float32] [--change fuse|rotary|transpose]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
_QKV = re.compile(r"(.*[.])q_proj([.].*)")
_GATE = re.compile(r"(.*[.])gate_proj([.].*)")


def fuse(state: State, config: dict[str, Any]) -> None:
    """q, k and v, gate and up, each into one tensor; of a model that sees, in its vision tower only, as InternVL's own layout has it."""
    where = "vision_tower." if "vision_config" in config else ""
    for name in [name for name in state if name.startswith(where)]:
        for pattern, parts, target in ((_QKV, ("q", "k", "v"), "qkv"), (_GATE, ("gate", "up"), "gate_up")):
            if match := pattern.fullmatch(name):
                before, after = match.groups()
                state[f"{before}{target}_proj{after}"] = torch.cat([state.pop(f"{before}{part}_proj{after}") for part in parts])


def rotary(state: State, config: dict[str, Any]) -> None:
    """Rows of q and k from half-split to interleaved."""
    for name, tensor in state.items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if name.endswith(f"{part}.weight"):
                rows, columns = tensor.shape
                n = config[heads]
                state[name] = tensor.view(n, 2, rows // n // 2, columns).transpose(1, 2).reshape(rows, columns)


def transpose(state: State, _config: dict[str, Any]) -> None:
    """Every matrix."""
    for name, tensor in state.items():
        if tensor.dim() == 2:
            state[name] = tensor.t().contiguous()


CHANGES = {"fuse": fuse, "rotary": rotary, "transpose": transpose}


def load(source: Path) -> State:
    """All tensors of a directory."""
    state: State = {}
    for file in sorted(source.glob("*.safetensors")):
        state |= load_file(file)
    return state


def cast(state: State, dtype: str) -> None:
    """Every floating tensor; the ones it replaces go one by one."""
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.to(getattr(torch, dtype))


def copy_others(source: Path, target: Path) -> None:
    """The files that are not weights."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, target)


def save(state: State, target: Path, shard_size: int) -> None:
    """As the Hub's library cuts it into shards, each with ``save_file``."""
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, target / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shard-size", type=int, default=2 * 10**9, metavar="BYTES")
    parser.add_argument("--dtype")
    parser.add_argument("--change", choices=sorted(CHANGES))
    options = parser.parse_args(arguments)
    options.target.mkdir(parents=True)
    state = load(options.source)
    if options.change:
        CHANGES[options.change](state, json.loads((options.source / "config.json").read_text()))
    if options.dtype:
        cast(state, options.dtype)
    save(state, options.target, options.shard_size)
    copy_others(options.source, options.target)


if __name__ == "__main__":
    main()
