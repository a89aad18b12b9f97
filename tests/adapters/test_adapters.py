"""``--adapter``: the numbers that PEFT's `merge_and_unload` makes, and refusals by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import adapter, added, low_rank
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal, run, write

from streamconv.planning import fitting

BASE = {
    "model.embed_tokens.weight": random_tensor(20, 6, dtype=torch.bfloat16),
    "model.layers.0.q_proj.weight": random_tensor(8, 6, dtype=torch.bfloat16, seed=1),
    "model.layers.1.q_proj.weight": random_tensor(8, 6, dtype=torch.bfloat16, seed=2),
    "model.layers.0.norm.weight": random_tensor(6, dtype=torch.bfloat16, seed=3),
    "model.conv.weight": random_tensor(4, 3, 2, 2, seed=4),
    "lm_head.weight": random_tensor(20, 6, dtype=torch.bfloat16, seed=5),
}


def merged(
    folder: Path, *options: object, base: dict[str, torch.Tensor] = BASE, config: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    src = folder / "src"
    if not src.exists():
        write(src, base, config=config or {"model_type": "toy"})
    assert run("convert", src, folder / "out", *options, "--verify", "--overwrite", "--quiet", "--max-memory", ROOMY) == 0
    assert run("verify", src, folder / "out", *options, "--quiet", "--max-memory", ROOMY) == 0
    return read(folder / "out")


Q0, Q1 = "model.layers.0.q_proj", "model.layers.1.q_proj"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3 / 2),
        ({"use_rslora": True}, 3 / math.sqrt(2)),
        ({"alpha_pattern": {"layers.0.q_proj": 8, "q_proj": 9}}, 4.0),
        ({"r": 7, "rank_pattern": {"q_proj": 2}}, 3 / 2),
    ],
    ids=str,
)
def test_low_rank_products(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    tensors = low_rank(Q0, 8, 6)
    path = adapter(tmp_path / "adapter", tensors, **config)
    made = merged(tmp_path, "--adapter", path)
    assert_same(made, {**BASE, f"{Q0}.weight": added(BASE[f"{Q0}.weight"], tensors, scale)})
    half = merged(tmp_path, "--adapter", f"{path}@0.5")
    assert_same(half, {**BASE, f"{Q0}.weight": added(BASE[f"{Q0}.weight"], tensors, scale / 2)})


def test_embeddings_convolutions_and_whole_tensors(tmp_path: Path) -> None:
    words = {"A": random_tensor(2, 20, seed=20), "B": random_tensor(6, 2, seed=21)}
    conv = {"model.conv.lora_A.weight": random_tensor(2, 3, 2, 2, seed=22), "model.conv.lora_B.weight": random_tensor(4, 2, 1, 1, seed=23)}
    whole = {"lm_head.weight": random_tensor(20, 6, seed=24), "model.layers.0.norm.base_layer.weight": random_tensor(6, seed=25)}
    embedding = {f"model.embed_tokens.lora_embedding_{side}": tensor for side, tensor in words.items()}
    made = merged(tmp_path, "--adapter", adapter(tmp_path / "adapter", {**embedding, **conv, **whole}))
    turned = {"A": words["B"].t(), "B": words["A"].t()}
    wanted = dict(BASE)
    wanted["model.embed_tokens.weight"] = added(BASE["model.embed_tokens.weight"], turned, 3 / 2, twice=True)
    wanted["model.conv.weight"] = added(BASE["model.conv.weight"], conv, 3 / 2)
    wanted["lm_head.weight"] = whole["lm_head.weight"].bfloat16()
    wanted["model.layers.0.norm.weight"] = whole["model.layers.0.norm.base_layer.weight"].bfloat16()
    assert_same(made, wanted)


@pytest.mark.parametrize("beside", [False, True])
def test_modules_that_are_saved_under_their_wrapper(beside: bool, tmp_path: Path) -> None:
    head, other = random_tensor(20, 6, seed=24), random_tensor(20, 6, seed=26)
    tensors = {"lm_head.modules_to_save.weight": other if beside else head, "lm_head.original_module.weight": BASE["lm_head.weight"]}
    tensors |= {"lm_head.weight": head} if beside else {}
    made = merged(tmp_path, "--adapter", adapter(tmp_path / "adapter", tensors))
    assert_same(made, {**BASE, "lm_head.weight": head.bfloat16()})


def test_several_in_order_with_a_cast_and_new_names(tmp_path: Path) -> None:
    first, second = low_rank(Q0, 8, 6), low_rank(Q0, 8, 6, seed=30)
    paths = [adapter(tmp_path / name, tensors) for name, tensors in (("one", first), ("two", second))]
    options = [word for path in paths for word in ("--adapter", path)]
    made = merged(tmp_path, *options, "--dtype", "float32", "--rename", "model.{name*} -> {name*}")
    once = added(BASE[f"{Q0}.weight"].float(), first, 3 / 2)
    assert torch.equal(made["layers.0.q_proj.weight"], added(once, second, 3 / 2))
    made = merged(tmp_path, *options)
    once = added(BASE[f"{Q0}.weight"], first, 3 / 2)
    assert torch.equal(made[f"{Q0}.weight"], added(once, second, 3 / 2))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("tile", [64, 1000, 5_000])
def test_tiles_of_any_size(rank: int, tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"m.weight": random_tensor(30, 70), "n.weight": random_tensor(30, 70, seed=1).t()}
    tensors = {**low_rank("m", 30, 70, rank), **low_rank("n", 70, 30, rank, seed=50)}
    path = adapter(tmp_path / "adapter", tensors, r=rank)
    whole = merged(tmp_path, "--adapter", path, base=base)
    monkeypatch.setattr(fitting, "TILE", tile)
    monkeypatch.setattr(fitting, "SMALLEST_TILE", tile)
    assert_same(merged(tmp_path, "--adapter", path, base=base), whole)


def test_squares_of_a_model_with_linear_modules_are_not_turned(tmp_path: Path) -> None:
    """GPT-Neo's, which its name would have one take for another GPT-2."""
    base, tensors = {"h.0.q_proj.weight": random_tensor(6, 6)}, low_rank("h.0.q_proj", 6, 6)
    made = merged(tmp_path, "--adapter", adapter(tmp_path / "adapter", tensors), base=base, config={"model_type": "gpt_neo"})
    assert torch.equal(made["h.0.q_proj.weight"], added(base["h.0.q_proj.weight"], tensors, 3 / 2))


def test_weights_with_inputs_before_outputs(tmp_path: Path) -> None:
    base = {"h.0.c_attn.weight": random_tensor(6, 9), "h.0.c_proj.weight": random_tensor(6, 6, seed=1)}
    tensors = {**low_rank("h.0.c_attn", 9, 6), **low_rank("h.0.c_proj", 6, 6, seed=40)}
    path = adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True)
    made = merged(tmp_path, "--adapter", path, base=base, config={"model_type": "gpt2"})
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        pair = {key: tensor for key, tensor in tensors.items() if key.startswith(module)}
        assert torch.equal(made[name], added(weight.t(), pair, 3 / 2).t())


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (low_rank("model.layers.7.q_proj", 8, 6), {}, "SRC has no model.layers.7.q_proj.weight"),
        (low_rank(Q0, 9, 6), {}, "make 9 x 6"),
        (low_rank(Q0, 8, 6, rank=3), {}, "its rank is 2 by adapter_config.json"),
        ({f"{Q0}.lora_A.weight": torch.ones(2, 6)}, {}, "has no other half"),
        (low_rank(Q0, 8, 6), {"rank_pattern": ["q_proj"]}, "rank_pattern of adapter_config.json is ['q_proj'], expected an object"),
        (low_rank(Q0, 8, 6), {"use_rslora": "no"}, "use_rslora of adapter_config.json is 'no', expected true or false"),
        (low_rank(Q0, 8, 6), {"lora_alpha": math.inf}, "q_proj is inf: give a finite lora_alpha"),
        (low_rank(Q0, 8, 6), {"use_dora": True}, "has no magnitude beside it"),
        (low_rank(Q0, 8, 6), {"layer_replication": [[0, 1]]}, "layer_replication is not merged here"),
        (low_rank(Q0, 8, 6), {"peft_type": "PREFIX_TUNING"}, "peft_type PREFIX_TUNING has nothing to merge"),
        (low_rank(Q0, 8, 6), {"peft_type": "OFT"}, "peft_type OFT is not merged here"),
        (low_rank(Q0, 8, 6), {"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        (
            {f"{Q0}.lora_magnitude_vector": torch.ones(8), **low_rank(Q0, 8, 6)},
            {},
            "has a magnitude beside it (lora_magnitude_vector) without use_dora",
        ),
        ({"score.weight": torch.ones(2, 6)}, {}, "SRC has no score.weight"),
        ({"lm_head.weight": torch.ones(21, 6)}, {}, "do not agree: lm_head.weight 21, model.embed_tokens.weight 20"),
        ({"model.layers.0.norm.weight": torch.ones(7)}, {}, "model.layers.0.norm.weight is float32[7]"),
        ({f"{Q0}.oft_R": torch.ones(7)}, {}, "q_proj.oft_R is not merged here"),
    ],
    ids=str,
)
def test_what_is_refused(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write(tmp_path / "src", BASE, config={"model_type": "toy"})
    assert told in refusal(capsys, "convert", src, tmp_path / "out", "--adapter", adapter(tmp_path / "adapter", tensors, **config))
