"""safetensors: load two checkpoints and ask ``torch.equal`` of each tensor; exit code 1 if they differ.

python equal.py A B
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def load(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        state |= load_file(file)
    return state


def main(arguments: list[str] | None = None) -> int:
    a, b = (load(Path(name)) for name in (arguments or sys.argv[1:]))
    same = a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    print("equal" if same else "different")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
