"""torchtitan's Llama: its names and its rows of queries and keys, as its own adapter to Hugging Face has them."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, read_any, run, write
from mindformers_models import config_of, llama

HEADS, GROUPS, WIDTH = 4, 2, 16
SIZES = (HEADS, GROUPS, 4, WIDTH, 12, 2)  # with the width of a head, the inner width, and layers
NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "lm_head", "self_attn.o_proj": "attention.wo",
    "self_attn.q_proj": "attention.qkv_linear.wq", "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm",
}  # fmt: skip


def paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A head's rows in pairs of those that are rotated together."""
    return torch.stack([head.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for head in tensor.chunk(heads)]).flatten(0, 1)


def titan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model as torchtitan has it."""
    own = {}
    for name, tensor in tensors.items():
        kind = next(kind for kind in NAMES if kind in name)
        layer = name.split(".")[2] if ".layers." in name else ""
        heads = HEADS if "q_proj" in name else GROUPS
        own[f"layers.{layer}.{NAMES[kind]}.weight" if layer else f"{NAMES[kind]}.weight"] = (
            paired(tensor, heads) if "q_proj" in name or "k_proj" in name else tensor
        )
    return own


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as they were until version 0.2."""
    return {name.replace("qkv_linear.", "").replace("lm_head", "output"): tensor for name, tensor in tensors.items()}


def both_ways(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor], folder: Path, *options: str, tied: bool = False) -> None:
    config = {"model_type": "llama", **config_of(*SIZES), "tie_word_embeddings": tied}
    src = write(folder / "src", tensors, config=config)
    quiet = ("--quiet", "--verify", "--max-memory", ROOMY)
    assert run("convert", src, folder / "there", "--recipe", "llama-hf2titan", *quiet, *options) == 0
    assert (folder / "there" / ".metadata").exists()
    assert_same(read_any(folder / "there"), own)
    assert run("convert", folder / "there", folder / "back", "--recipe", "llama-titan2hf", "--sidecars-from", src, *quiet) == 0
    assert_same(read(folder / "back"), tensors)


@pytest.mark.parametrize("version", ["new", "old"])
def test_there_and_back(version: str, tmp_path: Path) -> None:
    tensors = llama(*SIZES)
    own = titan(tensors)
    both_ways(tensors, renamed(own) if version == "old" else own, tmp_path, "--set", f"names={version}")


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    tensors = llama(*SIZES, head=False)
    own = titan(tensors)
    both_ways(tensors, own | {"lm_head.weight": own["tok_embeddings.weight"]}, tmp_path, tied=True)


def test_a_run_with_its_optimizer(tmp_path: Path) -> None:
    import warnings

    import torch.distributed.checkpoint as dcp

    tensors = llama(*SIZES)
    own = titan(tensors)
    state: dict[str, Any] = {**own, "train_state": {"step": torch.tensor(3)}, "lr_scheduler": {"last_epoch": 3}}
    state |= {f"optimizer.state.{name}.exp_avg": tensor for name, tensor in own.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "step-3")
    src = write(tmp_path / "hf", tensors, config={"model_type": "llama", **config_of(*SIZES)})
    options = ("--recipe", "llama-titan2hf", "--sidecars-from", src, "--quiet", "--max-memory", ROOMY)
    assert run("convert", tmp_path / "step-3", tmp_path / "out", *options) == 0
    assert_same(read(tmp_path / "out"), tensors)


@pytest.mark.oracle
def test_its_own_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's file alone is run: what it imports are its model's classes, of which it takes numbers."""
    found = importlib.util.find_spec("torchtitan")
    if found is None or not found.submodule_search_locations:
        pytest.skip("torchtitan is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / "models" / "llama3" / "state_dict_adapter.py"
    stand_ins = {
        "torchtitan.models.common.rope": {"ComplexRoPE": types.SimpleNamespace(Config=object)},
        "torchtitan.protocols.state_dict_adapter": {"StateDictAdapter": type("StateDictAdapter", (), {"__init__": lambda *_: None})},
        "torchtitan.models.llama3.model": {"Llama3Model": types.SimpleNamespace(Config=object)},
    }
    for name in ("torchtitan", "torchtitan.models", "torchtitan.models.common", "torchtitan.models.llama3", "torchtitan.protocols"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, members in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("torchtitan.models.llama3.state_dict_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    attention = types.SimpleNamespace(n_heads=HEADS, n_kv_heads=GROUPS, head_dim=4)
    config = types.SimpleNamespace(layers=[types.SimpleNamespace(attention=attention)], dim=WIDTH, enable_weight_tying=False)
    adapter = module.Llama3StateDictAdapter(config, None)
    adapter._validate_hf_rope_config = lambda _: None
    tensors = llama(*SIZES)
    own = {name: tensor.contiguous() for name, tensor in adapter.from_hf(dict(tensors)).items()}
    assert_same(own, titan(tensors))
    both_ways(tensors, own, tmp_path)
    assert_same({name: tensor.contiguous() for name, tensor in adapter.to_hf(own).items()}, tensors)
