"""Whatever a merge is cut into, and however its tiles lie, its numbers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, read, run, write
from merged_models import merge_file, merged

from streamconv.graph import casts
from streamconv.planning import fitting


def of(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters}


MODELS = [of("{m1}", weight=0.6, density=0.3), of("{m2}", weight=-0.3, density=0.6)]
TEXTS: dict[str, dict[str, Any]] = {
    "linear": {"models": MODELS, "merge_method": "linear"},
    "slerp": {"models": [of("{m1}"), of("{m0}")], "merge_method": "slerp", "base_model": "{m0}", "parameters": {"t": 0.3}},
    "ties": {"models": MODELS, "merge_method": "ties", "base_model": "{m0}", "parameters": {"rescale": True}},
    "dare_linear": {"models": MODELS, "merge_method": "dare_linear", "base_model": "{m0}"},
    "dare_ties": {"models": MODELS, "merge_method": "dare_ties", "base_model": "{m0}", "dtype": "float16"},
}


@pytest.mark.parametrize("method", TEXTS)
def test_tiles_and_layouts_change_nothing(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        values = random_tensor(37, 53) + 0.05 * k * random_tensor(37, 53, seed=k)
        write(tmp_path / f"m{k}", {"w": values.bfloat16(), "v": values[0].bfloat16()})
    whole = merged(tmp_path, TEXTS[method])
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps({"rules": [{"rule": "w", "right": "w", "layout": "a b -> b a"}, {"rule": "v", "right": "v"}]}))
    monkeypatch.setattr(casts, "PIECE", 100)
    monkeypatch.setattr(fitting, "TILE", 600)
    monkeypatch.setattr(fitting, "SCATTERED_TILE", 600)
    assert_same(merged(tmp_path, TEXTS[method], "--workers", 2, "--max-shard-size", 4000), whole)
    file = merge_file(tmp_path, TEXTS[method])
    assert run("convert", file, tmp_path / "t", "--recipe", turned, "--quiet", "--max-memory", ROOMY) == 0
    assert torch.equal(read(tmp_path / "t")["w"].T.contiguous().view(torch.int16), whole["w"].view(torch.int16))
