"""MindSpore Transformers: what ``convert_weight.py --model llama --input_path SRC/ --output_path DST/model.ckpt --dtype bf16`` runs.

python mindformers_llama.py SRC DST
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    options.target.mkdir()
    os.environ["LOG_MF_PATH"] = str(options.target.with_name("log"))  # not in the working directory
    import mindspore
    from mindformers.models.llama.convert_weight import convert_pt_to_ms

    # Some versions take the folder, others a file in it, of which they use the folder; the slash is right for both.
    convert_pt_to_ms(f"{options.source}/", str(options.target / "model.ckpt"), dtype=mindspore.bfloat16)


if __name__ == "__main__":
    main()
