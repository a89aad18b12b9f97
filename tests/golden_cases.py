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
    """The source checkpoint of a case, with its config: in two files, or in one where its container has one."""
    tensors, config = source_tensors(case), case["config"]
    if case["source_format"] == "mindspore-ckpt":
        return checkpoint_files.write_ckpt(folder, tensors, config=config)
    if case["source_format"] == "torch-bin":
        return checkpoint_files.write_bin(folder, {root: tensors} if (root := case.get("source_wrapper")) else tensors, config=config)
    return checkpoint_files.write(folder, tensors, shards=2, config=config)


def name_on_disk(name: str) -> str:
    """The name under which transformers saves an InternVL tensor that it calls ``name`` in memory."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    inner = name.removeprefix("model.")
    return f"language_model.model.{inner.removeprefix('language_model.')}" if inner.startswith("language_model.") else inner


def recipes_of(case: Case) -> tuple[str, str]:
    """The recipe of a case of MindSpore Transformers, and the one in the other direction."""
    forward, back = {"forward": ("hf2ms", "ms2hf"), "reverse": ("ms2hf", "hf2ms"), "fuse": ("ms-fuse", "ms-unfuse")}[case["direction"]]
    return f"{case['family']}-{forward}", f"{case['family']}-{back}"


def options_of(case: Case) -> list[str]:
    """The options of a case of MindSpore Transformers, as the command line has them; what its scripts alone take is left out."""
    fusing = ["qkv_concat"] if case["direction"] == "fuse" else []
    names = [name for name in case["params"] if name not in ("dtype", "branch", "save_format", "load_format", *fusing)]
    return [word for name in names for word in ("--set", f"{name}={case['params'][name]}")]


def dtype_of(case: Case) -> str | None:
    """The dtype that a case asks for, or that the reference ends up with for no reason but its libraries."""
    if case["params"].get("dtype"):
        return case["params"]["dtype"]
    made, given = ({record["dtype"] for record in case[key].values()} for key in ("expected", "source"))
    return made.pop() if "expected_keep_dtype" not in case and made != given and len(made) == 1 else None


def expected(case: Case) -> dict[str, dict[str, Any]]:
    """What the files must hold: names as the target model has them, where the reference errs, and as they are saved."""
    given = case.get("expected_keep_dtype", case["expected"])
    records = {case.get("reference_bug_names", {}).get(name, name): record for name, record in given.items()}
    if "expected_on_disk_names" in case:
        return {case["expected_on_disk_names"][name]: record for name, record in records.items()}
    if case["system"] != "mindformers" and case["output_format"].startswith("huggingface"):
        return {name_on_disk(name): record for name, record in records.items()}
    return records


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """The record by which a case knows a tensor."""
    digest = hashlib.sha256(checkpoint_files.raw(tensor)).hexdigest()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": digest}
