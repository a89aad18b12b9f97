"""Golden cases: what reference converters make of checkpoints, as names, dtypes, shapes and digests.

A case holds no tensor data. A source tensor's values follow from its name, dtype and shape (`source_tensor`), an expected
tensor is known by the SHA-256 of its row-major little-endian bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import checkpoint_files
import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
Case = dict[str, Any]


def load(name: str) -> Case:
    return json.loads((FOLDER / f"{name}.json").read_text())


def source_tensor(key: str, dtype: str, shape: list[int]) -> torch.Tensor:
    """The tensor that a key stands for: in [-1, 1) rounded from float32, or whole numbers in [0, 1024)."""
    raw = np.random.PCG64(zlib.crc32(key.encode())).random_raw(math.prod(shape)).astype(np.uint64).reshape(shape)
    if dtype == "int64":
        return torch.from_numpy((raw >> np.uint64(54)).astype(np.int64))
    values = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def source_tensors(case: Case) -> dict[str, torch.Tensor]:
    return {name: source_tensor(name, spec["dtype"], spec["shape"]) for name, spec in case["source"].items()}


def write_source(case: Case, folder: Path) -> Path:
    """The source checkpoint of a case, in two files, with its config."""
    return checkpoint_files.write(folder, source_tensors(case), shards=2, config=case["config"])


def name_on_disk(name: str) -> str:
    """The name under which transformers saves an InternVL tensor that it calls ``name`` in memory."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    inner = name.removeprefix("model.")
    return f"language_model.model.{inner.removeprefix('language_model.')}" if inner.startswith("language_model.") else inner


def expected(case: Case) -> dict[str, dict[str, Any]]:
    """What the files must hold: names as the target model has them, where the reference errs, and as they are saved."""
    records = {case.get("reference_bug_names", {}).get(name, name): record for name, record in case["expected"].items()}
    if "expected_on_disk_names" in case:
        return {case["expected_on_disk_names"][name]: record for name, record in records.items()}
    if case["output_format"].startswith("huggingface"):
        return {name_on_disk(name): record for name, record in records.items()}
    return records


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """The record by which a case knows a tensor."""
    digest = hashlib.sha256(checkpoint_files.raw(tensor)).hexdigest()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": digest}
