"""PyTorch's distributed checkpoints: the consolidation of their Hugging Face form.

    python consolidate.py SRC DST [--shard-size BYTES]
    python consolidate.py SRC DST --prepare

It takes only files whose header says which part of each tensor they hold, as its own writer puts it there. ``--prepare`` makes a copy
of an ordinary checkpoint that says so: every tensor is whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its data starts."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def prepare(source: Path, target: Path) -> None:
    """Copies a checkpoint and adds to each header what its files would hold had they been written by ranks."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.safetensors")):
        header, start = read_header(path)
        header.pop("__metadata__", None)
        parts = {name: {"saved_offsets": [0] * len(entry["shape"])} for name, entry in header.items()}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(parts)}
        text = json.dumps({"__metadata__": metadata, **header}).encode()
        text += b" " * (-len(text) % 8)
        with path.open("rb") as given, (target / path.name).open("wb") as made:
            given.seek(start)
            made.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(given, made, 16 * MEGABYTE)
    shutil.copy(source / "config.json", target)


def consolidate(source: Path, target: Path, shard_size: int) -> None:
    """Consolidates into the shards that the Hub's library would make."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    target.mkdir(parents=True)
    shapes: dict[str, torch.Tensor] = {}
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
    for path in sorted(source.glob("*.safetensors")):
        header, _ = read_header(path)
        header.pop("__metadata__", None)
        shapes |= {name: torch.empty(entry["shape"], dtype=kinds[entry["dtype"]], device="meta") for name, entry in header.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_size)
    numbers = {name: number for number, names in enumerate(split.filename_to_tensors.values(), 1) for name in names}
    consolidate_safetensors_files(str(source), str(target), numbers, num_threads=2)
    shutil.copy(source / "config.json", target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shard-size", type=int, default=2 * 10**9, metavar="BYTES")
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args(arguments)
    if options.prepare:
        prepare(options.source, options.target)
    else:
        consolidate(options.source, options.target, options.shard_size)


if __name__ == "__main__":
    main()
