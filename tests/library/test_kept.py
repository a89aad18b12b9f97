"""``--keep-dtype auto``: what the class of a model keeps in float32, as loading it has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["deepseek_v3", "t5", "llama"])
def test_what_a_class_keeps_is_left_alone(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20, "intermediate_size": 8}
    if kind == "deepseek_v3":
        experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        latent = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
        config = transformers.DeepseekV3Config(**sizes, **experts, **latent, num_key_value_heads=2, first_k_dense_replace=1)
        model = transformers.DeepseekV3ForCausalLM(config)
    elif kind == "t5":
        config = transformers.T5Config(d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=20)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "src")
    name = str(dtype).removeprefix("torch.")
    more = ["--dtype", name, "--keep-dtype", "auto", "--quiet", "--max-memory", ROOMY]
    assert run("convert", tmp_path / "src", tmp_path / "out", *more) == 0
    loaded = type(model).from_pretrained(tmp_path / "src", dtype=dtype)
    loaded.save_pretrained(tmp_path / "saved")
    assert_same(read(tmp_path / "out"), read(tmp_path / "saved"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
