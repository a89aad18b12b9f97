"""What a user of compressed-tensors runs: `convert_checkpoint` with the dequantizer of the source's format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, FP8BlockDequantizer, convert_checkpoint


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shard-size", type=int, help="not taken: its files are those of the source")
    options = parser.parse_args()
    quantization = json.loads((options.source / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if quantization["quant_method"] == "fp8":
        converter = FP8BlockDequantizer.from_pretrained(str(options.source), dtype=torch.bfloat16)
    else:
        converter = CompressedTensorsDequantizer(str(options.source), dtype=torch.bfloat16)
    convert_checkpoint(str(options.source), str(options.target), converter)


if __name__ == "__main__":
    main()
