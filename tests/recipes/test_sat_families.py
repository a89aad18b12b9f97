"""Every family with a SwissArmyTransformer recipe: there, over other numbers of ranks, and back."""

from __future__ import annotations

import json

import pytest
import sat_models
import torch
from checkpoint_files import assert_same, read, run


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", sat_models.FAMILIES)
def test_there_over_four_and_two_ranks_and_back(family, tmp_path):
    name = family.partition("/")[0]
    tensors = sat_models.write_family(family, tmp_path / "hf")
    assert run("convert", tmp_path / "hf", tmp_path / "one", "--recipe", f"{name}-hf2sat", "--quiet") == 0
    for ranks, source in ((4, "one"), (2, "4"), (1, "2")):
        again = ("--recipe", "sat-repartition", "--set", f"model_parallel={ranks}", "--quiet")
        assert run("convert", tmp_path / source, tmp_path / str(ranks), *again) == 0
        assert len(list((tmp_path / str(ranks) / "1").iterdir())) == ranks
        config = json.loads((tmp_path / str(ranks) / "model_config.json").read_text())
        assert config["model_parallel_size"] == config.get("eva_args", config)["model_parallel_size"] == ranks
    whole = [torch.load(tmp_path / folder / "1" / "mp_rank_00_model_states.pt")["module"] for folder in ("one", "1")]
    assert_same(whole[1], whole[0])
    back = ("--recipe", f"{name}-sat2hf", "--quiet")
    assert run("convert", tmp_path / "2", tmp_path / "back", *back) == 0
    assert_same(read(tmp_path / "back"), tensors)
