"""Merges beside mergekit's own (``pip install mergekit`` in an environment of its own): the same numbers, config and refusals."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import ROOMY, read
from merged_models import added, merge_file

import streamconv

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4,
}  # fmt: skip
GRADIENT = [0, 0.5, "3e-1", 0.7, 1]


def of(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters}


def files(method: str, models: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"models": models, "merge_method": method, **more}


BASE = {"base_model": "{m0}"}
SLICES = [{"sources": [{"model": "{m1}", "layer_range": [0, 2]}]}, {"sources": [{"model": "{m2}", "layer_range": [2, 3]}]}]
SCALES = [{"filter": "o_proj", "value": 0.3}, {"filter": "down_proj", "value": [0.1, 0.7]}]
BY_LAYER = [{"filter": "self_attn", "value": GRADIENT}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]
EXACT = {
    "linear": files("linear", [of("{m1}", weight=0.3), of("{m2}", weight=0.6)]),
    "linear, as it is": files(
        "linear", [of("{m1}", weight=1.0), of("{m2}", weight=0.5), of("{m3}", weight=-0.25)], parameters={"normalize": False}
    ),
    "linear, casts": files(
        "linear", [of("{m1}", weight=[0.1, "9e-1"]), of("{m2}", weight=BY_LAYER)], dtype="float16", out_dtype="bfloat16"
    ),
    "task_arithmetic": files("task_arithmetic", [of("{m1}", weight=0.3), of("{m2}", weight=0.6), of("{m3}", weight=BY_LAYER)], **BASE),
    "task_arithmetic, normalized": files(
        "task_arithmetic", [of("{m1}", weight=0.3), of("{m0}"), of("{m2}", weight=0.6)],
        **BASE, parameters={"normalize": True, "lambda": 0.7},
    ),
    "ties": files("ties", [of("{m1}", weight=0.3), of("{m2}", weight=0.6), of("{m3}", weight=-0.5)], **BASE),
    "ties, lambda": files(
        "ties", [of("{m1}", weight=0.3), of("{m2}", weight=0.6, density=0)], **BASE, parameters={"normalize": False, "lambda": 1.3}
    ),
    "dare_ties": files("dare_ties", [of("{m1}", weight=0.3, density=1.0), of("{m2}", weight=0.6)], **BASE),
    "dare_linear": files("dare_linear", [of("{m1}", weight=0.3, density=1.0), of("{m2}", weight=0.6)], **BASE),
    "passthrough": {"slices": SLICES, "merge_method": "passthrough"},
    "passthrough, scaled": {
        "slices": [{"sources": [{"model": "{m1}", "layer_range": [0, 3], "parameters": {"scale": SCALES}}]}],
        "merge_method": "passthrough",
        "dtype": "float16",
    },
}  # fmt: skip
SLERP = {
    "slerp": files("slerp", [of("{m1}"), of("{m2}")], base_model="{m2}", parameters={"t": BY_LAYER}),
    "slerp, slices": {
        "slices": [{"sources": [{"model": "{m0}", "layer_range": [0, 3]}, {"model": "{m2}", "layer_range": [0, 3]}]}],
        "merge_method": "slerp", **BASE, "parameters": {"t": 0.3},
    },
}  # fmt: skip
DENSE = {"ties": 0.5, "ties, few": 0.13}


@pytest.fixture(scope="module")
def mergekit() -> Iterator[Any]:
    """mergekit's module of merges, quiet."""
    module = pytest.importorskip("mergekit.merge")
    logging.disable(logging.WARNING)
    yield module
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=itertools.product(("llama", "qwen2", "mixtral"), DTYPES), ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, transformers: Any) -> Path:
    """A base and three models that are like it."""
    kind, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
    config = transformers.AutoConfig.for_model(
        kind, **{key: value for key, value in SIZES.items() if "experts" not in key or kind == "mixtral"}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for k in range(4):
        near = {name: tensor + (0.05 * k + 0.01) * tensor.std().nan_to_num(1) * torch.randn_like(tensor) for name, tensor in state.items()}
        model.load_state_dict(near)
        model.to(DTYPES[dtype]).save_pretrained(folder / f"m{k}")
        model.float()
    return folder


def both(mergekit: Any, folder: Path, text: dict[str, Any], tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What mergekit makes, and what we do."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    file = merge_file(folder, text)
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    mergekit.run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True, copy_tokenizer=False))
    streamconv.merge(file, tmp_path / "ours", max_memory=ROOMY, max_shard_size="20KB")
    theirs, ours = read(tmp_path / "theirs"), read(tmp_path / "ours")
    check_config(tmp_path)
    if any("experts" in name for name in theirs):
        ours = fuse(ours)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name
    return theirs, ours


def check_config(tmp_path: Path) -> None:
    theirs, ours = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    keys = (theirs.keys() | ours.keys()) - {"transformers_version", "dtype", "torch_dtype", "layer_types"}
    assert {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)} == {}
    assert ours["dtype"] == str(next(iter(read(tmp_path / "ours").values())).dtype).removeprefix("torch.")


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixtral's experts as transformers holds them, which is what mergekit writes."""
    fused: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stem, mark, rest = name.partition(".block_sparse_moe.experts.")
        if mark:
            experts.setdefault(stem, {})[rest] = tensor
        else:
            fused[name.replace(".block_sparse_moe.gate.", ".mlp.gate.")] = tensor
    for stem, parts in experts.items():
        count = len(parts) // 3
        gate_up = [torch.cat([parts[f"{k}.w1.weight"], parts[f"{k}.w3.weight"]]) for k in range(count)]
        fused[f"{stem}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{stem}.mlp.experts.down_proj"] = torch.stack([parts[f"{k}.w2.weight"] for k in range(count)])
    return fused


@pytest.mark.parametrize("case", EXACT)
def test_the_same_bits(case: str, mergekit: Any, folder: Path, tmp_path: Path) -> None:
    theirs, ours = both(mergekit, folder, EXACT[case], tmp_path)
    for name, tensor in theirs.items():
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name


@pytest.mark.parametrize("case", SLERP)
def test_slerp(case: str, mergekit: Any, folder: Path, tmp_path: Path) -> None:
    theirs, ours = both(mergekit, folder, SLERP[case], tmp_path)
    first, second = read(folder / "m0"), read(folder / "m2")
    if case == "slerp":
        first = read(folder / "m1")
    first, second = (fuse(side) if "experts" in str(side.keys()) else side for side in (first, second))
    for name, tensor in theirs.items():
        step = 2**-22 if tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).eps
        difference = (tensor.float() - ours[name].float()).abs()
        bound = first[name].float().abs() + second[name].float().abs() if tensor.dtype == torch.float32 else tensor.float().abs()
        assert (difference <= step * bound).all(), name
        if tensor.dtype != torch.float32:
            assert (difference > 0).float().mean() < 0.01, name


@pytest.mark.parametrize("case", DENSE)
def test_ties_of_the_largest(case: str, mergekit: Any, folder: Path, tmp_path: Path) -> None:
    """Which of equal sizes counts is mergekit's sort's choice: each number must be one that some choice explains."""
    densities, weights = (DENSE[case], 0.7), (0.3, 0.6)
    chosen = [of(f"{{m{k}}}", weight=weights[k - 1], density=densities[k - 1]) for k in (1, 2)]
    theirs, ours = both(mergekit, folder, files("ties", chosen, **BASE), tmp_path)
    base, *others = (fuse(side) if "experts" in str(side.keys()) else side for side in (read(folder / f"m{k}") for k in range(3)))
    for name, tensor in base.items():
        deltas = [other[name] - tensor for other in others]
        sizes = [delta.abs().float() for delta in deltas]
        counts = [max(1, int(density * tensor.numel())) for density in densities]
        cutoffs = [size.flatten().sort(descending=True).values[count - 1] for size, count in zip(sizes, counts, strict=True)]
        choices = []
        for keeps in itertools.product((False, True), repeat=2):
            pairs = zip(sizes, cutoffs, keeps, strict=True)
            masks = [size >= cutoff if keep else size > cutoff for size, cutoff, keep in pairs]
            choices.append(added(tensor, [other[name] for other in others], weights, masks, normalize=True, elects=True))
        for made in (theirs[name], ours[name]):
            assert torch.stack([made == choice for choice in choices]).any(0).all(), name
        settled = torch.stack([size != cutoff for size, cutoff in zip(sizes, cutoffs, strict=True)]).all(0)
        assert torch.equal(theirs[name][settled], ours[name][settled]), name


def tokenizer(transformers: Any, folder: Path, tokens: list[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    made = Tokenizer(BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=[]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_tokenizers(method: str, mergekit: Any, folder: Path, tmp_path: Path, transformers: Any) -> None:
    tokens = [*(f"t{k}" for k in range(89)), "<|endoftext|>"]  # which Qwen's class adds where it is missing
    try:
        tokenizer(transformers, folder / "m0", tokens)
        tokenizer(transformers, folder / "m1", [*tokens[40:], "x", *tokens[:38]])
        text = files(method, [of("{m1}", weight=0.3), of("{m0}", weight=0.6)], **BASE, tokenizer_source="base")
        theirs, ours = both(mergekit, folder, text, tmp_path)
    finally:
        for path in folder.glob("m*/tokenizer*"):
            path.unlink()
    assert theirs["lm_head.weight"].shape == (90, 32)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
