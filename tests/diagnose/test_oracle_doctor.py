"""The doctor finds nothing wrong with what transformers writes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny_models
import torch

from streamconv.diagnose.doctor import examine

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

TYPES = (
    "llama", "qwen2", "qwen3_moe", "mixtral", "gemma3_text", "deepseek_v3", "gpt2", "gpt_neox", "opt", "bloom", "phi3", "falcon", "mamba",
    "t5", "bart", "bert", "vit", "clip", "whisper", "internvl", "llava", "qwen2_5_vl", "mistral", "glm4", "cohere2", "olmo2",
    "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "xlm-roberta", "gptj", "gpt_bigcode", "starcoder2", "granite",
    "qwen3", "phi", "gemma", "gemma2", "wav2vec2", "hubert", "dinov2", "siglip", "resnet", "segformer", "convnext", "pegasus", "marian",
)  # fmt: skip


def build(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of five layers, since of fewer the doctor does not expect that they are alike; of two where the type takes no more."""
    with monkeypatch.context() as patched:
        for size in ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "num_layers", "n_layers"):
            patched.setitem(tiny_models.SIZES, size, 5)
        with contextlib.suppress(tiny_models.NotBuilt):
            return tiny_models.build(transformers, kind)
    return tiny_models.build(transformers, kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("dtype", "shard"), [("bfloat16", "20KB"), ("float32", "5GB")])
def test_nothing_is_wrong(kind, dtype, shard, tmp_path, monkeypatch):
    model = build(kind, monkeypatch)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard)
    found = examine(tmp_path)
    assert found.healthy, "\n".join(map(str, found.findings))
    assert all("tokenizer" in finding.what or "stored beside" in finding.what for finding in found.findings), found.findings
