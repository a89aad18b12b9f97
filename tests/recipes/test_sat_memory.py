"""Memory of whole processes that convert SwissArmyTransformer folders."""

from __future__ import annotations

import json

import pytest
import sat_models
from processes import MB

from tools import make_checkpoint as made

SIZES = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000, "num_hidden_layers": 32, "max_position_embeddings": 2048}
SIZES |= {"intermediate_size": 11008, "rms_norm_eps": 1e-5}


def sparse(folder, sizes, shards):
    """A checkpoint of a CogVLM's shapes without data, and its config."""
    folder.mkdir()
    shapes = {name: ("bfloat16", shape) for name, shape in sat_models.cogvlm(sizes).items()}
    files = made.split(shapes, sum(made.nbytes(*spec) for spec in shapes.values()) // shards + 1)
    weight_map = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        made.write_shard(folder / name, file, sparse=True)
        weight_map |= dict.fromkeys(file, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    vision = {"num_hidden_layers": sizes.vision_layers, "hidden_size": sizes.vision, "num_heads": 16, "num_positions": sizes.positions}
    (folder / "config.json").write_text(json.dumps({**SIZES, "vision_config": {**vision, "image_size": 490, "patch_size": 14}}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_cogvlm_17b_takes_300_mb(convert, ranks, tmp_path):
    source = sparse(tmp_path / "cogvlm", sat_models.COGVLM_17B, shards=8)
    done = convert(source, "--recipe", "cogvlm-hf2sat", "--set", f"model_parallel={ranks}", max_memory=300 * MB)
    assert done.peak <= 300 * MB
