"""The doctor finds nothing wrong with what transformers writes."""

from __future__ import annotations

import pytest
import tiny_models

from streamconv.doctor import examine

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

TYPES = (
    "llama", "qwen2", "qwen3_moe", "mixtral", "gemma3_text", "deepseek_v3", "gpt2", "gpt_neox", "opt", "bloom", "phi3", "falcon", "mamba",
    "t5", "bart", "bert", "vit", "clip", "whisper", "internvl", "llava", "qwen2_5_vl", "mistral", "glm4", "cohere2", "olmo2",
)  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_nothing_is_wrong(kind, shard, tmp_path):
    model = tiny_models.build(transformers, kind)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = examine(tmp_path)
    assert found.findings == [], "\n".join(map(str, found.findings))
