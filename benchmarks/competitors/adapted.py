"""A LoRA adapter of a model's linear weights, of random numbers; and what a user of PEFT runs to have it in the weights.

python adapted.py make SOURCE ADAPTER
python adapted.py merge SOURCE ADAPTER TARGET --shard-size BYTES
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 16
LINEAR = re.compile(r"(?P<module>.+\.(?P<name>[a-z]+_proj))\.weight")


def make(source: Path, adapter: Path) -> None:
    """An adapter of every projection of the layers."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    names = set()
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for match in filter(None, map(LINEAR.fullmatch, file.keys())):
                outputs, inputs = file.get_slice(match[0]).get_shape()
                names.add(match["name"])
                for side, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                    values = torch.randn(shape, generator=generator) / inputs**0.5
                    tensors[f"base_model.model.{match['module']}.lora_{side}.weight"] = values
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(names)}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(source)}), encoding="utf-8")


def merge(source: Path, adapter: Path, target: Path, shard_size: int) -> None:
    """`merge_and_unload`, as PEFT's documentation has it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = PeftModel.from_pretrained(base, adapter)
    model.merge_and_unload().save_pretrained(target, max_shard_size=shard_size)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "merge"))
    parser.add_argument("source", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--shard-size", type=int, default=5_000_000_000)
    options = parser.parse_args(arguments)
    if options.action == "make":
        make(options.source, options.adapter)
    else:
        merge(options.source, options.adapter, options.target, options.shard_size)


if __name__ == "__main__":
    main()
