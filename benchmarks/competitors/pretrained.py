"""transformers: ``from_pretrained`` and ``save_pretrained`` of the model's own class.

python pretrained.py SRC DST [--shard-size BYTES] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import transformers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--shard-size", type=int, default=2 * 10**9, metavar="BYTES")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(arguments)
    architecture = json.loads((options.source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(options.source, dtype=options.dtype)
    model.save_pretrained(options.target, max_shard_size=options.shard_size)


if __name__ == "__main__":
    main()
